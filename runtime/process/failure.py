"""How a rank ends, under torchrun and without: a user's mistake is one sentence and exit code 2, a lost peer is one
sentence and exit code 1."""

from __future__ import annotations

import atexit
import os
import sys
from types import TracebackType

from heteromesh.errors import UserError


class PeerLost(RuntimeError):
    """Another rank is gone and this one can't go on: a failure that one sentence tells better than a traceback."""


class JobOver(PeerLost):
    """Nobody can go on, so that starting this process again won't help."""


class RunFinished(RuntimeError):
    """The job was done before this process could take part: nothing is left to do, and nothing is wrong."""


ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torch's error handler writes down why a process failed."""
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""How often this worker was started before, as under torchrun."""
UNDER_HETEROMESH_RUN = "HETEROMESH_RUN"
"""Set by `heteromesh run`, which then prints the first failed rank's sentence itself."""


def install_excepthook() -> None:
    """Makes an uncaught UserError or PeerLost print its sentence and end the process with 2 or 1; others as before."""
    if not getattr(sys.excepthook, "heteromesh", False):
        sys.excepthook = _Hook(sys.excepthook)


class _Hook:
    heteromesh = True

    def __init__(self, before: object) -> None:
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _report(error)
        if not isinstance(error, UserError | PeerLost):
            self._before(kind, error, trace)  # type: ignore[operator]
            return
        if UNDER_HETEROMESH_RUN not in os.environ:
            # torch's own hook, around this one, collects sys.stderr to print it later, which os._exit forestalls
            print(f"heteromesh: error: {error}", file=sys.__stderr__ or sys.stderr, flush=True)
        sys.stdout.flush()
        if isinstance(error, PeerLost):
            os._exit(1)  # torch's own exit handlers may wait for the lost peer
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            atexit._run_exitfuncs()  # Python itself would end with code 1
        # peers may wait in a collective that this rank will never join: skip what would wait for them
        os._exit(2)


def _report(error: BaseException) -> None:
    """Tells torchrun, so that it can name the first rank that failed and why."""
    if ERROR_FILE in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        try:
            raise error  # the handler writes down the exception that is being handled
        except BaseException:
            get_error_handler().record_exception(error)
