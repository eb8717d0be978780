"""What a job of changing members writes: every member remembers the last steps, the one of rank 0 writes them.

So a step that was committed is in the run directory also when its writer died before it could write it.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heteromesh.comm.records import Recorder
from heteromesh.comm.world import World
from heteromesh.planner.plan import Step, to_json
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.records.checkpoint import Checkpoints
from heteromesh.runtime.records.metrics import JsonLines, StepMetrics, truncate_lines
from heteromesh.runtime.records.rundir import CHECKPOINTS, CONFIG, METRICS, RunDirectory

LEDGER = "ledger.jsonl"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_REMEMBERED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One committed step, equal on every member."""

    metrics: StepMetrics
    plan: Step
    """Of the whole batch, as it was first planned."""
    measured: Mapping[str, Any]
    ledger: Mapping[str, Any]
    """Who trained which sequences."""


class ElasticRecords:
    """The run directory of a job of changing members. `path` must be the same file system on every host."""

    def __init__(self, config: TrainerConfig, recorder: Recorder) -> None:
        self._config, self._recorder = config, recorder
        self.path = Path(config.run_dir)
        self._again = int(os.environ.get(RESTARTS, "0")) > 0
        """Whether this process replaces one that may have begun the run."""
        self._recent: deque[StepRecord] = deque(maxlen=_REMEMBERED)
        self._directory: RunDirectory | None = None
        self._ledger: JsonLines | None = None
        self._written = 0
        """The last step that the files have."""
        self.checkpoints: Checkpoints | None = None
        """Of the member that writes, else None."""

    def create(self) -> None:
        """Rank 0, before the first step of a new or resumed run. Raises UserError where it can't be."""
        begun = self._again and (self.path / CONFIG).exists()
        self._directory = RunDirectory(self.path, resume=self._config.resume or begun)

    @property
    def checkpointed_before(self) -> bool:
        """Whether the process that this one replaces has left a checkpoint: all members may have been lost at once."""
        return self._again and self.latest is not None

    @property
    def latest(self) -> Path | None:
        """The newest whole checkpoint, for a member that doesn't write them."""
        return max((self.path / CHECKPOINTS).glob("step-*[0-9]"), default=None)

    def remember(self, record: StepRecord) -> None:
        """Every member, after every step."""
        self._recent.append(record)

    def write(self, resolved: Mapping[str, Any], first: int) -> None:
        """Rank 0: whatever is remembered and not written yet. first: steps behind this member when it began.

        Raises UserError where that can't be done.
        """
        if self._ledger is None:
            self._open(resolved, first)
        assert self._directory
        assert self._ledger
        while self._recent:
            record = self._recent.popleft()
            if record.metrics.step > self._written:
                self._directory.record(record.metrics, record.plan, record.measured)
                self._ledger.write({"step": record.metrics.step, **record.ledger})
                self._written = record.metrics.step

    def trace(self) -> None:
        """This member's spans, if it is the one that writes."""
        if self._directory is not None and self._directory.started:
            self._directory.trace({0: self._recorder.spans}, self._recorder.dropped)

    def close(self) -> None:
        """Waits for the checkpoint under way and closes the files."""
        try:
            if self.checkpoints is not None:
                self.checkpoints.close()
        finally:
            for opened in (self._directory, self._ledger):
                if opened is not None:
                    opened.close()

    def open_checkpoints(self) -> Checkpoints:
        """Of this run; a member alone reads and writes them."""
        if self.checkpoints is None:
            self.checkpoints = Checkpoints(
                self.path / CHECKPOINTS, World(recorder=self._recorder), self._config.keep_checkpoints
            )
        return self.checkpoints

    def _open(self, resolved: Mapping[str, Any], first: int) -> None:
        """Takes over from a writer that was lost, unless it is this member that created the directory."""
        if self._directory is None:
            self._directory = RunDirectory(self.path, resume=True)
            self._written = last_step(self.path / METRICS)
            with suppress(OSError, ValueError):
                # what the job was started with stays, whoever is left of it
                resolved = json.loads((self.path / CONFIG).read_text())
        else:
            self._written = first
        self._directory.start(resolved, self._written)
        truncate_lines(self.path / LEDGER, self._written)
        self._ledger = JsonLines(self.path / LEDGER)
        self.open_checkpoints()


def last_step(path: Path) -> int:
    """Of the last whole line; 0 where there is none."""
    last = 0
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                last = max(last, int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue
    return last


def repairs(plans: list[tuple[tuple[int, ...], Step]]) -> list[dict[str, Any]]:
    """For plan.jsonl: what was planned again after a loss, by place in the batch."""
    return [{"sequences": list(places), "plan": to_json(step)} for places, step in plans]
