"""Models that packing or splitting would change are refused before the first step, by the name of their layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torch.nn.functional import dropout

import heteromesh as hm
from heteromesh.errors import UserError
from heteromesh.parallel.model.self_check import SIZE, check_model
from llama import Attention, Block, Llama
from steps import TINY

SAMPLE = torch.randint(TINY.vocab, (200,), generator=torch.Generator().manual_seed(0))


def make(change: Callable[[Llama], object] = lambda model: None, dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(0)
    model = Llama(TINY)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    change(model)
    return model.to(dtype)


class Convolved(nn.Module):
    """A causal convolution over all tokens, before attention."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.conv = inner, nn.Conv1d(TINY.hidden, TINY.hidden, 3, groups=TINY.hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        mixed = self.conv(functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        out: torch.Tensor = self.inner(mixed, cos, sin)
        return out


class Masked(Attention):
    """Attention with a mask of its own, of all tokens of the row."""

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        heads = self.qkv(x).view(1, tokens, -1, self.dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(1, tokens, -1))


class Rotary(nn.Module):
    """Angles whose steps follow the largest position of the row beyond a limit, as longrope's do."""

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = torch.arange(0, 8, 2, dtype=torch.float32) / 8
        factor = 4.0 if int(positions.max()) >= 64 else 1.0
        angles = positions[..., None] / factor / 10_000.0**step
        return angles.cos().to(x), angles.sin().to(x)


class LongRope(Llama):
    def __init__(self) -> None:
        super().__init__(TINY)
        self.rotary = Rotary()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        cos, sin = (t.unsqueeze(1) for t in self.rotary(x, position_ids))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


class Shifted(Llama):
    """Adds each token's predecessor on its row: right when packed by a mask of positions, wrong where split."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        assert position_ids is not None
        cos, sin = self._rope(position_ids)
        x = self.embed(input_ids)
        before = functional.pad(x, (0, 0, 1, 0))[:, :-1] * (position_ids % 64 != 0)[..., None]
        x = x + before
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def convolve(model: Llama) -> None:
    block = model.layers[1]
    assert isinstance(block, Block)
    block.attention = Convolved(block.attention)  # type: ignore[assignment]


def mask(model: Llama) -> None:
    block = model.layers[0]
    assert isinstance(block, Block)
    block.attention = Masked(TINY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("longest", [2, 3, 20, 100, 5000])
def test_models_of_attention_alone_pass(dtype: torch.dtype, longest: int) -> None:
    model = make(dtype=dtype)
    before = [p.clone() for p in model.parameters()]
    check_model(model, SAMPLE, longest, split=True)
    assert model.training
    assert all(p.dtype == dtype and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (lambda dtype: make(convolve, dtype), "layers.1.attention (Convolved)"),
        (lambda dtype: make(mask, dtype), "layers.0.attention (Masked)"),
        (lambda dtype: LongRope().to(dtype), "rotary (Rotary)"),
    ],
)
def test_layers_that_mix_or_look_beyond_their_token_are_named(
    build: Callable[[torch.dtype], nn.Module], layer: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError) as error:
        check_model(build(dtype), SAMPLE, 100, split=True)
    words = str(error.value)
    assert "other losses for packed sequences than for each alone, off by " in words
    assert f": {layer} is the first to differ" in words, words


def test_a_model_within_its_limits_passes() -> None:
    torch.manual_seed(0)
    check_model(LongRope(), SAMPLE, 64, split=True)


def test_what_shows_in_split_sequences_alone_is_found() -> None:
    torch.manual_seed(0)
    model = Shifted(TINY)
    check_model(model, SAMPLE, 64 + SIZE, split=False)
    with pytest.raises(UserError, match="other losses for a sequence over two ranks than for each alone"):
        check_model(model, SAMPLE, 64 + SIZE, split=True)


class Numbered(Llama):
    """Numbers positions from 2 where it is told none, as RoBERTa does, and scales by them."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(2, input_ids.shape[1] + 2)[None]
        return super().forward(input_ids, position_ids) * (1 + position_ids[..., None] / 64)


def test_positions_that_begin_elsewhere_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match="Numbered gives other losses without position_ids than with those from 0"):
        check_model(Numbered(TINY), SAMPLE, 40, split=True)


