"""What ranks hold, by kind, and published figures."""

from dataclasses import replace

import pytest

from heteromesh.planner.model.spec import MODELS
from heteromesh.planner.ownership.memory import (
    BUCKETS_BYTES,
    FP32,
    MIXED,
    TokenBytes,
    replicated_memory,
    replicated_tokens,
    sharded_memory,
    sharded_tokens,
)

GIB = 2**30
LLAMA = MODELS["llama-3-8b"]


def test_parameters_are_layers_and_what_is_outside():
    for model in MODELS.values():
        assert model.parameters() == model.layers * model.layer_parameters + model.outer_parameters
        assert model.outer_parameters == replace(model, layers=0).parameters()


def test_the_trainer_holds_sixteen_bytes_a_parameter():
    count = LLAMA.parameters()
    whole = replicated_memory(LLAMA, device_bytes=80e9, optimizer=1.0)
    assert whole.total == pytest.approx(16 * count + 8e9 + BUCKETS_BYTES)
    assert (whole.weights, whole.gradients, whole.masters, whole.moments) == (4 * count, 4 * count, 0, 8 * count)
    eighth = replicated_memory(LLAMA, device_bytes=80e9, optimizer=1 / 8)
    assert whole.total - eighth.total == pytest.approx(7 * count)
    assert replicated_memory(LLAMA, device_bytes=0, optimizer=1.0, precision=MIXED).total > whole.total - 8e9


def test_sharded_weights_of_all_ranks_are_one_copy_and_what_every_rank_has():
    shares = [0.4, 0.3, 0.2, 0.1, 0.0]
    held = [sharded_memory(LLAMA, device_bytes=0, fraction=f) for f in shares]
    outer, inside = LLAMA.outer_parameters, LLAMA.layers * LLAMA.layer_parameters
    assert sum(m.weights for m in held) == pytest.approx(2 * (inside + 5 * outer))
    assert sum(m.gradients for m in held) == pytest.approx(4 * (inside + 5 * outer))
    assert sum(m.masters + m.moments for m in held) == pytest.approx(12 * (inside + outer))
    # two gathered layers and a layer's gradient, and one more gradient under way
    assert held[0].gather_buffers == 8 * LLAMA.layer_parameters
    assert held[0].collective_buffers == 4 * LLAMA.layer_parameters


def test_resident_layers_hold_the_owned_range_too():
    whole = sharded_memory(LLAMA, device_bytes=0, fraction=0.25, resident=LLAMA.layers)
    assert whole.weights == 2 * LLAMA.parameters()
    assert whole.gather_buffers == 4 * LLAMA.layer_parameters, "nothing is gathered"
    half = sharded_memory(LLAMA, device_bytes=0, fraction=0.25, resident=LLAMA.layers // 2)
    inside = LLAMA.layers * LLAMA.layer_parameters
    assert half.weights == pytest.approx(2 * (0.5 * inside + 0.5 * 0.25 * inside + LLAMA.outer_parameters))


def test_a_holder_has_its_range_and_nothing_else():
    held = sharded_memory(LLAMA, device_bytes=100e9, fraction=0.1, works=False)
    assert held.total == pytest.approx(18 * 0.1 * LLAMA.parameters() + 10e9)
    away = sharded_memory(LLAMA, device_bytes=100e9, fraction=0.1, works=False, host_share=1.0)
    assert held.total - away.total == pytest.approx(12 * 0.1 * LLAMA.parameters())


def test_tokens_of_a_pass_and_of_a_step():
    memory = TokenBytes(per_pass=10, per_step=3).added(
        replicated_memory(LLAMA, device_bytes=0, optimizer=0.0), of_pass=7, of_step=20
    )
    assert (memory.activations, memory.layer_inputs) == (70, 60)
    assert memory.total - memory.states == 130
    inputs = sharded_tokens(LLAMA).per_step
    assert inputs == 33 * 2 * 4096
    assert sharded_tokens(LLAMA, inputs_on_host=True).per_step < inputs / 10


def selective_bytes(model):
    """Per token and layer where every second matrix product is computed again (torchtitan's selective checkpointing):
    the layer's input, attention's output, and the products of query, value, gate and down.
    """
    heads, kv = 2 * model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    return 2 * model.hidden + heads + (heads + kv + 2 * model.intermediate + 2 * model.hidden)


@pytest.mark.parametrize(
    ("ranks", "tokens", "selective", "published"),
    [
        (8, 2 * 8192, True, 82.4),
        (128, 2 * 8192, True, 67.0),
        (8, 2 * 8192, True, 77.0),  # compiled
        (128, 2 * 8192, True, 62.0),  # compiled
        (8, 32_768, False, 83.9),  # compiled, float8; all layers computed again
    ],
)
def test_published_memory_of_fsdp_runs(ranks, tokens, selective, published):
    # torchtitan, benchmarks/llama3_h100_202412: Llama 3.1 8B on H100 with FSDP2, GiB reserved by the allocator
    states = sharded_memory(LLAMA, device_bytes=0, fraction=1 / ranks).total
    per_token = replicated_tokens(LLAMA, checkpointing=True).per_pass
    if selective:
        per_token = LLAMA.layers * selective_bytes(LLAMA) + LLAMA.loss_bytes
    assert (states + tokens * per_token) / GIB == pytest.approx(published, rel=0.1)


def test_precisions():
    assert (FP32.state, MIXED.state) == (8, 12)
