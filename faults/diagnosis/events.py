"""What happened to a job, in order: members, epochs, diagnoses. Kept in memory, and in a file where there is one."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from heteromesh.errors import UserError

EVENTS = "events.jsonl"


class Events:
    """Append-only; `add` from any thread."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory`: of the run; events.jsonl in it is continued. Raises UserError when it cannot be written."""
        self.entries: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._file: IO[str] | None = None
        if directory is not None:
            self.keep_in(directory)

    @property
    def kept(self) -> bool:
        """Whether there is a file."""
        return self._file is not None

    def keep_in(self, directory: Path) -> None:
        """Writes events.jsonl of this directory from now on, with what is known already. Raises UserError as above."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = (directory / EVENTS).open("a", buffering=1)
            with self._lock:
                file.write("".join(json.dumps(entry) + "\n" for entry in self.entries))
                self._file = file
        except OSError as error:
            raise UserError(
                f"run directory {directory} can't be written ({error.strerror}): "
                "free disk space, mend its permissions or choose another directory"
            ) from None

    def add(self, kind: str, **facts: Any) -> None:
        """Adds an event at the wall clock's time (seconds since 1970). A full disk loses the file, not the job."""
        entry = {"time": round(time.time(), 3), "kind": kind, **facts}
        with self._lock:
            self.entries.append(entry)
            if self._file is None:
                return
            try:
                self._file.write(json.dumps(entry) + "\n")
            except OSError:
                with suppress(OSError):
                    self._file.close()
                self._file = None

    def close(self) -> None:
        """Closes the file; the list stays."""
        with self._lock:
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
                self._file = None