class Rounded(nn.Module):
    """Computes in float32, as routers do, whatever the model's dtype."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x.float(), self.inner.weight.float()).to(x.dtype)


def test_float32_within_float64_is_no_difference() -> None:
    def change(model: Llama) -> None:
        for layer in model.layers:
            layer.gate_up = Rounded(layer.gate_up)

    check_model(make(change, torch.float64), SAMPLE, 40, split=True)


class Losses(nn.Module):
    """Takes targets, and fails on rows of more than one sequence."""

    def __init__(self, fails: bool, shortest: int = 0) -> None:
        super().__init__()
        self.inner, self.fails, self.shortest = make(), fails, shortest

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.fails and not bool((position_ids.diff() == 1).all()):
            raise RuntimeError("one sequence at a time")
        if input_ids.numel() < self.shortest:
            raise RuntimeError("too short")
        logits = self.inner(input_ids, position_ids)
        return functional.cross_entropy(logits[0], targets[0], ignore_index=-100, reduction="none")[None]


def test_models_that_compute_losses_are_checked_too() -> None:
    check_model(Losses(False), SAMPLE, 40, split=True)
    with pytest.raises(UserError, match=r"fails on packed sequences \(RuntimeError: one sequence at a time\)"):
        check_model(Losses(True), SAMPLE, 40, split=True)
    with pytest.raises(UserError, match=r"fails on a sequence alone \(RuntimeError: too short\): it is called with"):
        check_model(Losses(True, shortest=99), SAMPLE, 40, split=True)


def test_hardly_any_work_is_done() -> None:
    model, tokens = make(), []
    model.embed.register_forward_hook(lambda module, args, output: tokens.append(args[0].numel()))
    check_model(model, SAMPLE, 5000, split=True)
    assert sum(tokens) <= 20 * SIZE
    assert model(SAMPLE[None, :8]).isfinite().all()


class Normalised(nn.Module):
    """Statistics over all tokens of the row, in training mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(TINY.hidden)

    def forward(self, x: torch.Tensor, *angles: torch.Tensor) -> torch.Tensor:
        return self.inner(self.norm(x[0])[None], *angles)


class Noisy(nn.Module):
    """Random numbers by what is given."""

    def __init__(self, inner: nn.Module, noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.noise = inner, noise

    def forward(self, x: torch.Tensor, *angles: torch.Tensor) -> torch.Tensor:
        return self.inner(self.noise(x) if self.training else x, *angles)


def changed(wrap: Callable[[nn.Module], nn.Module]) -> Llama:
    def change(model: Llama) -> None:
        model.layers[1].attention = wrap(model.layers[1].attention)

    return make(change)


@pytest.mark.parametrize(
    "wrap",
    [
        Normalised,
        lambda inner: Noisy(inner, lambda x: x * (1 + torch.rand_like(x))),
        lambda inner: Noisy(inner, lambda x: torch.dropout(x, 0.5, True)),
        # bound by name when this module was imported
        lambda inner: Noisy(inner, partial(dropout, p=0.5)),
    ],
)
def test_what_only_training_mode_mixes_or_draws_is_named(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = changed(wrap)
    with pytest.raises(UserError, match=r"packed sequences in training mode than .*: layers\.1\.attention") as error:
        check_model(model, SAMPLE, 40, split=True)
    assert "call dropout as torch.nn.functional.dropout or nn.Dropout" in str(error.value)
    assert model.training
    model.layers[1].eval()
    check_model(model, SAMPLE, 40, split=True)


@pytest.mark.parametrize(
    "noise",
    [
        nn.Dropout(0.5),
        lambda x: functional.dropout(x, 0.5),
        lambda x: functional.dropout1d(x, 0.5),
        # a layer is skipped in all passes of a step or in none
        lambda x: x * torch.rand(()).round(),
    ],
)
def test_what_draws_by_token_or_by_step_passes(noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check_model(changed(lambda inner: Noisy(inner, noise)), SAMPLE, 40, split=True)


def test_full_attention_and_linear_attention_pass() -> None:
    class Linear(Attention):
        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
            q, k, v = self.qkv(x).view(1, x.shape[1], -1, self.dim).transpose(1, 2).split([4, 2, 2], 1)
            mixed = hm.linear_attention(q[:, :2].sigmoid(), k.sigmoid(), v, decay=(0.9, 1.0))
            mixed = torch.cat([mixed, hm.attention(q, k, v, causal=False)[:, :2]], 1)
            return self.out(mixed.transpose(1, 2).reshape(1, x.shape[1], -1))

    def change(model: Llama) -> None:
        for layer in model.layers:
            layer.attention = Linear(TINY)

    check_model(make(change), SAMPLE, 40, split=True)
