"""What sandboxes leave that were killed by SIGKILL: names tell the process that made them."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from heteromesh.errors import UserError
from heteromesh.runtime.sandbox.machine import ToolError, call
from heteromesh.runtime.sandbox.quota import find_controller, remove_group

NAMESPACES = Path("/run/netns")
_NAME = re.compile(r"hm-(\d+)-\d+(-\d+)?")


def free_name() -> str:
    """Returns a name for a sandbox of this process."""
    number = 0
    while (NAMESPACES / f"hm-{os.getpid()}-{number}").exists():
        number += 1
    return f"hm-{os.getpid()}-{number}"


def remove_leftovers() -> list[str]:
    """Removes the namespaces and control groups of sandboxes whose process is gone; returns their names."""
    removed = []
    for path in sorted(NAMESPACES.iterdir()) if NAMESPACES.exists() else ():
        if _is_leftover(path.name):
            with _another_may_be_first(path):
                _kill(call("ip", "netns", "pids", path.name))
                call("ip", "netns", "del", path.name)
                removed.append(path.name)
    for group in sorted(_groups()):
        if _is_leftover(group.name):
            with _another_may_be_first(group):
                _kill((group / "cgroup.procs").read_text())
                remove_group(group)
                removed.append(group.name)
    return removed


@contextmanager
def _another_may_be_first(path: Path) -> Iterator[None]:
    """Tolerates that two sandboxes that start at the same time find the same leftovers."""
    try:
        yield
    except (ToolError, OSError):
        if path.exists():
            raise


def _groups() -> list[Path]:
    found: set[Path] = set()
    for kind in ("cpu", "memory"):
        with suppress(UserError):
            found.update(find_controller(kind).root.glob("hm-*"))
    return list(found)


def _is_leftover(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and not Path(f"/proc/{match[1]}").exists()


def _kill(pids: str) -> None:
    for pid in pids.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
