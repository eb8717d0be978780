"""What travels between ranks brings values and no code."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heteromesh.comm.codec import decode, encode
from heteromesh.errors import UserError
from heteromesh.planner.cost.devices import DeviceCosts


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def test_plain_values_come_as_they_went() -> None:
    value = {
        "plain": [1, 0.1, "x", None, True, (1, {2}), b"y", 1j, Path("a/b")],
        "numpy": [np.float64(0.5), np.arange(6).reshape(2, 3)],
        "own": DeviceCosts(0.0, 1e-3, 1e-4, 100),
    }
    again = decode(encode(value))
    assert again["plain"] == value["plain"]
    assert again["own"] == value["own"]
    assert again["numpy"][0] == 0.5
    assert (again["numpy"][1] == np.arange(6).reshape(2, 3)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_any_shape_come_as_they_went(dtype: torch.dtype) -> None:
    for tensor in (torch.ones(3, 4, dtype=dtype).t(), torch.tensor(1, dtype=dtype), torch.empty(0, 2, dtype=dtype)):
        again = decode(encode([tensor]))[0]
        assert (again.dtype, again.shape) == (dtype, tensor.shape)
        assert torch.equal(again, tensor)


def test_exceptions_come_as_what_they_are_or_as_their_text() -> None:
    class Odd(ValueError):
        pass

    assert isinstance(decode(encode(UserError("a"))), UserError)
    assert isinstance(decode(encode(FileNotFoundError(2, "gone"))), FileNotFoundError)
    told = decode(encode(Odd("why")))
    assert (type(told), str(told)) == (RuntimeError, "Odd: why")


def test_bytes_that_would_run_something_run_nothing(tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.system: only plain values and tensors travel"):
        decode(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("builtins.eval", "heteromesh.runtime.launch.run.main", "heteromesh.__main__.main", "os.path.exists"):
        module, _, function = name.rpartition(".")
        with pytest.raises(pickle.UnpicklingError):
            decode(f"c{module}\n{function}\n.".encode())
    assert not (tmp_path / "ran").exists()


def test_what_can_not_travel_is_told_by_its_sender() -> None:
    with pytest.raises(UserError, match=r"Evil can't be told to other ranks"):
        encode([Evil])
