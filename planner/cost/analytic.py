"""Costs from data sheets and the model's shape, where nothing was measured. Good to tens of percent, not better.

Assumptions, all in one place:
- backward takes twice forward's operations; recomputing (checkpointing) adds one forward;
- matrices reach 0.65 and causal attention 0.45 of the dense peak. FlexSP's profile of GPT-7B on A100 (arXiv 2412.01523)
  comes to 0.70 and 0.49, of GPT-13B and 30B to 0.77-0.81 and 0.42-0.50;
- a pass costs at least the reading and writing of weights and gradients (8 bytes a parameter) and its kernel launches;
- memory is as planner/ownership/memory.py says: fp32 weights, gradients and Adam's moments (Trainer), or 16-bit weights
  with fp32 masters where weights are sharded; nine tenths of a device's memory can be used, and what the states leave
  holds activations;
- an Adam update reads and writes 28 bytes a parameter;
- a layer whose queries see a window of w keys takes the time of w keys for every token, also in shorter sequences;
- gradients are summed by the reduction that the runtime picks, and hide as planner/cost/overlap.py says;
- a further tile of attention costs its kernel launches, a round of messages its latency;
- activations travel to host memory over PCIe 4 x16, except on devices whose memory is the host's (`cpu`).
"""

from __future__ import annotations

from collections.abc import Sequence

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.cost.overlap import StepTraffic
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.attention import AttentionShape, ModelAttention, split_methods
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.planner.ownership.memory import USABLE, replicated_memory, replicated_tokens, sharded_tokens

CPU = "cpu"
"""The device whose memory is the host's."""
LINEAR_UTILISATION = 0.65
ATTENTION_UTILISATION = 0.45
PASS_BYTES = 8
"""Per parameter, read and written by every pass whatever its length."""
LAUNCHES_PER_LAYER = 40
LAUNCH_SECONDS = 5e-6
LAUNCHES_PER_TILE = 3
ROUND_SECONDS = 30e-6
HOST_BYTES_PER_SECOND = 20e9
"""Each way, per device: what a PCIe 4 x16 link sustains."""


def analytic_costs(
    cluster: Cluster,
    model: ModelSpec,
    *,
    checkpointing: bool = False,
    capacity: Sequence[int] | None = None,
    traffic: StepTraffic | None = None,
    seconds_per_step: float = 0.0,
) -> Costs:
    """Returns the cost model of `model` on `cluster`.

    Args:
        cluster: whose ranks all take part.
        model: that is trained.
        checkpointing: whether backward repeats the forward.
        capacity: per rank, tokens that fit a pass. None: what replicated weights with an evenly sharded optimizer
            leave; raises UserError where that is nothing.
        traffic: of weights and gradients; None: none. Layer-major steps keep their activations on the device.
        seconds_per_step: the optimizer's.
    """
    reference = cluster.fastest_device
    forwards = 4 if checkpointing else 3
    peak = reference.tflops * 1e12
    attention = model_attention(model, checkpointing=checkpointing)
    traffic = traffic or StepTraffic()
    tokens = sharded_tokens(model) if traffic.layer_major else replicated_tokens(model, checkpointing=checkpointing)
    saved = tokens.per_pass
    names = [cluster.device_name(rank) for rank in range(cluster.ranks)]
    movable = not traffic.layer_major and set(names) != {CPU}
    # the loss's part of a token's memory is there at one moment only: nothing of it can wait elsewhere
    moved = model.layers * (model.layer_input_bytes if checkpointing else model.layer_activation_bytes)
    weights = PASS_BYTES * model.parameters() / (reference.memory_gbps * 1e9)
    return Costs(
        seconds_per_token2=forwards * model.flops_per_token2() / (peak * ATTENTION_UTILISATION),
        seconds_per_token=forwards * model.flops_per_token() / (peak * LINEAR_UTILISATION)
        + forwards * model.local_flops_per_token() / (peak * ATTENTION_UTILISATION),
        seconds_per_pass=weights + model.layers * LAUNCHES_PER_LAYER * LAUNCH_SECONDS,
        seconds_per_round=ROUND_SECONDS,
        seconds_per_tile=LAUNCHES_PER_TILE * LAUNCH_SECONDS,
        seconds_per_step=seconds_per_step,
        traffic=traffic,
        speeds=cluster.speeds(),
        capacity=tuple(capacity) if capacity is not None else _capacity(cluster, model, checkpointing),
        methods=split_methods(attention, cluster.rank_hosts, saved),
        rate=cluster_links(cluster),
        hosts=cluster.rank_hosts,
        attention=attention,
        offload_seconds=tuple(0.0 if name == CPU else moved / HOST_BYTES_PER_SECOND for name in names),
        offload_share=max(0.0, 1 - 2 / model.layers) * moved / saved if movable else 0.0,
    )


def model_attention(model: ModelSpec, *, checkpointing: bool = False) -> ModelAttention:
    """Returns the model's attention in bf16."""
    shape = AttentionShape(heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, itemsize=2)
    return ModelAttention(calls=model.layers, shape=shape, forwards=2 if checkpointing else 1, local=model.local)


def _capacity(cluster: Cluster, model: ModelSpec, checkpointing: bool) -> tuple[int, ...]:
    per_token = replicated_tokens(model, checkpointing=checkpointing).per_pass
    capacity = []
    for rank in range(cluster.ranks):
        size = cluster.device_of(rank).memory_gb * 1e9
        states = replicated_memory(model, device_bytes=size, optimizer=1 / cluster.ranks).total
        if size < states + per_token:
            taken = states - (1 - USABLE) * size
            raise UserError(
                f"model {model.name} does not fit on rank {rank} ({cluster.device_name(rank)}): weights, gradients and "
                f"optimizer state take {taken / 1e9:.1f} GB and {USABLE * size / 1e9:.1f} GB can be used: take devices "
                "with more memory, a smaller model, or shard the weights"
            )
        capacity.append(int((size - states) // per_token))
    return tuple(capacity)
