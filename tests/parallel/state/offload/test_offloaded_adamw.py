"""Offloaded AdamW: the bits of torch's fused AdamW under any plan, timing and tier; state dicts; what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from heteromesh.comm.gradients.buckets import build_buckets
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.flats import FlatBuckets
from heteromesh.parallel.state.fragmented import FragmentedOptimizer
from heteromesh.parallel.state.offload import host_update
from heteromesh.parallel.state.offload.lanes import SimulatedLanes, ThreadLanes
from heteromesh.parallel.state.offload.optimizer import OffloadedAdamW
from heteromesh.planner.ownership.offload import OffloadPlan, Subgroup, on_host, plan_offload
from heteromesh.planner.ownership.offload_rates import OffloadMemory, OffloadRates
from offload_plans import ShuffledLanes, random_plan

SHAPES = ((7,), (3, 50), (), (0,), (129,), (64,), (1,))
"""Odd sizes, one number, nothing."""
FP32, BF16 = torch.float32, torch.bfloat16


class Pair:
    """Parameters under offloaded AdamW, and the same ones (in fp32) under torch's fused AdamW."""

    def __init__(self, seed: int, dtypes: Sequence[torch.dtype], shapes=SHAPES, **offload) -> None:
        self.noise = torch.Generator().manual_seed(seed)
        values = [torch.randn(s, generator=self.noise).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]
        self.ours = [nn.Parameter(v.clone()) for v in values]
        self.theirs = [nn.Parameter(v.float()) for v in values]
        self.optimizer = OffloadedAdamW(self.groups(self.ours), lr=1e-2, **offload)
        self.reference = torch.optim.AdamW(self.groups(self.theirs), lr=1e-2, fused=True)

    @staticmethod
    def groups(parameters: list[nn.Parameter]) -> list[dict]:
        return [
            {"params": parameters[:3], "weight_decay": 0.1},
            {"params": parameters[3:], "betas": (0.4, 0.9), "eps": 1e-4, "weight_decay": 0.0},
        ]

    def gradients(self, step: int, missing: float = 0.2) -> None:
        rng = random.Random(step)
        for ours, theirs in zip(self.ours, self.theirs, strict=True):
            gradient = torch.randn(ours.shape, generator=self.noise).to(ours.dtype)
            ours.grad, theirs.grad = gradient, gradient.float()
            if rng.random() < missing:
                ours.grad = theirs.grad = None

    def step(self, step: int, missing: float = 0.2) -> None:
        self.gradients(step, missing)
        self.optimizer.step()
        self.reference.step()

    def check(self) -> None:
        """All bits are equal: weights, which steps were counted, moments."""
        for ours, theirs in zip(self.ours, self.theirs, strict=True):
            assert torch.equal(ours.detach(), theirs.detach().to(ours.dtype))
        ours, theirs = self.optimizer.state_dict(), self.reference.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        assert sorted(ours["state"]) == sorted(theirs["state"])
        for index, state in theirs["state"].items():
            masters = {"master_param"} if self.ours[index].dtype != FP32 else set()
            assert set(ours["state"][index]) == {"step", "exp_avg", "exp_avg_sq"} | masters
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(ours["state"][index][key], state[key]), (index, key)
                assert ours["state"][index][key].dtype == FP32
            if masters:
                assert torch.equal(ours["state"][index]["master_param"], self.theirs[index].detach())


@pytest.mark.parametrize("dtypes", [(FP32,), (BF16,), (FP32, BF16, torch.float16)], ids=["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("seed", range(4))
def test_bits_of_fused_adamw_after_100_steps_under_random_plans_and_timing(seed, dtypes, tmp_path):
    """Buffers are NaN whenever they are free: a use too early or too late would show."""
    tiers = ("host", "disk") if seed == 0 else ("resident", "staged", "host", "disk")
    plan = random_plan(seed, tiers, apart=seed % 2 == 1)
    pair = Pair(seed, dtypes, plan=plan, state_folder=tmp_path, lanes=ShuffledLanes(seed), poison=True)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=50) for o in (pair.optimizer, pair.reference)]
    for step in range(100):
        pair.step(step)
        for schedule in schedules:
            schedule.step()
    pair.check()
    pair.optimizer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(3))
