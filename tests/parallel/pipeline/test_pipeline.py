"""Pipeline stages of unequal layers under 1F1B: the same mathematics as one process, whatever the cut."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from stages import StagedSteps, simple
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.pipeline.cut import cut
from heteromesh.parallel.pipeline.engine import StageRunner
from heteromesh.parallel.pipeline.packs import pack_step
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.stages.stages import Placement, Stage
from heteromesh.runtime.work.reader import Reader
from instances import random_lengths
from llama import Llama, LlamaConfig
from ranks import World, run_ranks
from steps import TINY, reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LAYERS = 6
DEEP = replace(TINY, layers=LAYERS)


def random_placement(rng: random.Random, stages: int, replicas: int) -> Placement:
    """Any cut of the layers (also stages of one layer), ranks in any order, unequal numbers of micro-batches."""
    cuts = [0, *sorted(rng.sample(range(1, LAYERS), stages - 1)), LAYERS]
    ranks = rng.sample(range(stages * replicas), stages * replicas)
    return Placement(
        stages=tuple(
            Stage(ranks=tuple(ranks[s * replicas : (s + 1) * replicas]), layers=cuts[s + 1] - cuts[s])
            for s in range(stages)
        ),
        micro_batches=tuple(rng.choice([1, 2, 3, 7]) for _ in range(replicas)),
    )


def check_cuts(world: World, shapes: list[tuple[int, int]], dtype: torch.dtype, cases: int, recompute: bool) -> None:
    """Random cuts, batches and packs; raises AssertionError where one differs from the reference."""
    for stages, replicas in shapes:
        for case in range(cases):
            rng = random.Random(f"{stages} {replicas} {case}")
            torch.manual_seed(case)
            model = Llama(DEEP).to(dtype)
            placement = random_placement(rng, stages, replicas)
            if case == 3:  # nothing to train in the first stage
                for part in (model.embed, *model.layers[: placement.stages[0].layers]):
                    part.requires_grad_(stages == 1)
            executor = StagedSteps(model, world, placement, checkpoint_activations=recompute)
            for _ in range(2):  # the second time with other numbers of tokens and micro-batches
                lengths = random_lengths(rng, 60)
                step = pack_step(lengths, placement, sum(lengths), pairs_per_token=rng.choice([0.0, 0.1]))
                check_step(world, executor, model, step, dtype)
            executor.close()


def check_step(world: World, executor: StagedSteps, model: Llama, step: Step, dtype: torch.dtype) -> None:
    data = [torch.randint(TINY.vocab, (n,)) for n in step.batch]
    loss, gradients = reference(model, data)
    norm = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
    expected = dict(zip(dict(model.named_parameters()), gradients, strict=True))
    inputs = Reader(data).step_inputs(step, range(len(data)), executor.entry)
    result = executor.run(step, inputs)
    assert result.loss == pytest.approx(loss, rel=TOLERANCE[dtype])
    assert result.valid_tokens == sum(n - 1 for n in step.batch)
    assert len(result.busy_seconds) == world.size
    assert all(0 <= busy <= result.seconds for busy in result.busy_seconds)
    assert result.norm == pytest.approx(norm, rel=10 * TOLERANCE[dtype])
    own = dict(executor.model.named_parameters())
    assert own
    for name, parameter in own.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = float(expected[name].abs().max()) + 1e-30
        assert float((gradient - expected[name]).abs().max()) <= 3 * TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize(
    ("ranks", "shapes"), [(1, [(1, 1)]), (2, [(2, 1), (1, 2)]), (3, [(3, 1)]), (4, [(2, 2), (4, 1)])]
)
def test_any_cut_equals_one_process_in_double(ranks: int, shapes: list[tuple[int, int]]) -> None:
    run_ranks(ranks, check_cuts, shapes, torch.float64, 4, False)


def test_any_cut_equals_one_process_in_single() -> None:
    run_ranks(3, check_cuts, [(3, 1)], torch.float32, 4, False)


def test_recomputed_layers_change_nothing() -> None:
    """Other micro-batches have gone forward when a layer is recomputed: it must attend as its own says."""
    run_ranks(2, check_cuts, [(2, 1)], torch.float64, 4, True)


def train(world: World, placement: Placement, tied: bool) -> tuple[int, int, list[float], dict[str, np.ndarray]]:
    torch.manual_seed(3)
    model = Llama(DEEP).double()
    if tied:
        model.head.weight = model.embed.weight
    data = [torch.randint(TINY.vocab, (n,)) for n in (31, 7, 12, 1, 22, 5)]
    executor = StagedSteps(model, world, placement, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for _ in range(5):
        step = pack_step([len(s) for s in data], placement, 64)
        inputs = Reader(data).step_inputs(step, range(len(data)), executor.entry)
        losses.append(executor.run(step, inputs, limit=0.5).loss)
        executor.owner.update()
    executor.close()
    return executor.stage, executor.entry, losses, {k: v.numpy() for k, v in executor.model.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
def test_training_ends_where_one_process_ends(tied: bool) -> None:
    """Also that the replicas of a stage keep the same bits, and that the stages' parameters make up the model."""
    _, _, losses, whole = run_ranks(1, train, simple(LAYERS, micro_batches=3), tied)[0]
    assert losses[-1] < losses[0]
    results = run_ranks(4, train, simple(1, 5, replicas=2), tied)
    merged: dict[str, np.ndarray] = {}
    for stage, pipeline, got, parameters in results:
        assert got == pytest.approx(losses, rel=1e-10)
        twin = next(p for s, other, _, p in results if s == stage and other != pipeline)
        assert all(np.array_equal(parameters[name], twin[name]) for name in parameters)
        merged.update(parameters)
    assert set(merged) == set(whole)
    assert all(np.allclose(merged[name], whole[name], rtol=1e-8, atol=1e-10) for name in whole)
    if tied:
        assert np.array_equal(merged["head.weight"], merged["embed.weight"])


