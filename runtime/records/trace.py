"""Writes spans as a Chrome trace, readable by ui.perfetto.dev: a process per rank, a track per category."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from heteromesh.comm.records import Span
from heteromesh.planner.files import written_whole

TRACKS = ("pass", "comm", "wait", "optimizer", "plan", "data", "checkpoint")


def write_trace(path: Path, spans: Mapping[int, Sequence[Span]], dropped: int = 0) -> None:
    """Writes spans by rank; dropped: how many more there were. Times are microseconds since the earliest span."""
    origin = min((s.start_ns for rank in spans.values() for s in rank), default=0)
    with written_whole(path) as part, part.open("w") as file:
        file.write(f'{{"displayTimeUnit": "ms", "otherData": {{"dropped_spans": {dropped}}}, "traceEvents": [\n')
        separator = ""
        for rank, row in sorted(spans.items()):
            for event in _events(rank, row, origin):
                file.write(separator + json.dumps(event))
                separator = ",\n"
        file.write("\n]}\n")


def _events(rank: int, spans: Sequence[Span], origin: int) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
    for track, name in enumerate(TRACKS):
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": track, "args": {"name": name}}
    for span in spans:
        arguments: dict[str, int] = {"step": span.step}
        if span.bytes_sent:
            arguments["bytes_sent"] = span.bytes_sent
        yield {
            "ph": "X",
            "name": span.name,
            "cat": span.category,
            "pid": rank,
            "tid": TRACKS.index(span.category),
            "ts": (span.start_ns - origin) / 1e3,
            "dur": span.duration_ns / 1e3,
            "args": arguments,
        }
