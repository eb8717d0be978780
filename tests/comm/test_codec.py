"""What travels between ranks brings values and no code."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import heteromesh
from heteromesh.comm.codec import decode, encode, from_tensor, to_tensor
from heteromesh.comm.tags import Tag
from heteromesh.comm.world import gather_over
from heteromesh.errors import UserError
from heteromesh.planner.cost.devices import DeviceCosts
from ranks import World, run_ranks


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


class OldPickle:
    """Is pickled as Python 3.11.2 does members of enumerations."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> Any:
        return getattr, (self.kind, self.name)


def test_members_of_enumerations_come_and_nothing_else_by_name() -> None:
    data = pickle.dumps(OldPickle(Tag, next(iter(Tag)).name))
    assert decode(data) is next(iter(Tag))
    for kind, name in ((Tag, "__class__"), (DeviceCosts, "seconds"), (os, "system")):
        with pytest.raises(pickle.UnpicklingError):
            decode(pickle.dumps(OldPickle(kind, name)) if kind is not os else b"cos\nsystem\n.")


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


def send_code(world: World, trace: Path) -> str:
    """Rank 1 sends code where a value is expected; returns what rank 0 says to it."""
    if world.rank == 1:
        gather_over_as_is(world, pickle.dumps(Evil(trace)))
        return ""
    with pytest.raises(pickle.UnpicklingError) as told:
        gather_over(world.gradients, "a value")
    return str(told.value)


def gather_over_as_is(world: World, data: bytes) -> None:
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(2)]
    torch.distributed.all_gather(sizes, torch.tensor([len(data)]), group=world.gradients)
    padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    torch.distributed.all_gather([torch.empty_like(padded) for _ in range(2)], padded, group=world.gradients)


def test_a_rank_can_send_no_code_over_a_group(tmp_path: Path) -> None:
    assert from_tensor(to_tensor("a value")) == "a value"
    told, _ = run_ranks(2, send_code, tmp_path / "ran")
    assert "posix.system: only plain values and tensors travel" in told
    assert not (tmp_path / "ran").exists()


def test_nothing_of_others_is_unpickled_plainly() -> None:
    root = Path(heteromesh.__file__).parent
    plain = re.compile(
        r"pickle\.loads?\(|(gather|cast|scatter|send|recv)_object(_list)?\(|torch\.load\((?!.*weights_only=True)"
        "|allow_pickle=True"
    )
    found = {
        str(path.relative_to(root))
        for name in ("planner", "comm", "parallel", "faults", "runtime")
        for path in (root / name).rglob("*.py")
        if plain.search(path.read_text())
    }
    # both ends of a pipe between a process and its own child
    assert found == {"planner/sequences/service.py", "runtime/work/plan_service.py"}
