"""The run directory: configuration, plans, metrics, trace. Rank 0 writes it (checkpoints are written by all)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from heteromesh.comm.records import Span
from heteromesh.errors import UserError
from heteromesh.planner.files import written_whole
from heteromesh.planner.plan import Step, to_json
from heteromesh.runtime.records.metrics import JsonLines, StepMetrics, Tensorboard, truncate_lines
from heteromesh.runtime.records.run_lock import RunLock
from heteromesh.runtime.records.trace import write_trace

CONFIG, PLANS, METRICS, TRACE, CHECKPOINTS = "config.json", "plan.jsonl", "metrics.jsonl", "trace.json", "checkpoints"
LEDGER, EVALUATIONS, FINISHED = "ledger.jsonl", "evaluations.jsonl", "finished.json"
MEMORY = "memory.json"


class RunDirectory:
    """Opens (or, with `resume`, reopens) the directory of a run, which no other job writes meanwhile.

    Raises UserError when it can't be written, holds a run already, holds none to resume, or another job writes it.
    """

    def __init__(self, path: Path, *, resume: bool | Literal["auto"], job: str = "") -> None:
        """`resume`: "auto" takes a directory with or without a run. `job`: see RunLock."""
        self.path = path
        with _named(path):
            existing = (path / CONFIG).exists()
        if existing and not resume:
            raise UserError(
                f"run directory {path} already holds a run: resume it (resume=True) or choose another directory"
            )
        if resume is True and not existing:
            raise UserError(f"run directory {path} holds no run to resume: check the path or start without resume")
        with _named(path):
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            _probe(path)
            self._lock = RunLock(path, job)

    def start(self, config: Mapping[str, Any], done_steps: int) -> None:
        """Writes config.json and opens the files, without the lines of steps after `done_steps`."""
        with _named(self.path):
            (self.path / FINISHED).unlink(missing_ok=True)
            for name in (PLANS, METRICS, LEDGER, EVALUATIONS):
                truncate_lines(self.path / name, done_steps)
            with written_whole(self.path / CONFIG) as part:
                part.write_text(json.dumps(config, indent=1, default=str) + "\n")
            self._plans, self._metrics = JsonLines(self.path / PLANS), JsonLines(self.path / METRICS)
            self._ledger = JsonLines(self.path / LEDGER)
            self._evaluations: JsonLines | None = None
            self._tensorboard = Tensorboard(self.path / "tensorboard", done_steps)

    def record(
        self,
        metrics: StepMetrics,
        plan: Step,
        measured: Mapping[str, Any],
        ledger: Mapping[str, Any],
        **more: Any,
    ) -> None:
        """Appends one step to plan.jsonl, metrics.jsonl and ledger.jsonl. more: goes to plan.jsonl too."""
        with _named(self.path):
            self._plans.write({"step": metrics.step, "plan": to_json(plan), "measured": measured, **more})
            self._metrics.write(asdict(metrics))
            self._ledger.write({"step": metrics.step, **ledger})
            self._tensorboard.write(metrics)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Appends what hooks have found after a step to evaluations.jsonl."""
        with _named(self.path):
            self._evaluations = self._evaluations or JsonLines(self.path / EVALUATIONS)
            self._evaluations.write({"step": step, **values})
            self._tensorboard.evaluation(step, values)

    @property
    def started(self) -> bool:
        """Whether `start` was reached."""
        return hasattr(self, "_plans")

    def trace(self, spans: Mapping[int, Sequence[Span]], dropped: int) -> None:
        """Writes trace.json; `dropped` spans of a long run are not in it."""
        with _named(self.path):
            write_trace(self.path / TRACE, spans, dropped)

    def memory(self, ranks: object) -> None:
        """Writes memory.json: by rank, bytes measured and predicted."""
        with _named(self.path), written_whole(self.path / MEMORY) as part:
            part.write_text(json.dumps({"ranks": ranks}, indent=1) + "\n")

    def finished(self, step: int) -> None:
        """Marks the run as finished after so many steps: no process that comes later trains over it by itself."""
        with _named(self.path), written_whole(self.path / FINISHED) as part:
            part.write_text(json.dumps({"step": step}) + "\n")

    def close(self) -> None:
        for name in ("_plans", "_metrics", "_ledger", "_evaluations", "_tensorboard"):
            if getattr(self, name, None) is not None:
                getattr(self, name).close()
        self._lock.close()


def finished_step(path: Path) -> int | None:
    """Returns after how many steps the run in this directory was finished; None: it was not."""
    try:
        return int(json.loads((path / FINISHED).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _probe(path: Path) -> None:
    """Raises OSError where a file can't be written there."""
    probe = path / f".writable-{os.getpid()}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.write(descriptor, b"\0" * 4096)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        with suppress(OSError):
            probe.unlink()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns an OSError on the run directory into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run directory {path} can't be written ({error.strerror}): "
            "free disk space, mend its permissions or choose another directory"
        ) from error
