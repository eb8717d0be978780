"""What a rank's memory holds in training, by kind, for the two ways in which a step is executed.

*Pass-major, replicated weights*: weights and gradients whole on every rank, optimizer state whole or the rank's
fraction; of activations those of one pass. *Layer-major, sharded weights*: the rank's fraction f of every layer's
weights, gradients, fp32 masters and moments; r of L layers resident, whole; others gathered before use, two at a time,
and freed; what is outside layers (embeddings, last norm, head) whole during the step; the layer inputs of all of the
rank's tokens of the step; of activations one layer's of one pass, or the loss's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from heteromesh.planner.model.spec import ModelSpec

USABLE = 0.9
"""Of a device's memory: the rest is for the device's context, the allocator's fragments and kernels' workspaces."""
BUCKETS_BYTES = 64 << 20
"""Of gradients under way where they are summed in buckets."""
INPUTS_STAY = 2.3
"""Layer inputs per token that stay on the device where the others wait in host memory (measured)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes per parameter."""

    weights: int
    gradients: int
    masters: int
    """fp32 copies of weights that are kept in 16 bits."""
    moments: int = 8
    """Adam's two, fp32."""

    @property
    def state(self) -> int:
        """What only the owner of a parameter has."""
        return self.masters + self.moments


FP32 = Precision(weights=4, gradients=4, masters=0)
"""The Trainer's: fp32 parameters, which passes may compute with in bf16."""
MIXED = Precision(weights=2, gradients=4, masters=4)
"""16-bit weights, gradients summed in fp32, fp32 masters in the owner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryByKind:
    """Bytes of one rank."""

    weights: float = 0.0
    gradients: float = 0.0
    masters: float = 0.0
    moments: float = 0.0
    activations: float = 0.0
    """Of the largest pass, the loss included."""
    layer_inputs: float = 0.0
    """Of all of the rank's tokens of a step, where steps are layer-major."""
    gather_buffers: float = 0.0
    """Two gathered layers and one layer's gradient."""
    collective_buffers: float = 0.0
    """Gradients under way."""
    copies: float = 0.0
    """Of weights and state, that a checkpoint is written from."""
    context: float = 0.0
    """What can't be used; of a process, what it holds beside all this."""

    @property
    def total(self) -> float:
        return float(sum(getattr(self, kind) for kind in KINDS))

    @property
    def states(self) -> float:
        """What doesn't depend on tokens."""
        return self.total - self.activations - self.layer_inputs


KINDS = tuple(f.name for f in fields(MemoryByKind))


def replicated_memory(
    model: ModelSpec, *, device_bytes: float, optimizer: float, precision: Precision = FP32
) -> MemoryByKind:
    """Returns what a rank of replicated weights holds without tokens. optimizer: its fraction of optimizer state."""
    count = model.parameters()
    return MemoryByKind(
        weights=precision.weights * count,
        gradients=precision.gradients * count,
        masters=precision.masters * optimizer * count,
        moments=precision.moments * optimizer * count,
        collective_buffers=BUCKETS_BYTES,
        context=(1 - USABLE) * device_bytes,
    )


def sharded_memory(
    model: ModelSpec,
    *,
    device_bytes: float,
    fraction: float,
    resident: int = 0,
    host_share: float = 0.0,
    works: bool = True,
    precision: Precision = MIXED,
) -> MemoryByKind:
    """Returns what a rank of sharded weights holds without tokens.

    Args:
        model: whose layers are sharded.
        device_bytes: of memory.
        fraction: of every layer, and of the state of what is outside layers, that it owns.
        resident: layers that stay whole.
        host_share: of its optimizer state that waits in host memory.
        works: False: it holds its fraction and computes nothing.
    """
    layers, outer = model.layers * model.layer_parameters, model.outer_parameters
    whole = resident / model.layers if works else 0.0
    outside = 1.0 if works else fraction
    kept = fraction * (1 - host_share) * (layers + outer)
    gathered = works and resident < model.layers
    layer = model.layer_parameters
    return MemoryByKind(
        weights=precision.weights * ((whole + (1 - whole) * fraction) * layers + outside * outer),
        gradients=precision.gradients * (fraction * layers + outside * outer),
        masters=precision.masters * kept,
        moments=precision.moments * kept,
        gather_buffers=(2 * precision.weights * gathered + precision.gradients * works) * layer,
        collective_buffers=precision.gradients * layer * works,
        context=(1 - USABLE) * device_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBytes:
    """What tokens add to a rank's memory."""

    per_pass: float
    """Per token of a pass."""
    per_step: float = 0.0
    """Per token of the step."""
    by_layer: tuple[float, ...] = ()
    """Per token of the step, by layer in their order: of activations that are kept, so that it need not be computed
    again in the backward; empty: all layers are."""

    def added(self, memory: MemoryByKind, *, of_pass: float, of_step: float) -> MemoryByKind:
        """Returns the memory with so many tokens in its largest pass and in its step."""
        return replace(memory, activations=self.per_pass * of_pass, layer_inputs=self.per_step * of_step)


def replicated_tokens(model: ModelSpec, *, checkpointing: bool = False) -> TokenBytes:
    """Returns the bytes of tokens where a pass goes through all layers."""
    return TokenBytes(per_pass=model.activation_bytes_per_token(checkpointing=checkpointing))


def sharded_tokens(model: ModelSpec, *, inputs_on_host: bool = False) -> TokenBytes:
    """Returns the bytes of tokens where all passes go through a layer, then the next."""
    inputs = INPUTS_STAY if inputs_on_host else model.layers + 1
    per_pass = max(model.layer_activation_bytes, model.loss_bytes)
    return TokenBytes(per_pass=per_pass, per_step=inputs * model.layer_input_bytes)