def test_bits_of_fused_adamw_on_threads(seed, tmp_path):
    pair = Pair(seed, (BF16, FP32), plan=random_plan(seed), state_folder=tmp_path, lanes=ThreadLanes(), poison=True)
    for step in range(20):
        pair.step(step)
    pair.check()


def test_bits_of_fused_adamw_on_torchs_own_update(tmp_path, monkeypatch):
    monkeypatch.setattr("heteromesh.parallel.state.offload.optimizer.open_host_update", host_update.TorchUpdate)
    pair = Pair(0, (BF16, FP32), plan=random_plan(5), state_folder=tmp_path)
    assert pair.optimizer.host_update == "torch"
    for step in range(20):
        pair.step(step)
    pair.check()


def test_several_threads_and_subgroups_of_a_large_parameter():
    pair = Pair(0, (BF16,), ((300_007,), (5,)), plan=lambda n: on_host(n, 1 << 17), threads=3)
    for step in range(3):
        pair.step(step, missing=0.0)
    pair.check()


def test_maximize():
    ours, theirs = nn.Parameter(torch.ones(33)), nn.Parameter(torch.ones(33))
    for optimizer, p in (
        (OffloadedAdamW([ours], maximize=True), ours),
        (torch.optim.AdamW([theirs], maximize=True, fused=True), theirs),
    ):
        p.grad = torch.linspace(-1, 1, 33)
        optimizer.step()
    assert torch.equal(ours, theirs)


def test_simulated_lanes_do_the_arithmetic_in_the_predicted_time():
    rates = OffloadRates(host_update=1.68e9, device_update=1e11, to_device=50e9, to_host=50e9)
    lanes = SimulatedLanes(rates)
    pair = Pair(0, (BF16,), ((5000,), (3, 333)), lanes=lanes, plan=lambda n: plan_offload(n, rates, subgroup_numel=64))
    for step in range(3):
        pair.step(step, missing=0.0)
    pair.check()
    plan = pair.optimizer.plan
    assert {s.tier for s in plan.subgroups} == {"staged", "host"}
    assert lanes.seconds == pytest.approx(3 * plan.seconds, rel=1e-9)
    assert plan.seconds <= 1.05 * plan.bound_seconds


def test_staging_stays_within_its_budget():
    rates = OffloadRates(host_update=1e9, to_device=50e9, to_host=50e9)
    memory = OffloadMemory(staging=2 * 64 * 12)
    pair = Pair(0, (BF16,), plan=lambda n: plan_offload(n, rates, memory, subgroup_numel=64))
    pair.step(0)
    pair.check()
    plan, (_, work) = pair.optimizer.plan, pair.optimizer._bound
    assert plan.numel_on("staged") > 0
    assert plan.staging == 2
    assert sum(t.nbytes for t in work.staging) <= 2 * 64 * 12


# -- the faults of the published code (research notes, 1.6)


def every_second_on_the_device(numel: int) -> OffloadPlan:
    """The published schedule: the last subgroup is on the device, and nothing comes after it."""
    bounds = [*range(0, numel, 32), numel]
    tiers = ("host", "staged")
    cut = tuple(Subgroup(a, b, tiers[i % 2]) for i, (a, b) in enumerate(pairwise(bounds)))
    return OffloadPlan(subgroups=cut, order=tuple(range(len(cut))), apart=True, staging=1, weights=1)


def test_weights_of_bf16_are_never_bits_of_another_dtype():
    """Published: fp16 bits copied over bf16 weights, which makes 0.02 about 1e-13."""
    pair = Pair(0, (BF16,), ((256,),), plan=every_second_on_the_device)
    before = pair.ours[0].detach().clone()
    pair.step(0, missing=0.0)
    pair.check()
    assert (pair.ours[0].detach().float() - before.float()).abs().max() < 0.1


