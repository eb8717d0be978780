"""Compiles the host update for this machine's processor, once; the library is kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-std=c++17")
_LINK = ("-shared", "-fPIC", "-pthread")
_SECONDS = 120.0


class NotBuiltError(RuntimeError):
    """There is no compiler, or it failed: the message says which and why."""


def load_library() -> ctypes.CDLL:
    """Returns the compiled update, built now where the cache has none. Raises NotBuiltError.

    Nobody waits for anybody: processes that build at once each write a file of their own and put it in place whole, so
    that a build that was killed leaves no lock behind.
    """
    compiler = _find_compiler()
    target = _cache() / f"{_key(compiler)}.so"
    try:
        if not target.exists():
            _compile(compiler, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NotBuiltError(f"the host update can't be kept in or loaded from {target.parent} ({error})") from error


def _find_compiler() -> str:
    named = os.environ.get("CXX")  # what torch.utils.cpp_extension asks for too
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise NotBuiltError(f"no C++ compiler is to be found ({named or 'c++, g++, clang++'})")


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "heteromesh" / "host_update"


def _key(compiler: str) -> str:
    """Of all that the library depends on: machines that share a home directory may have other processors."""
    parts = [
        SOURCE.read_text(),
        " ".join(FLAGS),
        compiler,
        platform.machine(),
        _processor(),
        _run([compiler, "--version"]),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(handle)
    try:
        _run([compiler, *FLAGS, *_LINK, str(SOURCE), "-o", name])
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except subprocess.TimeoutExpired as error:
        raise NotBuiltError(f"{command[0]} took more than {_SECONDS:.0f} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        raise NotBuiltError(f"{command[0]} failed: {last[0]}") from error
    return done.stdout
