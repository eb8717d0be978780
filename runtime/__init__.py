"""Trainer, launcher, command line, data, checkpoints, metrics and traces.

Importing any of it makes an uncaught UserError end the process with its one sentence and exit code 2.
"""

from heteromesh.runtime.process.failure import install_excepthook

install_excepthook()
