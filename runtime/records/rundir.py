"""The run directory: configuration, plans, metrics, trace. Rank 0 writes it (checkpoints are written by all)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heteromesh.comm.records import Span
from heteromesh.errors import UserError
from heteromesh.planner.files import written_whole
from heteromesh.planner.plan import Step, to_json
from heteromesh.runtime.records.metrics import JsonLines, StepMetrics, Tensorboard, truncate_lines
from heteromesh.runtime.records.trace import write_trace

CONFIG, PLANS, METRICS, TRACE, CHECKPOINTS = "config.json", "plan.jsonl", "metrics.jsonl", "trace.json", "checkpoints"
LEDGER, EVALUATIONS = "ledger.jsonl", "evaluations.jsonl"


class RunDirectory:
    """Opens (or, with `resume`, reopens) the directory of a run.

    Raises UserError when it can't be written, holds a run already, or holds none to resume.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        with _named(path):
            existing = (path / CONFIG).exists()
        if existing and not resume:
            raise UserError(
                f"run directory {path} already holds a run: resume it (resume=True) or choose another directory"
            )
        if resume and not existing:
            raise UserError(f"run directory {path} holds no run to resume: check the path or start without resume")
        self._prepare()

    def start(self, config: Mapping[str, Any], done_steps: int) -> None:
        """Writes config.json and opens the files, without the lines of steps after `done_steps`."""
        with _named(self.path):
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

    def close(self) -> None:
        for name in ("_plans", "_metrics", "_ledger", "_evaluations", "_tensorboard"):
            if getattr(self, name, None) is not None:
                getattr(self, name).close()

    def _prepare(self) -> None:
        with _named(self.path):
            (self.path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=".writable-") as probe:
                probe.write(b"\0" * 4096)
                probe.flush()


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
