"""What a rank that joins is told of a job's progress."""

from heteromesh.comm.tcp.state_transfer import pack, unpack
from heteromesh.planner.cost.devices import LinkCosts
from heteromesh.runtime.engine.loss_scale import LossScale
from heteromesh.runtime.hooks.api import Stop
from heteromesh.runtime.training.progress import TrainingProgress


def test_all_of_it_travels_as_plain_values() -> None:
    told = TrainingProgress(9, done=3, sampled={"index": 4}, saved=2, evaluated=1, met=[5], begun=True)
    told.stop, told.links, told.scale = Stop(15, "a hook"), LinkCosts(1e9, 1e-4), LossScale(512.0, 7)
    values, _ = unpack(pack(told.snapshot())[0])
    joins = TrainingProgress(9)
    joins.adopt(values)
    assert joins == told
