"""Whether gradients should travel in int8: seconds saved on the wire against seconds spent on packing."""

from __future__ import annotations

from heteromesh.planner.reduction.reduction import Reduction

PLAIN_BYTES = 4.0
PACKED_BYTES = 1 + 4 / 256
"""Of a value, with its share of the block's scale."""


def seconds_saved(reduction: Reduction, *, values: int, seconds_per_value: float, hidden_seconds: float = 0.0) -> float:
    """Returns predicted seconds of a step that int8 saves; negative where it costs more than it saves.

    The plain sum goes around a ring where that is as fast, else to owners; what of a sum fits into `hidden_seconds` of
    backward costs nothing. Packing and unpacking is the processor's work and is never hidden: every rank packs each
    value once, and unpacks the results of others and the contributions to its own part.

    Args:
        reduction: who owns what, and seconds per byte.
        values: gradients of the model.
        seconds_per_value: to pack a value, or to unpack one.
        hidden_seconds: of backward that goes on while gradients travel.
    """
    ranks = len(reduction.fractions)
    per_byte = reduction.all_reduce_seconds_per_byte
    plain = max(0.0, PLAIN_BYTES * values * per_byte - hidden_seconds)
    packed = max(0.0, PACKED_BYTES * values * reduction.seconds_per_byte - hidden_seconds)
    unpacked = max((1 - f) + (ranks - 1) * f for f in reduction.fractions)
    return plain - packed - values * seconds_per_value * (1 + unpacked)
