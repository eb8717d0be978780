"""The one fork server of a test process: what it has imported, its forks need not."""

from __future__ import annotations

import multiprocessing

context = multiprocessing.get_context("forkserver")
# the list is the process's, and the first start counts: a second place that sets it would leave all others without
context.set_forkserver_preload(
    [
        "heteromesh.runtime.trainer",
        "heteromesh.runtime.training.fixed",
        "heteromesh.runtime.training.elastic",
        "heteromesh.runtime.launch.run",
        "heteromesh.runtime.probe.worker",
        "heteromesh.faults.testing.lab",
        "torch.distributed.checkpoint",
        "torch._dynamo",
        "fsspec.core",
        "pytest",
        "unittest.mock",
        # what every rank of a Transformers model would import anew
        "transformers.models.auto.modeling_auto",
        "transformers.generation.utils",
        "peft",
    ]
)
