"""A test that leaks an environment variable, a thread or a process fails."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import pytest
from hypothesis import settings

# threads of several tests at a time would wait for each other, and busily
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a busy machine is no failure: every test has pytest's own time limit
settings.register_profile("heteromesh", deadline=None)
settings.load_profile("heteromesh")

# a background job of a shell has Ctrl-C ignored, and so would have everything that the tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def leaks_nothing() -> Iterator[None]:
    environment, threads = _environment(), set(threading.enumerate())
    processes = set(multiprocessing.active_children())
    yield
    assert _environment() == environment, "environment changed"
    left = [t for t in threading.enumerate() if t not in threads and t.is_alive() and not t.daemon]
    assert not left, f"threads left running: {left}"
    assert set(multiprocessing.active_children()) <= processes, "processes left running"


def _environment() -> dict[str, str]:
    """Without what pytest sets for each test, and what torch sets when its compiler is first imported."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TORCHINDUCTOR_"))}