def run_each_transformers(world: World, placement: Placement) -> dict[str, float]:
    return {name: run_transformers(world, placement, name) for name in ("Llama", "Qwen3")}


def run_transformers(world: World, placement: Placement, name: str) -> float:
    """Relative difference of loss and of this stage's gradients to one process without a pipeline."""
    import transformers

    from heteromesh.parallel.transformers import register

    register()
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, tie_word_embeddings=name == "Qwen3")
    config._attn_implementation = "heteromesh"
    model = getattr(transformers, f"{name}ForCausalLM")(config).double()
    data = [torch.randint(61, (n,)) for n in (9, 4, 17)]
    valid = sum(len(s) - 1 for s in data)
    total = 0.0
    for tokens in data:
        logits = model(tokens[None]).logits[0, :-1]
        loss = functional.cross_entropy(logits, tokens[1:], reduction="sum") / valid
        loss.backward()
        total += float(loss.detach())
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    executor = StagedSteps(model, world, placement)
    step = pack_step([len(s) for s in data], placement, 20)
    result = executor.run(step, Reader(data).step_inputs(step, range(3), executor.entry))
    worst = abs(result.loss - total) / total
    for parameter_name, parameter in executor.model.named_parameters():
        like = expected[parameter_name if parameter_name in expected else "model.embed_tokens.weight"]
        worst = max(worst, float((parameter.grad - like).abs().max() / like.abs().max()))
    executor.close()
    return worst


def test_transformers_models_can_be_cut() -> None:
    for errors in run_ranks(2, run_each_transformers, simple(2, 1)):
        assert all(error < 1e-10 for error in errors.values()), errors


def run_with_nan(world: World) -> tuple[float, tuple[int, ...]]:
    torch.manual_seed(0)
    model = Llama(DEEP)
    data = [torch.randint(1, TINY.vocab, (n,)) for n in (9, 4, 17, 6)]
    data[2][3] = 0
    with torch.no_grad():
        model.embed.weight[0] = float("nan")
    placement = simple(2, 4)
    executor = StagedSteps(model, world, placement)
    step = pack_step([9, 4, 17, 6], placement, 30)
    result = executor.run(step, Reader(data).step_inputs(step, range(4), 0))
    executor.close()
    return result.loss, tuple(n.sequence for n in result.non_finite)


def test_the_sequence_without_finite_loss_is_named() -> None:
    for loss, sequences in run_ranks(2, run_with_nan):
        assert loss != loss
        assert sequences == (2,)


