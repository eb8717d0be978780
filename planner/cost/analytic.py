"""Costs from data sheets and the model's shape, where nothing was measured. Good to tens of percent, not better.

Assumptions, all in one place:
- backward takes twice forward's operations; recomputing (checkpointing) adds one forward;
- matrices reach 0.65 and causal attention 0.45 of the dense peak. FlexSP's profile of GPT-7B on A100 (arXiv 2412.01523)
  comes to 0.70 and 0.49, of GPT-13B and 30B to 0.77-0.81 and 0.42-0.50;
- a pass costs at least the reading and writing of weights and gradients (8 bytes a parameter) and its kernel launches;
- weights and gradients are bf16 on every rank (4 bytes a parameter); fp32 weights and Adam's moments (12 bytes) are
  shared out over all ranks (ZeRO-1);
- a layer whose queries see a window of w keys takes the time of w keys for every token, also in shorter sequences;
- nine tenths of a device's memory can be used; what the states leave holds activations;
- half of the gradient sum hides behind backward;
- a further tile of attention costs its kernel launches, a round of messages its latency;
- activations travel to host memory over PCIe 4 x16, except on devices whose memory is the host's (`cpu`).
"""

from __future__ import annotations

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cluster.links import Links, cluster_links
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.attention import AttentionShape, ModelAttention, split_methods
from heteromesh.planner.model.spec import ModelSpec

CPU = "cpu"
"""The device whose memory is the host's."""
LINEAR_UTILISATION = 0.65
ATTENTION_UTILISATION = 0.45
USABLE_MEMORY = 0.9
REPLICATED_BYTES = 4
SHARDED_BYTES = 12
EXPOSED_GRADIENT_SUM = 0.5
PASS_BYTES = 8
"""Per parameter, read and written by every pass whatever its length."""
ADAM_BYTES = 28
"""Per parameter, read and written by an Adam update in fp32 with bf16 gradients and weights."""
LAUNCHES_PER_LAYER = 40
LAUNCH_SECONDS = 5e-6
LAUNCHES_PER_TILE = 3
ROUND_SECONDS = 30e-6
HOST_BYTES_PER_SECOND = 20e9
"""Each way, per device: what a PCIe 4 x16 link sustains."""


def analytic_costs(cluster: Cluster, model: ModelSpec, *, checkpointing: bool = False) -> Costs:
    """Returns the cost model of `model` on `cluster`; raises UserError where the model leaves no memory for a token."""
    reference = cluster.fastest_device
    forwards = 4 if checkpointing else 3
    peak = reference.tflops * 1e12
    links = cluster_links(cluster)
    attention = model_attention(model, checkpointing=checkpointing)
    saved = model.activation_bytes_per_token(checkpointing=checkpointing)
    names = [cluster.device_name(rank) for rank in range(cluster.ranks)]
    traffic = PASS_BYTES * model.parameters() / (reference.memory_gbps * 1e9)
    return Costs(
        seconds_per_token2=forwards * model.flops_per_token2() / (peak * ATTENTION_UTILISATION),
        seconds_per_token=forwards * model.flops_per_token() / (peak * LINEAR_UTILISATION)
        + forwards * model.local_flops_per_token() / (peak * ATTENTION_UTILISATION),
        seconds_per_pass=traffic + model.layers * LAUNCHES_PER_LAYER * LAUNCH_SECONDS,
        seconds_per_round=ROUND_SECONDS,
        seconds_per_tile=LAUNCHES_PER_TILE * LAUNCH_SECONDS,
        seconds_per_step=_step_seconds(cluster, model, links),
        speeds=cluster.speeds(),
        capacity=_capacity(cluster, model, checkpointing),
        methods=split_methods(attention, cluster.rank_hosts, saved),
        rate=links,
        hosts=cluster.rank_hosts,
        attention=attention,
        offload_seconds=tuple(0.0 if name == CPU else saved / HOST_BYTES_PER_SECOND for name in names),
        offload_share=max(0.0, 1 - 2 / model.layers) if set(names) != {CPU} else 0.0,
    )


def model_attention(model: ModelSpec, *, checkpointing: bool = False) -> ModelAttention:
    """Returns the model's attention in bf16."""
    shape = AttentionShape(heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, itemsize=2)
    return ModelAttention(calls=model.layers, shape=shape, forwards=2 if checkpointing else 1, local=model.local)


def state_bytes(model: ModelSpec, ranks: int) -> int:
    """Returns the bytes of weights, gradients and optimizer state on each rank."""
    return model.parameters() * REPLICATED_BYTES + -(-model.parameters() * SHARDED_BYTES // ranks)


def _capacity(cluster: Cluster, model: ModelSpec, checkpointing: bool) -> tuple[int, ...]:
    states = state_bytes(model, cluster.ranks)
    per_token = model.activation_bytes_per_token(checkpointing=checkpointing)
    capacity = []
    for rank in range(cluster.ranks):
        usable = cluster.device_of(rank).memory_gb * 1e9 * USABLE_MEMORY
        if usable < states + per_token:
            raise UserError(
                f"model {model.name} does not fit on rank {rank} ({cluster.device_name(rank)}): weights, gradients and "
                f"optimizer state take {states / 1e9:.1f} GB and {usable / 1e9:.1f} GB can be used: take devices with "
                "more memory, a smaller model, or measured constants with --cost"
            )
        capacity.append(int((usable - states) // per_token))
    return tuple(capacity)


def _step_seconds(cluster: Cluster, model: ModelSpec, links: Links) -> float:
    ranks = cluster.ranks
    memory = min(cluster.device_of(r).memory_gbps for r in range(ranks)) * 1e9
    reduced = 2 * 2 * model.parameters() * (ranks - 1) / ranks / links.ring_rate()
    return EXPOSED_GRADIENT_SUM * reduced + ADAM_BYTES * model.parameters() / ranks / memory
