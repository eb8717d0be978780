"""The gradients of one step on one member, kept apart by the members that worked on them together.

A pass that one member works through alone counts as soon as it is done. A pass of several members counts only when all
of them have it: when one is lost, the others drop what they have of it, and its sequences are worked through again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

Members = tuple[int, ...]
"""Ids in the order of a pass's ranks."""
Told = Mapping[Members, Sequence[Sequence[int]]]
"""By set of members, for each of its passes the sequences (their places in the batch)."""


@dataclass(slots=True)
class Share:
    """What a set of members has worked through together, as one of them has it."""

    passes: list[tuple[int, ...]] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    """One a parameter; None where no pass gave it any."""
    loss: float = 0.0
    """Sum over this member's tokens."""
    valid: int = 0
    """Those with something to predict."""


class StepGradients:
    """One step's shares. Between `into` blocks the parameters have no gradients."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._shares: dict[Members, Share] = {}

    @contextmanager
    def into(self, members: Members, sequences: Sequence[int]) -> Iterator[Share]:
        """Backward passes inside the block add to the gradients of these members; the block's end counts the pass.

        When the block raises, all that this member has of that set is dropped: it can't be told apart any more.
        """
        share = self._shares.setdefault(members, Share(gradients=[None] * len(self._parameters)))
        for parameter, gradient in zip(self._parameters, share.gradients, strict=True):
            parameter.grad = gradient
        try:
            yield share
            share.gradients = [parameter.grad for parameter in self._parameters]
            share.passes.append(tuple(sequences))
        except BaseException:
            del self._shares[members]
            raise
        finally:
            for parameter in self._parameters:
                parameter.grad = None

    def told(self) -> Told:
        """For the other members: what there is here."""
        return {members: tuple(share.passes) for members, share in self._shares.items()}

    def settle(self, told: Mapping[int, Told]) -> frozenset[int]:
        """Keeps what all members that worked on it are still here with; returns the sequences that are done.

        told: by member of the epoch. Every member that calls this with the same `told` returns the same.
        """
        done: set[int] = set()
        sets = {members for shares in told.values() for members in shares}
        for members in sets:
            versions = {tuple(map(tuple, told[m].get(members, ()))) if m in told else None for m in members}
            passes = versions.pop()
            if versions or not passes:
                self._shares.pop(members, None)
            else:
                done.update(sequence for sequences in passes for sequence in sequences)
        return frozenset(done)

    def total(self) -> list[torch.Tensor]:
        """This member's contribution, one tensor a parameter (zeros where it has none)."""
        sums = []
        for index, parameter in enumerate(self._parameters):
            total = torch.zeros_like(parameter)
            for share in self._shares.values():
                part = share.gradients[index]
                if part is not None:
                    total += part.to_dense() if part.is_sparse else part
            sums.append(total)
        return sums

    def present(self) -> list[float]:
        """1 for each parameter that got a gradient here, else 0."""
        shares = self._shares.values()
        return [float(any(s.gradients[i] is not None for s in shares)) for i in range(len(self._parameters))]

    def loss(self) -> float:
        """Sum over this member's tokens."""
        return sum(share.loss for share in self._shares.values())

    def valid(self) -> int:
        """This member's tokens with something to predict."""
        return sum(share.valid for share in self._shares.values())
