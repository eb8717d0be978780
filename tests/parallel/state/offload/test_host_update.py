"""The host update: torch's bits for every mix of dtypes and hyperparameters; no compiler; builds that were killed."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from heteromesh.parallel.state.offload import build, host_update
from heteromesh.parallel.state.offload.host_update import (
    AdamOptions,
    CompiledUpdate,
    SegmentUpdate,
    State,
    TorchUpdate,
    open_host_update,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def compiled():
    update = open_host_update()
    if not isinstance(update, CompiledUpdate):
        pytest.skip("this machine has no compiler, or its processor rounds otherwise than torch's kernel")
    return update


def fresh(numel: int, seed: int = 0) -> State:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=noise), torch.randn(numel, generator=noise), torch.rand(numel, generator=noise)


def equal(a: State, b: State) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("gradient", "weight", "out"), list(product((FP32, BF16, FP16), (None, FP32, BF16, FP16), (False, True)))
)
def test_one_pass_has_the_bits_of_torch(compiled, gradient, weight, out):
    noise = torch.Generator().manual_seed(1)
    for numel in (0, 1, 7, 8, 15, 16, 17, 1000):
        options = AdamOptions(1e-2, 0.9 if numel % 2 else 0.2, 0.95, 1e-8, 0.1 * (numel % 3), 3, numel == 15)
        results = []
        for update in (compiled, TorchUpdate()):
            state, new = fresh(numel), fresh(numel, 5)
            before = fresh(numel)
            place = None if weight is None else torch.zeros(numel, dtype=weight)
            values = torch.randn(numel, generator=noise.manual_seed(1)).to(gradient)
            update([SegmentUpdate(state, values, options, 0, numel, place, new if out else None)], 2)
            assert not out or equal(state, before)
            results.append((*(new if out else state), *(() if place is None else (place,))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("update", "cuts"),
    [
        (TorchUpdate, (0, 16, 512, 1003)),
        (open_host_update, (0, 16, 512, 1003)),
        (open_host_update, (0, 1, 13, 998, 1002, 1003)),
    ],
)
def test_pieces_have_the_bits_of_the_whole(update, cuts):
    """torch's own must be cut at multiples of its vectors' width."""
    if isinstance(update(), TorchUpdate) and any(cut % 16 for cut in cuts[:-1]):
        pytest.skip("torch's own update is all that there is here")
    numel, options = 1003, AdamOptions(1e-2, 0.9, 0.95, 1e-8, 0.1, 2)
    gradient, whole, parts = torch.randn(numel), fresh(numel), fresh(numel)
    parameter = torch.nn.Parameter(whole[0])
    torch._fused_adamw_(
        [parameter.detach()], [gradient], [whole[1]], [whole[2]], [], [torch.tensor(2.0)],
        lr=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    for start, stop in pairwise(cuts):
        cut = slice(start, stop)
        update()([SegmentUpdate(tuple(t[cut] for t in parts), gradient[cut], options, start, numel)], 1)
    assert equal(whole, parts)


def test_rounding_to_bf16_is_torchs_for_ties_infinities_and_nan(compiled):
    special = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.3e38, 3.4028e38, float("inf"), float("nan"), -0.0])
    state = (special.clone(), torch.zeros(8), torch.zeros(8))
    weight = torch.zeros(8, dtype=BF16)
    compiled([SegmentUpdate(state, torch.zeros(8), AdamOptions(0.0, 0.9, 0.9, 1e-8, 0.0, 1), 0, 8, weight)], 1)
    assert torch.equal(torch.isnan(weight), torch.isnan(special))
    keep = ~torch.isnan(special)
    assert torch.equal(weight[keep].view(torch.int16), special.to(BF16)[keep].view(torch.int16))


def test_gradients_that_are_not_finite_do_what_torch_does(compiled):
    gradient = torch.tensor([float("inf"), float("nan"), -float("inf"), 1e30, 0.0] * 5)
    options = AdamOptions(1e-2, 0.9, 0.95, 1e-8, 0.1, 1)
    results = []
    for update in (compiled, TorchUpdate()):
        state = fresh(25)
        update([SegmentUpdate(state, gradient, options, 0, 25)], 1)
        results.append(state)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*results, strict=True))


def test_many_steps_and_threads(compiled):
    numel, options = 200_001, AdamOptions(1e-3, 0.9, 0.999, 1e-8, 0.01, 0)
    ours, theirs, noise = fresh(numel), fresh(numel), torch.Generator().manual_seed(2)
    for step in (1, 2, 1000):
        gradient = torch.randn(numel, generator=noise)
        for update, state in ((compiled, ours), (TorchUpdate(), theirs)):
            update([SegmentUpdate(state, gradient, replace(options, step=step), 0, numel)], 4)
    assert equal(ours, theirs)


def test_without_a_compiler_torchs_update_is_used_and_named(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    open_host_update.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            assert open_host_update().name == "torch"
    finally:
        open_host_update.cache_clear()
    assert "no C++ compiler is to be found (no-such-compiler)" in caplog.text


def compiler(path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_compiler_that_fails_is_named_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script = 'case "$1" in --version) echo 1;; *) echo broken >&2; exit 3;; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path / "c++", script))
    with pytest.raises(build.NotBuiltError, match="failed: broken"):
        build.load_library()
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_compiler_that_hangs_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler(tmp_path / "c++", 'case "$1" in --version) echo 1;; *) exec sleep 60;; esac'))
    with pytest.raises(build.NotBuiltError, match="took more than"):
        build.load_library()


def test_library_that_rounds_otherwise_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(host_update, "_equals_torch", lambda *_: False)
    open_host_update.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            assert isinstance(open_host_update(), TorchUpdate)
    finally:
        open_host_update.cache_clear()
    assert "three passes" in caplog.text


def test_cache_that_can_not_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if not os.environ.get("CXX") and not any(map(build.shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    with pytest.raises(build.NotBuiltError, match="can't be kept"):
        build.load_library()