@pytest.mark.parametrize("numel", [64, 128, 130])
def test_last_subgroup_is_flushed_when_it_is_on_the_device(numel):
    """Published: a flush happens when the next one is fetched, and after the last one there is none."""
    pair = Pair(0, (BF16,), ((numel,),), plan=every_second_on_the_device, poison=True)
    for step in range(4):
        pair.step(step, missing=0.0)
        pair.check()


def test_step_returns_only_when_all_weights_have_come():
    """Published: nobody awaits the thread that hands the last weights over."""

    class LateWeights(ThreadLanes):
        def _perform(self, tasks, work):
            perform = super()._perform(tasks, work)

            def late(number: int) -> None:
                if tasks[number].lane == "weights_in":
                    for _ in range(2000):
                        torch.ones(64).sum()  # everybody else is done long before
                perform(number)

            return late

    pair = Pair(0, (BF16,), ((256,),), plan=every_second_on_the_device, lanes=LateWeights())
    for step in range(3):
        pair.step(step, missing=0.0)
        pair.check()


def test_moments_begin_at_zero_and_no_buffer_is_used_before_its_last_user_has_gone(tmp_path):
    """Published: moments of torch.empty, pinned buffers reused behind the racy wait. One buffer of each kind here."""
    for seed in range(10):
        pair = Pair(seed, (BF16,), plan=every_second_on_the_device, lanes=ShuffledLanes(seed), poison=True)
        torch.full((100_000,), float("nan"))  # what the next allocations would find
        for step in range(3):
            pair.step(step)
        pair.check()


