"""Randomness that does not depend on the plan: dropouts drawn by token, structure by seed and step."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from mesh import everywhere, mesh
from torch import nn

import heteromesh as hm
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.parallel.model.counter import LEVELS, drawn_below, key_of, token_keys
from heteromesh.parallel.model.draws import TokenPlaces, token_places
from heteromesh.parallel.model.randomness import PassRandomness
from heteromesh.planner.plan import Pass
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader
from instances import random_costs, random_lengths, random_step
from llama import Block, Llama
from ranks import World, run_ranks
from steps import TINY

SEED, NUMBER = 5, 3


class Dropping(Block):
    """A block with two calls of one dropout, a functional one by element and one by channel."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), cos, sin))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        up = functional.dropout1d(up, 0.2, training=self.training)
        x = x + self.drop(self.down(functional.silu(gate) * up))
        return functional.dropout(x, p=0.1, training=self.training)


class Model(Llama):
    """With an embedding dropout, layers skipped at random in three ways, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.layers = nn.ModuleList(Dropping() for _ in range(4))
        self.first, self.last = nn.Dropout(0.2), nn.AlphaDropout(0.1)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        cos, sin = self._rope(position_ids)
        x = self.first(self.embed(input_ids))
        for layer in (*self.layers, self.layers[0]):
            chance = torch.rand([]) + random.random() + np.random.rand()
            if not self.training or chance > 1.0:
                x = layer(x, cos, sin)
        return self.head(self.last(self.norm(x)))


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(1)
    return Model().to(dtype)


def alone(model: nn.Module, data: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of each sequence by itself in one process: no pack, no executor."""
    model.zero_grad()
    randomness, total = PassRandomness(model), 0.0
    valid = sum(len(s) - 1 for s in data)
    for place, tokens in enumerate(data):
        plan = Pass(ranks=(0,), method="local", sequences=(0,), shards=((len(tokens),),), seconds=0.0)
        context = prepare_pass(plan, [len(tokens)], World(), (1.0,))
        places = token_places(context.layout.segments[0], [place], torch.device("cpu"))
        with randomness.during(SEED, NUMBER, places), context.active():
            logits = output(model, tokens[None])[0, :-1]
            loss = functional.cross_entropy(logits.float(), tokens[1:], reduction="sum") / valid
            loss.backward()
        total += float(loss.detach())
    randomness.close()
    return total, [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def output(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    result: Any = model(tokens)
    return result if isinstance(result, torch.Tensor) else result.logits


def check(world: World, make: Any, cases: int, recompute: bool) -> None:
    torch.manual_seed(world.rank)
    for case in range(cases):
        rng = random.Random(10 * world.size + case)
        model, costs = make(), random_costs(rng, world.size)
        lengths = random_lengths(rng, sum(costs.capacity) // 3)
        step = random_step(rng, lengths, world.size)
        data = [torch.randint(TINY.vocab, (n,), generator=torch.Generator().manual_seed(case)) for n in lengths]
        loss, gradients = alone(model, data)
        before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
        executor = StepExecutor(model, world, seed=SEED, checkpoint_activations=recompute)
        for _ in range(2):  # what ran before changes nothing
            inputs = Reader(data).step_inputs(step, range(len(data)), world.rank)
            result = executor.run(step, inputs, number=NUMBER)
            assert result.loss == pytest.approx(loss, rel=1e-5)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                assert float((grad - gradient).abs().max()) <= 3e-5 * (float(gradient.abs().max()) + 1e-30)
        assert result.loss != pytest.approx(executor.run(step, inputs, number=NUMBER + 1).loss, rel=1e-5)
        executor.close()
        assert before[0] == random.getstate()
        assert torch.equal(before[1], torch.get_rng_state())
        assert (before[2] == np.random.get_state()[1]).all(), "the user's own generators go on where they were"


def make_transformer() -> nn.Module:
    import transformers

    from heteromesh.parallel.transformers import register

    register()
    torch.manual_seed(0)
    sizes = {"vocab_size": TINY.vocab, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    dropouts = {"attn_pdrop": 0.0, "resid_pdrop": 0.3, "embd_pdrop": 0.2, "initializer_range": 0.3}
    config = transformers.GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="heteromesh")
    return model.train()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_plan_draws_what_each_sequence_alone_draws(ranks: int, recompute: bool) -> None:
    run_ranks(ranks, check, make_model, 2, recompute)


def test_unmodified_transformers_model() -> None:
    run_ranks(2, check, make_transformer, 2, True)


def first_losses(world: World, folder: Path) -> tuple[float, ...]:
    data = [[random.Random(i).randrange(TINY.vocab) for _ in range(2 + (i * 37) % 90)] for i in range(60)]
    settings = hm.TrainerConfig(batch_tokens=220, max_steps=4, run_dir=folder, plan_seconds=0.02)
    return hm.Trainer(make_model(), None, [torch.tensor(s) for s in data], settings).fit().losses


def test_the_trainer_has_one_curve_on_any_number_of_ranks(tmp_path: Path) -> None:
    curves = [run_ranks(ranks, first_losses, tmp_path / str(ranks))[0] for ranks in (1, 2, 3)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


class Skipping(Llama):
    """Skips a layer that only its rank knows."""

    def __init__(self, skipped: int) -> None:
        super().__init__(TINY)
        self.layers = nn.ModuleList(Block(TINY) for _ in range(3))
        self.skipped = skipped

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        assert position_ids is not None
        cos, sin = self._rope(position_ids)
        x = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            if index != self.skipped:
                x = layer(x, cos, sin)
        return self.head(self.norm(x))


def skip(world: World, skipped: tuple[int, ...]) -> str:
    try:
        return skip_and_fail(world, skipped)
    except UserError as error:
        return str(error)
    except RuntimeError as error:
        return "a peer has ended" if "lost rank" in str(error) else repr(error)


def skip_and_fail(world: World, skipped: tuple[int, ...], method: str = "gather") -> str:
    ranks, length = tuple(range(world.size)), 12 * world.size
    plan = Pass(ranks=ranks, method=method, sequences=(0,), shards=((12,),) * world.size, seconds=0.0)
    context = prepare_pass(plan, [length], world, (1.0,) * world.size)
    batch = Reader([torch.arange(length)]).pass_input(context.layout, [0], world.rank)
    torch.manual_seed(0)
    executor = StepExecutor(Skipping(skipped[world.rank]), world)
    executor.forward_backward(context, batch, 1)
    return "" if executor.model.embed.weight.grad is not None else "no gradient"


def test_ranks_that_skip_different_layers_are_told() -> None:
    assert run_ranks(2, skip, (1, 1)) == ["", ""]
    for message in run_ranks(2, skip, (0, 1)):
        assert message.startswith("rank 0 of a pass called attention 2 times and rank 1 2 times, or of other layers")


@pytest.mark.parametrize(
    ("skipped", "method"),
    [((1, -1), "gather"), ((-1, 1), "ring"), ((-1, -1, 2), "ulysses"), ((0, -1, -1), "ring"), ((-1, 0, 0), "gather")],
)
def test_ranks_that_call_attention_more_often_than_others_are_told(skipped: tuple[int, ...], method: str) -> None:
    with pytest.raises(AssertionError) as failed:
        run_ranks(len(skipped), skip_and_fail, skipped, method)
    ends = re.findall(r"^(?:\w+\.)*(\w+): (.*)", str(failed.value), re.MULTILINE)
    assert ends
    assert any("has ended the forward of a pass that others are still in: layers must be" in what for _, what in ends)
    # who only waited for a rank that has been told sees it end
    assert {kind for kind, _ in ends} <= {"UserError", "RuntimeError", "DistBackendError"}, failed.value
    assert "exit code" not in str(failed.value)


@pytest.mark.parametrize("skipped", [(1, -1), (-1, 0)])
def test_members_that_call_attention_more_often_are_told_and_do_not_try_again(skipped: tuple[int, ...]) -> None:
    with mesh(2) as (transports, pool):
        worlds = [World(rank=t.rank, size=2, exchange=t) for t in transports]
        told = everywhere(pool, lambda world: skip(world, skipped), worlds)
    assert any("the ranks of a pass don't wait for the same messages" in sentence for sentence in told)
    assert all("don't wait for" in sentence or sentence == "a peer has ended" for sentence in told)


def test_a_graph_that_was_traced_outside_of_passes_draws_by_token_inside() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for count in (3, 5):
        compiled(torch.randn(1, count, 4)).sum().backward()
    x, places = torch.randn(1, 9, 4), TokenPlaces(torch.zeros(9, dtype=torch.long), torch.arange(9))
    drawn = []
    for form in (model, compiled):
        with PassRandomness(nn.Identity()).during(1, 1, places):
            drawn.append(form(x))
    assert torch.equal(drawn[0], drawn[1])
    assert 0 < int((drawn[0] == 0).sum()) < 36


def test_split_sequences_in_half_precision_draw_the_same_masks() -> None:
    def mask(start: int, end: int) -> torch.Tensor:
        places = TokenPlaces(torch.zeros(end - start, dtype=torch.long), torch.arange(start, end))
        with PassRandomness(nn.Identity()).during(1, 1, places), torch.autocast("cpu", torch.bfloat16):
            return functional.dropout(torch.ones(1, end - start, 24, dtype=torch.bfloat16), 0.5)

    whole = mask(0, 20)
    assert whole.dtype == torch.bfloat16
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(whole, torch.cat([mask(0, 7), mask(7, 20)], 1))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93, 1e-4])
def test_masks_have_the_wanted_share_and_are_independent(p: float) -> None:
    tokens, width = 2000, 512
    level = round(p * LEVELS)
    keys = token_keys(key_of(1, 2), torch.arange(tokens) // 100, torch.arange(tokens) % 100)
    draws = torch.stack([drawn_below(level, keys, key_of(i), width) for i in range(3)]).double()
    share, count = level / LEVELS, draws.numel()
    assert abs(float(draws.mean()) - share) < 5 * (share * (1 - share) / count) ** 0.5
    for axis in (0, 1, 2):  # over calls, tokens and elements alike
        others = [a for a in range(3) if a != axis]
        sizes = count / draws.shape[axis]
        if sizes * min(share, 1 - share) < 30:
            continue  # too few for a normal law
        deviation = (draws.mean(others) - share) / (share * (1 - share) / sizes) ** 0.5
        assert float(deviation.abs().max()) < 6
    centred = (draws - share) / (share * (1 - share)) ** 0.5
    pairs = [centred[0] * centred[1], centred[:, 1:] * centred[:, :-1], centred[:, 100:] * centred[:, :-100]]
    pairs += [centred[..., lag:] * centred[..., :-lag] for lag in (1, 2, 3, 4, 8)]
    pairs += [centred[:, 1:, 1:] * centred[:, :-1, :-1], (centred[:, 1:, 4:] * centred[:, :-1, :-4])]
    for product in pairs:
        assert abs(float(product.mean())) < 5 / product.numel() ** 0.5


def test_words_are_uniform_in_every_lane() -> None:
    keys = token_keys(7, torch.zeros(4000, dtype=torch.long), torch.arange(4000))
    for parts in (4, 64):
        counts = torch.stack([drawn_below(LEVELS * i // parts, keys, 3, 64).sum(0) for i in range(1, parts)])
        counts = torch.diff(counts, dim=0, prepend=torch.zeros(1, 64, dtype=torch.long)).double()
        expected = 4000 / parts
        chi = float(((counts - expected) ** 2 / expected).sum()) / counts.numel()
        assert chi == pytest.approx(1 - 1 / parts, abs=0.35 if parts == 4 else 0.1)


@pytest.mark.parametrize(
    "shape", [(1, 6, 8), (6, 8), (1, 6), (1, 6, 2, 4), (1, 2, 6, 4), (1, 1, 6, 4), (6, 6), (1, 6, 6)]
)
def test_shapes_whose_tokens_are_found(shape: tuple[int, ...]) -> None:
    axis = 2 if shape in ((1, 2, 6, 4), (1, 1, 6, 4)) else 1 if shape[0] == 1 else 0
    places = TokenPlaces(torch.zeros(6, dtype=torch.long), torch.arange(6))
    with PassRandomness(nn.Identity()).during(1, 1, places):
        whole = functional.dropout(torch.ones(shape), 0.5)
    part = TokenPlaces(places.sequences[2:5], places.positions[2:5])
    # as many features as tokens are no reason to refuse
    with PassRandomness(nn.Identity()).during(1, 1, places):
        functional.dropout(torch.ones(6, 6), 0.5)
        functional.dropout(torch.ones(1, 6, 6), 0.5)
    with PassRandomness(nn.Identity()).during(1, 1, part):
        assert torch.equal(functional.dropout(torch.ones(shape).narrow(axis, 2, 3), 0.5), whole.narrow(axis, 2, 3))


@pytest.mark.parametrize("shape", [(1, 4, 6, 6), (24, 6), (4, 6, 6), (1, 8, 6), (1, 6, 6, 8), (), (8,)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    places = TokenPlaces(torch.zeros(6, dtype=torch.long), torch.arange(6))
    with PassRandomness(nn.Identity()).during(1, 1, places):
        x = torch.ones(shape)
        assert functional.dropout(x, 0.0) is not None
        assert torch.equal(functional.dropout(x, 0.5, training=False), x)
        assert not functional.dropout(x, 1.0).any()
        with pytest.raises(UserError, match=r"in a pass of 6 tokens.*can't be drawn by token.*attention_dropout=0"):
            functional.dropout(x, 0.5)


def test_dropout_inside_attention_is_refused() -> None:
    places = TokenPlaces(torch.zeros(6, dtype=torch.long), torch.arange(6))
    q = torch.ones(1, 2, 6, 4)
    with PassRandomness(nn.Identity()).during(1, 1, places):
        functional.scaled_dot_product_attention(q, q, q)
        with pytest.raises(UserError, match=r"dropout_p 0.1 in a pass"):
            functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
        with pytest.raises(UserError, match=r"can't be drawn by token"):
            nn.MultiheadAttention(8, 2, dropout=0.1)(*[torch.ones(6, 1, 8)] * 3)
    assert functional.dropout.__module__ == "torch.nn.functional"
    assert not hasattr(functional.dropout, "__wrapped__")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Dropout, (1, 5000, 16)),
        (nn.Dropout1d, (5000, 16, 3)),
        (nn.Dropout1d, (5000, 16)),
        (nn.Dropout2d, (1, 5000, 4, 4)),
        (nn.Dropout3d, (5000, 4, 2, 2)),
        (nn.AlphaDropout, (1, 5000, 16)),
        (nn.FeatureAlphaDropout, (1, 5000, 16)),
    ],
)
def test_every_dropout_has_the_law_of_torchs(module: Any, shape: tuple[int, ...], inplace: bool) -> None:
    torch.manual_seed(0)
    drop, x = module(0.25, inplace=inplace), torch.randn(shape)
    plain = drop(given := x.clone())
    inplace = plain is given  # an AlphaDropout never is
    with PassRandomness(nn.Identity()).during(1, 1, TokenPlaces(torch.arange(5000) % 7, torch.arange(5000))):
        given = x.clone()
        ours = drop(given)
    assert (ours is given) == inplace
    assert not torch.equal(ours, plain)
    for values in (ours, plain):
        # what is dropped has one value
        dropped = (values - plain.new_tensor(float(plain.median()))).abs() * 0 + (
            values == values.flatten().mode().values
        )
        assert float(dropped.mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(ours.mean(), plain.mean(), rtol=0, atol=0.03)
    torch.testing.assert_close(ours.std(), plain.std(), rtol=0.05, atol=0)
    kept_ours = ours != ours.flatten().mode().values
    kept_plain = plain != plain.flatten().mode().values
    both = kept_ours & kept_plain
    torch.testing.assert_close(ours[both], plain[both], rtol=1e-4, atol=1e-5)
    channels = {nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3, nn.FeatureAlphaDropout: 1}.get(module, 0)
    if channels:
        flat = kept_ours.flatten(len(shape) - channels)
        assert torch.equal(flat.all(-1), flat.any(-1))


def test_gradients_are_those_of_a_fixed_mask() -> None:
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    places = TokenPlaces(torch.zeros(6, dtype=torch.long), torch.arange(6))

    def run(x: torch.Tensor) -> torch.Tensor:
        with PassRandomness(nn.Identity()).during(1, 1, places):
            return functional.alpha_dropout(functional.dropout(x * 1.0, 0.3, inplace=True), 0.2, training=True)

    assert torch.autograd.gradcheck(run, (x,))


def test_a_stage_leaves_the_dropouts_of_others_alone() -> None:
    model, x = nn.Module(), torch.ones(1, 6, 8)
    model.layers = nn.ModuleList([nn.Dropout(0.5), nn.Dropout(0.5)])
    places = TokenPlaces(torch.zeros(6, dtype=torch.long), torch.arange(6))

    def run(follows: str | None, ends: bool) -> list[torch.Tensor]:
        randomness = PassRandomness(model, follows=follows, ends=ends)
        with randomness.during(1, 1, places):
            outputs = [functional.dropout(x, 0.5)]
            for layer in model.layers:
                outputs += [layer(x), functional.dropout(x, 0.5)]
        randomness.close()
        return outputs

    whole, middle = run(None, True), run("layers.-1", False)
    assert torch.equal(middle[0], x)
    assert torch.equal(middle[4], x)
    for i in (1, 2, 3):
        assert torch.equal(middle[i], whole[i])
        assert not torch.equal(middle[i], x)
    assert len({tuple(t.flatten().tolist()) for t in whole}) == 5, "every call draws its own"
