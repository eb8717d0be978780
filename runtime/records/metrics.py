"""What a step did, as one aligned line for people and one JSON line for programs."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from heteromesh.planner.files import written_whole

HEADER = (
    f"{'step':>6} {'loss':>8} {'grad norm':>9} {'tokens/s':>9} {'predicted':>9} {'measured':>9} "
    f"{'gap':>6} {'imbalance':>9} {'wait':>7} {'ETA':>8}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Everything measured in a step; the keys of metrics.jsonl."""

    step: int
    loss: float
    """Mean over the step's valid tokens, before the update."""
    grad_norm: float | None
    """None: gradients were not finite at this loss scale, and the step was skipped."""
    learning_rate: float
    tokens: int
    tokens_per_second: float
    predicted_seconds: float
    measured_seconds: float
    gap: float
    """Of the plan: predicted seconds / lower bound - 1."""
    imbalance: float
    """Busy seconds of the busiest rank / mean over the ranks."""
    plan_wait_seconds: float
    """Waited for a plan that was late, slowest rank."""
    data_wait_seconds: float
    exposed_comm_seconds: float
    """Of gradient sum and parameter gather, what backward and forward did not hide (see StepResult)."""
    solve_seconds: float
    passes: int
    loss_scale: float | None = None
    """That of the step, with precision="fp16"."""

    def line(self, eta_seconds: float) -> str:
        """Returns the line, aligned under HEADER."""
        norm = "skipped" if self.grad_norm is None else f"{self.grad_norm:.3f}"
        return (
            f"{self.step:>6} {self.loss:>8.4f} {norm:>9} {self.tokens_per_second:>9,.0f} "
            f"{self.predicted_seconds:>8.3f}s {self.measured_seconds:>8.3f}s {self.gap:>6.1%} {self.imbalance:>9.3f} "
            f"{(self.plan_wait_seconds + self.data_wait_seconds) * 1e3:>5.1f}ms {duration(eta_seconds):>8}"
        )


class Tensorboard:
    """Writes the metrics for TensorBoard where that is installed and whole, else nothing."""

    def __init__(self, directory: Path, done_steps: int) -> None:
        """Raises OSError, as writing does, where the directory can't be written."""
        self._writer: Any = None
        if find_spec("tensorboard") is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(directory), purge_step=done_steps + 1)
        self._hook = threading.excepthook
        threading.excepthook = self._of_other_threads

    def write(self, metrics: StepMetrics) -> None:
        if self._writer is None:
            return
        for name, value in asdict(metrics).items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, metrics.step)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes what hooks have found, one scalar a name."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"evaluation/{name}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            threading.excepthook = self._hook
            # it raises again what writing has raised
            with suppress(OSError):
                self._writer.close()

    def _of_other_threads(self, failed: threading.ExceptHookArgs) -> None:
        """Leaves out the traceback of a failed write, which TensorBoard makes on its thread: the next one raises it."""
        if not type(failed.thread).__module__.startswith("tensorboard.") or not isinstance(failed.exc_value, OSError):
            self._hook(failed)


class JsonLines:
    """A file of one JSON object a line, each written whole, or not at all where the disk is full."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, value: dict[str, Any]) -> None:
        """Appends a line. Raises OSError."""
        line = json.dumps(value).encode() + b"\n"
        before, written = self._file.seek(0, os.SEEK_END), 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(before)
            raise

    def close(self) -> None:
        self._file.close()


def truncate_lines(path: Path, steps: int) -> None:
    """Keeps the lines of the first `steps` steps: a resumed run does later ones again. Drops half-written lines."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= steps:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with written_whole(path) as part:
        part.write_text("".join(kept))


def last_step(path: Path) -> int:
    """Returns the step of the last whole line; 0 where there is none."""
    last = 0
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                last = max(last, int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue
    return last


class ProgressBar:
    """A bar on standard error, on a terminal only."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._on = sys.stderr.isatty()

    def show(self, done: int, eta_seconds: float) -> None:
        if self._on:
            filled = 30 * done // self._total
            bar = "=" * filled + " " * (30 - filled)
            sys.stderr.write(f"\r[{bar}] {done}/{self._total} {duration(eta_seconds)} left \x1b[K")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._on:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def duration(seconds: float) -> str:
    """Writes 1:02:03 or 2:03."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