@pytest.mark.parametrize("clip", [False, True])
def test_gradients_sent_during_the_backward_are_not_sent_again_unless_they_change(clip):
    sent: list[int] = []

    class Counting(ThreadLanes):
        def send(self, target, source):
            super().send(target, source)
            sent.append(source.numel())

    ours, theirs = (nn.Sequential(nn.Linear(9, 31), nn.Linear(31, 5)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = OffloadedAdamW(
        ours.parameters(), plan=random_plan(4, ("host", "staged")), lanes=Counting(), poison=True
    )
    reference = torch.optim.AdamW(theirs.parameters(), fused=True)
    for parameter in list(ours.parameters())[:-1]:  # one comes with the step
        parameter.register_post_accumulate_grad_hook(optimizer.gradient_ready)
    for step in range(6):
        sent.clear()
        for model, each in ((ours, optimizer), (theirs, reference)):
            for _ in range(1 + step % 2):  # gradients of several passes are sent again
                model(torch.ones(3, 9) * (step + 1)).square().sum().backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            each.step()
            each.zero_grad(set_to_none=step % 3 == 0)
        assert sum(sent) > 0
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


# -- state dicts, and what changes between steps


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_state_goes_to_plain_adamw_and_back(dtype, tmp_path):
    pair = Pair(0, (dtype,), plan=random_plan(3), state_folder=tmp_path / "a")
    for step in range(3):
        pair.step(step)
    torch.save(pair.optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    plain = torch.optim.AdamW(Pair.groups([nn.Parameter(p.detach().clone()) for p in pair.theirs]), fused=True)
    plain.load_state_dict(saved)
    other = Pair(1, (dtype,), plan=random_plan(4), state_folder=tmp_path / "b")
    with torch.no_grad():
        for mine, theirs in zip(other.ours + other.theirs, pair.ours + pair.theirs, strict=True):
            mine.copy_(theirs)
    other.optimizer.load_state_dict(saved)
    other.reference.load_state_dict(plain.state_dict())
    for step in range(3, 6):
        other.step(step)
    other.check()


@pytest.mark.parametrize("tiers", [("host",), ("disk",), ("staged", "disk")])
def test_weights_may_be_loaded_after_the_optimizers_state(tiers, tmp_path):
    pair = Pair(0, (BF16, FP32), plan=random_plan(3, tiers), state_folder=tmp_path)
    pair.optimizer.load_state_dict(pair.optimizer.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(pair.ours, pair.theirs, strict=True):
            theirs.copy_(ours.mul_(2))
    pair.step(0)
    pair.check()


def test_masters_that_a_plain_adamw_has_kept_and_not_updated_are_not_taken():
    pair = Pair(0, (BF16,))
    pair.step(0)
    plain = torch.optim.AdamW(Pair.groups([nn.Parameter(p.detach().clone()) for p in pair.ours]), lr=1e-2)
    plain.load_state_dict(pair.optimizer.state_dict())
    for group in plain.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    plain.step()
    trained = [p for group in plain.param_groups for p in group["params"]]
    ours = OffloadedAdamW(Pair.groups([nn.Parameter(p.detach().clone()) for p in trained]))
    ours.load_state_dict(plain.state_dict())
    for index, parameter in enumerate(trained):
        assert torch.equal(ours.state_dict()["state"][index]["master_param"], parameter.detach().float())


def test_plain_adamws_state_of_bf16_gets_masters_from_the_weights():
    weights = [nn.Parameter(torch.randn(40).to(BF16)) for _ in range(2)]
    plain = torch.optim.AdamW([weights[0]])
    weights[0].grad = torch.randn(40).to(BF16)
    plain.step()
    with torch.no_grad():
        weights[1].copy_(weights[0])
    ours = OffloadedAdamW([weights[1]])
    ours.load_state_dict(plain.state_dict())
    state = ours.state_dict()["state"][0]
    assert torch.equal(state["master_param"], weights[0].detach().float())
    assert torch.equal(state["exp_avg"], plain.state[weights[0]]["exp_avg"].float())


def test_checkpoints_of_torch_distributed(tmp_path):
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(BF16)
    optimizer = OffloadedAdamW(model.parameters(), plan=random_plan(2), state_folder=tmp_path)
    model(torch.ones(2, 5, dtype=BF16)).sum().backward()
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]["0.weight"]) == {"step", "exp_avg", "exp_avg_sq", "master_param"}
    other = OffloadedAdamW(model.parameters(), plan=on_host)
    set_optimizer_state_dict(model, other, saved)
    for a, b in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_added_group_is_planned_anew_with_the_state_that_there_was(tmp_path):
    pair = Pair(0, (BF16,), plan=random_plan(1), state_folder=tmp_path)
    pair.step(0)
    before = pair.optimizer.plan.numel
    extra = torch.randn(100).to(BF16)
    pair.ours.append(nn.Parameter(extra.clone()))
    pair.theirs.append(nn.Parameter(extra.float()))
    pair.optimizer.add_param_group({"params": [pair.ours[-1]], "lr": 0.1})
    pair.reference.add_param_group({"params": [pair.theirs[-1]], "lr": 0.1})
    assert pair.optimizer.plan.numel == before + 112
    for step in range(1, 4):
        pair.step(step)
    pair.check()


def test_inside_the_fragmented_optimizer():
    """As each rank of a sharded one: fragments in place of parameters, state cut, joined, and read as a whole."""
    model = nn.ModuleList([nn.Linear(9, 11), nn.Linear(11, 6)])
    inner = OffloadedAdamW(model.parameters(), lr=1e-2, plan=lambda n: on_host(n, 32))
    fragmented = FragmentedOptimizer(inner, {p: n for n, p in model.named_parameters()})
    flats = FlatBuckets(build_buckets(list(model.parameters()), 10**6))
    (size,) = flats.sizes
    fragments = flats.fragments([[(0, 37), (37, 101), (101, size)]])
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    reference = torch.optim.AdamW(copies, lr=1e-2, fused=True)
    fragmented.hold(fragments)
    for step in range(4):
        noise = torch.Generator().manual_seed(step)
        for copy in copies:
            copy.grad = torch.randn(copy.shape, generator=noise)
        whole = dict(zip(model.parameters(), copies, strict=True))
        for fragment in fragmented.fragments:
            gradient = whole[fragment.parameter].grad
            assert gradient is not None
            fragment.tensor.grad = fragment.slice_of(gradient).clone()
        fragmented.step()
        reference.step()
        if step == 1:  # dealt out anew, in other fragments, and back
            parts = fragmented.parts([(0, 0, size)])
            with fragmented.holding(flats.fragments(flats.whole), parts):
                assert len(fragmented.state_dict(World())["state"]) == 4
            fragmented.hold_parts(fragments, fragmented.parts([(0, 0, size)]))
    state = fragmented.state_dict(World())["state"]
    for index, (parameter, copy) in enumerate(zip(model.parameters(), copies, strict=True)):
        assert torch.equal(parameter, copy)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(state[index][key], reference.state[copy][key])


# -- refusals


def dense(*shape: int, **options) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, **options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OffloadedAdamW([dense(3, dtype=torch.float64)]).plan, r"parameter 0 is torch.float64"),
        (lambda: OffloadedAdamW([nn.Parameter(torch.zeros(4, 3).t())]).plan, "parameter 0 is not contiguous"),
        (lambda: OffloadedAdamW([{"params": [dense(3)], "amsgrad": True}]), "group 0 has amsgrad=True"),
        (lambda: OffloadedAdamW([{"params": [dense(3)], "capturable": True}]), "group 0 has capturable=True"),
        (lambda: OffloadedAdamW([dense(3)], plan=random_plan(0, ("disk",))).plan, "give state_folder"),
        (lambda: OffloadedAdamW([dense(3)], plan=lambda _: on_host(32)).plan, "of 32 elements where there are 16"),
    ],
)
def test_what_can_not_be_done_exactly_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 4, sparse=True)
    optimizer = OffloadedAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="sparse gradients"):
        optimizer.step()


