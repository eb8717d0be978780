"""What a micro-batch and a step cost before it is known where the layers are. Seconds of a device of speed 1.

From a cost model (`workloads`) or from published numbers (benchmarks/holmes.py). Backward takes twice forward's
operations, so a third of the seconds is forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from heteromesh.errors import UserError
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.model.spec import ModelSpec

FORWARD_SHARE = 1 / 3
"""Of the seconds of forward and backward together."""
GRADIENT_BYTES = 2
"""Per parameter, summed over replicas (bf16)."""
BOUNDARY_BYTES = 2
"""Per element of what a stage hands to the next (bf16)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A global batch cut into equal micro-batches."""

    layers: int
    micro_batches: int
    """The number in a step, over all pipelines."""
    micro_batch_tokens: float
    layer_seconds: float
    """Forward and backward of a micro-batch through one layer, on one device of speed 1."""
    head_seconds: float
    """The same of the output head, on the last stage."""
    boundary_bytes: float
    """What a micro-batch hands from one stage to the next, one way (its gradient comes back)."""
    layer_parameters: int
    embedding_parameters: int
    """The first stage's."""
    head_parameters: int
    """The last stage's (a tied head is held there too and its gradient summed with the first stage's)."""
    layer_activation_bytes: float
    """Kept for backward of a micro-batch, of one layer."""
    head_activation_bytes: float
    gradient_bytes: float = GRADIENT_BYTES

    @cached_property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.embedding_parameters + self.head_parameters

    @property
    def tokens(self) -> float:
        """The tokens of a step."""
        return self.micro_batches * self.micro_batch_tokens

    def stage_parameters(self, layers: int, *, first: bool, last: bool) -> int:
        """Counts the parameters of so many layers, with the embedding on the first stage and the head on the last."""
        ends = self.embedding_parameters * first + self.head_parameters * last
        return layers * self.layer_parameters + ends


def workloads(
    model: ModelSpec, costs: Costs, lengths: Sequence[int], *, checkpointing: bool = False
) -> tuple[Workload, ...]:
    """Returns the batch in micro-batches of about one, two and four times its longest sequence.

    The seconds of a whole batch under `costs` are shared out over layers and head by their operations; a sequence stays
    in one micro-batch, so none is smaller than the longest sequence. Raises UserError for an empty batch.
    """
    if not lengths:
        raise UserError("a batch without a sequence can't be placed: give at least one length")
    tokens, longest = sum(lengths), max(lengths)
    counts = {max(1, math.floor(tokens / (longest * factor))) for factor in (1, 2, 4)}
    return tuple(_workload(model, costs, lengths, n, checkpointing) for n in sorted(counts, reverse=True))


def _workload(model: ModelSpec, costs: Costs, lengths: Sequence[int], count: int, checkpointing: bool) -> Workload:
    tokens, squares = sum(lengths), sum(s * s for s in lengths)
    ends = replace(model, layers=0)
    head = costs.seconds_per_token * tokens * ends.flops_per_token() / model.flops_per_token()
    whole = costs.seconds_per_token2 * squares + costs.seconds_per_token * tokens
    embedding = model.vocab * model.hidden
    layer_bytes = model.activation_bytes_per_token(checkpointing=checkpointing)
    head_bytes = ends.activation_bytes_per_token(checkpointing=checkpointing)
    return Workload(
        layers=model.layers,
        micro_batches=count,
        micro_batch_tokens=tokens / count,
        layer_seconds=((whole - head) / count + costs.seconds_per_pass) / model.layers,
        head_seconds=head / count,
        boundary_bytes=BOUNDARY_BYTES * model.hidden * tokens / count,
        layer_parameters=(model.parameters() - ends.parameters()) // model.layers,
        embedding_parameters=embedding,
        head_parameters=embedding + model.hidden,
        layer_activation_bytes=(layer_bytes - head_bytes) * tokens / count / model.layers,
        head_activation_bytes=head_bytes * tokens / count,
    )
