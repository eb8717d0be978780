"""A checkpoint of which members write a share each: whole in the end, or not there at all, on all of them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.fragments import Piece
from heteromesh.parallel.state.owner import Replicated
from heteromesh.runtime.records.checkpoint import Checkpoints
from heteromesh.runtime.records.checkpoint_shares import ShareWriter

CUTS = {0: (0, 5), 1: (5, 12)}


class Threads(World):
    """Members that are threads of this process."""

    def __init__(self, rank: int, told: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank=rank, size=len(told))
        self.told, self.barrier = told, barrier

    def gather(self, value: Any) -> list[Any]:
        self.barrier.wait(60)
        self.told[self.rank] = value
        self.barrier.wait(60)
        return list(self.told)


class Owner(Replicated):
    """Has a range of the one parameter, and of its momentum."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        super().__init__(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), model)
        self.cut, self.model = slice(*CUTS[rank]), model

    def model_entries(self, model: nn.Module) -> dict[str, Any]:
        weight = next(model.parameters())
        return {"weight": Piece(weight.detach().view(-1)[self.cut], weight.shape, self.cut.start)}

    def checkpoint_entries(self) -> dict[str, Any]:
        momentum = torch.arange(12.0)[self.cut]
        state = {"weight": {"momentum_buffer": Piece(momentum, (3, 4), self.cut.start)}}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        return {"state": state, "param_groups": [group | {"params": ["weight"]} for group in groups]}


def made() -> nn.Linear:
    model = nn.Linear(4, 3, bias=False)
    model.weight.data = 1 / torch.arange(1.0, 13.0).view(3, 4)
    return model


def save(folder: Path) -> list[str]:
    """What went wrong on each of two members."""
    told, barrier = [None, None], threading.Barrier(2)

    def member(rank: int) -> str:
        model, checkpoints = made(), Checkpoints(folder, World(), 2)
        try:
            checkpoints.save_shares(Threads(rank, told, barrier), 7, model, Owner(model, rank), {"a": 1})
        except UserError as error:
            return str(error)
        finally:
            checkpoints.close()
        return ""

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(member, range(2)))


def test_shares_are_an_ordinary_checkpoint(tmp_path: Path) -> None:
    assert save(tmp_path) == ["", ""]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]
    model = nn.Linear(4, 3, bias=False)
    owner = Replicated(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), model)
    checkpoints = Checkpoints(tmp_path, World(), 2)
    path, wrong = checkpoints.newest_whole()
    assert path is not None
    assert not wrong
    assert checkpoints.load(path, model, owner) == {"a": 1}
    checkpoints.close()
    assert torch.equal(model.weight, made().weight)
    state = owner.snapshot()["state"][0]
    assert torch.equal(state["momentum_buffer"], torch.arange(12.0).view(3, 4))


def test_where_one_can_not_write_all_are_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShareWriter.write_data

    def full(self: ShareWriter, *args: Any) -> Any:
        if self.rank == 1:
            raise OSError(28, "No space left on device")
        return write(self, *args)

    monkeypatch.setattr(ShareWriter, "write_data", full)
    one, other = save(tmp_path)
    assert one == other
    assert "the checkpoint of step 7 can't be written to" in one
    assert "No space left on device" in one
    assert not list(tmp_path.iterdir())


def test_a_share_that_is_missing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CUTS, 1, (6, 12))
    with pytest.raises(RuntimeError, match=r"members have written 11 of the 12 elements of model\.weight"):
        save(tmp_path)
    assert not list(tmp_path.iterdir())