def test_rank_without_parameters():
    optimizer = OffloadedAdamW([{"params": []}])
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}


def test_options_set_later_are_refused_before_anything_changes():
    parameter = dense(4)
    optimizer = OffloadedAdamW([parameter])
    parameter.grad = torch.ones(4)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(UserError, match="amsgrad"):
        optimizer.step()
    assert torch.equal(parameter, torch.zeros(4))


def test_update_that_fails_half_way_leaves_the_last_checkpoint_and_says_so(tmp_path: Path):
    class Failing(ShuffledLanes):
        left = 10**9

        def run(self, plan, tasks, work):
            def count(task):
                self.left -= 1
                if self.left < 0:
                    raise OSError("the device is gone")
                work(task)

            super().run(plan, tasks, count)

    lanes = Failing(0)
    pair = Pair(0, (BF16,), plan=random_plan(1), state_folder=tmp_path / "scratch", lanes=lanes)
    pair.step(0)
    torch.save([p.detach() for p in pair.ours], tmp_path / "weights.pt")
    torch.save(pair.optimizer.state_dict(), tmp_path / "state.pt")
    whole = (tmp_path / "state.pt").read_bytes()
    lanes.left = 5
    pair.gradients(1)
    with pytest.raises(OSError, match="device is gone"):
        pair.optimizer.step()
    for refused in (pair.optimizer.step, pair.optimizer.state_dict):
        with pytest.raises(UserError, match="resume from the last checkpoint"):
            refused()
    assert (tmp_path / "state.pt").read_bytes() == whole
    lanes.left = 10**9
    with torch.no_grad():
        for parameter, saved in zip(pair.ours, torch.load(tmp_path / "weights.pt"), strict=True):
            parameter.copy_(saved)
    pair.optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
    pair.optimizer.step()
    pair.reference.step()
    pair.check()
