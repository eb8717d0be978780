"""The run directory as a hook: every rank remembers the last steps, one rank writes them.

So a step that was committed is in the run directory also when its writer died before it could write it.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from heteromesh.comm.records import Recorder
from heteromesh.comm.world import World
from heteromesh.planner.plan import to_json
from heteromesh.runtime.hooks.api import Hook, StepCommitted, TrainingReport
from heteromesh.runtime.process.failure import RESTARTS
from heteromesh.runtime.records.metrics import last_step
from heteromesh.runtime.records.rundir import CONFIG, METRICS, RunDirectory

_REMEMBERED = 8


class RunRecords(Hook):
    """Writes config.json, plan.jsonl, metrics.jsonl, ledger.jsonl, evaluations.jsonl, trace.json and TensorBoard files.

    `path` must be the same file system on every host whose ranks may get to write.
    """

    def __init__(
        self,
        path: Path,
        recorder: Recorder,
        resolved: Callable[[tuple[int, ...]], Mapping[str, Any]],
        *,
        resume: bool | Literal["auto"],
        together: World | None,
        job: str = "",
    ) -> None:
        """`resolved`: what config.json is to have, for a job of these members. `together`: the world of ranks that
        stay, which write one trace. `job`: see runtime/records/run_lock.py."""
        self.path, self._recorder, self._resolved = path, recorder, resolved
        self._resume, self.together, self._job = resume, together, job
        self.restarted = int(os.environ.get(RESTARTS, "0")) > 0
        """Whether this process replaces one that may have begun the run."""
        self._recent: deque[StepCommitted] = deque(maxlen=_REMEMBERED)
        self._directory: RunDirectory | None = None
        self._written = 0
        """The last step that the files have."""

    def create(self) -> None:
        """Makes the directory of a new or resumed run, on the rank that writes. Raises UserError where it can't be."""
        begun = self.restarted and (self.path / CONFIG).exists()
        self._directory = RunDirectory(self.path, resume=self._resume or begun, job=self._job)

    def open(self, members: tuple[int, ...], done: int) -> None:
        """Opens the files, without the lines of steps after `done`; takes over from a writer that was lost,
        unless it is this rank that made the directory."""
        resolved: Mapping[str, Any] = self._resolved(members)
        self._written = done
        if self._directory is None:
            self._directory = RunDirectory(self.path, resume=True, job=self._job)
            self._written = last_step(self.path / METRICS)
            with suppress(OSError, ValueError):
                # what the job was started with stays, whoever is left of it
                resolved = json.loads((self.path / CONFIG).read_text())
        self._directory.start(resolved, self._written)

    def step_committed(self, step: StepCommitted) -> None:
        if step.rounds:  # a member that joined when all was done knows of no plan
            self._recent.append(step)
        if not step.world.writes:
            return
        if self._directory is None or not self._directory.started:
            self.open(step.world.members, step.metrics.step - 1)
        while self._recent:
            old = self._recent.popleft()
            if old.metrics.step > self._written:
                self._write(old)
                self._written = old.metrics.step

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        if values and self._directory is not None and self._directory.started:
            self._directory.evaluation(step, values)

    def end(self, report: TrainingReport) -> None:
        if self.together is not None:
            everyone = self.together.gather((self._recorder.spans, self._recorder.dropped))
            spans, dropped = {r: spans for r, (spans, _) in enumerate(everyone)}, sum(d for _, d in everyone)
        else:
            spans, dropped = {0: self._recorder.spans}, self._recorder.dropped
        if self._directory is not None and self._directory.started:
            self._directory.trace(spans, dropped)

    def memory(self, ranks: object) -> None:
        """Writes what the ranks' memory was predicted to be and what it came to, on the rank that writes."""
        if self._directory is not None and self._directory.started:
            self._directory.memory(ranks)

    def finished(self, report: TrainingReport) -> None:
        """Marks the run as finished, on the rank that writes, where nothing has stopped it."""
        if report.signal is None and self._directory is not None and self._directory.started:
            self._directory.finished(report.last_step)

    def trace_of_a_failure(self) -> None:
        """Writes this rank's own spans, when the others can't be asked."""
        if self._directory is not None and self._directory.started:
            self._directory.trace({0: self._recorder.spans}, self._recorder.dropped)

    def close(self) -> None:
        """Closes the files."""
        if self._directory is not None:
            self._directory.close()

    def _write(self, step: StepCommitted) -> None:
        assert self._directory is not None
        self._directory.record(
            step.metrics, step.rounds[0].plan, _measured(step), _ledger(step), correction=asdict(step.correction)
        )


def _measured(step: StepCommitted) -> dict[str, Any]:
    return {
        "seconds": step.metrics.measured_seconds,
        "busy_seconds": [report.measured.busy_seconds for report in step.reports],
        "passes": [measure._asdict() for report in step.reports for measure in report.measured.passes],
        "plan_wait_seconds": step.metrics.plan_wait_seconds,
        "members": list(step.world.members),
        "names": list(step.world.names),
        "attempts": step.attempts,
        "repairs": [{"sequences": list(again.places), "plan": to_json(again.plan)} for again in step.rounds[1:]],
    }


def _ledger(step: StepCommitted) -> dict[str, Any]:
    """Says who trained which sequences."""
    trained: dict[str, list[int]] = {}
    for report in step.reports:
        for members, passes in report.held.items():
            trained["+".join(map(str, members))] = [i for places in passes for i in places]
    return {"batch": step.batch.index, "trained": trained, "digest": step.digest}