@pytest.mark.parametrize("points", [[0, 6], [0, 1, 6], [0, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_stages_one_after_the_other_are_the_model(points: list[int]) -> None:
    torch.manual_seed(0)
    model = Llama(DEEP)
    names = set(model.state_dict())
    tokens, positions = torch.randint(TINY.vocab, (2, 9)), torch.arange(9).expand(2, 9)
    x, parts = tokens, []
    for first, last in itertools.pairwise(points):
        stage = cut(model, first, last)
        parts.append(stage.state_dict())
        x = stage(x, position_ids=positions)
    assert torch.equal(x, model(tokens, positions))
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert set(model.state_dict()) == names, "cutting must leave the model alone"


def test_a_stage_loads_its_part_of_a_checkpoint() -> None:
    torch.manual_seed(0)
    saved = Llama(DEEP).state_dict()
    stage = cut(Llama(DEEP), 2, 4)
    missing = stage.load_state_dict(saved, strict=False).missing_keys
    assert missing == []
    assert torch.equal(stage.layers.get_submodule("3").down.weight, saved["layers.3.down.weight"])


def test_packs_hold_every_sequence_once_within_the_budget() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 50) for _ in range(rng.randint(1, 30))]
        counts = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 3)))
        stages = (Stage(ranks=tuple(range(len(counts))), layers=2),)
        placement = Placement(stages=stages, micro_batches=counts)
        budget = max(50, 2 * sum(lengths) // sum(counts) + 50)
        step = pack_step(lengths, placement, budget)
        assert sorted(k for p in step.passes for k in p.sequences) == list(range(len(lengths)))
        assert max(p.tokens(0) for p in step.passes) <= budget
        for pipeline, count in enumerate(counts):
            assert len(step.passes_of(pipeline)) <= count


def test_packs_are_even() -> None:
    lengths = [512, 300, 300, 200, 100, 100] + [30] * 20
    step = pack_step(lengths, simple(1, micro_batches=4), 4096)
    assert [p.tokens(0) for p in step.passes] == pytest.approx([sum(lengths) / 4] * 4, rel=0.05)


class NoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 4), nn.Linear(4, 4)


class Adapter(NoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.adapter = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 4)


class Nameless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.word_table = nn.ModuleList([nn.Linear(4, 4)]), nn.Embedding(4, 4)


class Bare(Adapter):
    def __init__(self) -> None:
        super().__init__()
        del self.adapter
        self.scale = nn.Parameter(torch.ones(1))


def shared_layers() -> nn.Module:
    model = Llama(DEEP)
    model.layers[4] = model.layers[0]
    return model


ONE = World()
LLAMA = Llama(LlamaConfig(**{**vars(TINY), "layers": 3}))
REFUSED = [
    (lambda: StageRunner(LLAMA, ONE, simple(1, 1, 1, 1)), "1 + 1 + 1 + 1 = 4 layers and the model has 3"),
    (lambda: StageRunner(LLAMA, ONE, simple(2)), "2 = 2 layers and the model has 3"),
    (lambda: StageRunner(LLAMA, ONE, simple(1, 2)), "2 ranks, 0 to 1, and the job 1"),
    (lambda: StageRunner(NoLayers(), ONE, simple(1)), "NoLayers has no `layers`"),
    (lambda: StageRunner(Nameless(), ONE, simple(1)), "word_table is neither embedding"),
    (lambda: StageRunner(Adapter(), ONE, simple(2)), "adapter is neither embedding"),
    (lambda: StageRunner(Bare(), ONE, simple(2)), "parameter scale lies beside the layers"),
    (
        lambda: StageRunner(
            LLAMA, ONE, Placement(stages=(Stage(ranks=(0, 1), layers=3, tensor_parallel=2),), micro_batches=(1,))
        ),
        "tensor_parallel 2",
    ),
    (
        lambda: StageRunner(shared_layers(), World(size=3), simple(3, 2, 1)),
        "would be in the pipeline stages [0, 1]",
    ),
    (lambda: cut(LLAMA, 2, 2), "layers 2 to 2 are no part of a model of 3 layers"),
    (lambda: cut(LLAMA, 1, 4), "layers 1 to 4"),
    (lambda: pack_step([5, 90, 3], simple(1), 64), "sequence 1 has 90 tokens and a micro-batch holds 64"),
    (lambda: pack_step([60, 60, 60], simple(1), 64), "180 tokens don't pack into 2 micro-batches of 64"),
    (lambda: pack_step([], simple(1), 64), "lengths []"),
    (lambda: pack_step([3, 0], simple(1), 64), "lengths [3, 0]"),
]


@pytest.mark.parametrize(("act", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_input_is_told_in_one_sentence(act, message: str) -> None:
    with pytest.raises(UserError) as caught:
        act()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pass_of_several_ranks_is_refused() -> None:
    plan = Pass(ranks=(0, 1), method="gather", sequences=(0,), shards=((2,), (2,)), seconds=0.0)
    step = Step(passes=(plan,), seconds=0.0, bound_seconds=0.0, gap=0.0, solve_seconds=0.0, batch=(4,))
    executor = StagedSteps(LLAMA, ONE, simple(3))
    with pytest.raises(UserError, match=r"names \(0, 1\)"):
        executor.run(step, {})
