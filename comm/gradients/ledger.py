"""The gradients of one step on one member, kept apart by the members that worked on them together.

A pass that one member works through alone counts as soon as it is done. A pass of several members counts only when all
of them have it: when one is lost, the others drop what they have of it, and its sequences are worked through again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.gradients.exchange import Held, Members, Share


@dataclass(slots=True, eq=False)
class LedgerShare(Share):
    """A share with its gradients."""

    passes: list[tuple[int, ...]] = field(default_factory=list)
    flats: dict[int, torch.Tensor] = field(default_factory=dict)
    """By number of the bucket; none where no pass gave it any. Undefined where no gradient was put."""
    touched: set[nn.Parameter] = field(default_factory=set)
    """Those with a gradient."""

    def put(self, number: int, bucket: Bucket, index: int) -> None:
        """Moves a parameter's first gradient to its place in the bucket; later ones are added there by autograd.

        Where the weight is held in another dtype, all are added up here, in the bucket's.
        """
        parameter = bucket.parameters[index]
        first, working = parameter not in self.touched, parameter.dtype != bucket.dtype
        if not first and not working:
            return
        gradient = parameter.grad
        assert gradient is not None
        if number not in self.flats:
            self.flats[number] = bucket.empty()
        place = bucket.view(self.flats[number], index)
        if first:
            place.copy_(gradient.to_dense())
        else:
            place.add_(gradient)
        parameter.grad = None if working else place
        self.touched.add(parameter)

    def filled(self, number: int, bucket: Bucket) -> torch.Tensor:
        """Returns a bucket's gradients, with zeros where there are none."""
        if number not in self.flats:
            self.flats[number] = bucket.empty()
        for index, parameter in enumerate(bucket.parameters):
            if parameter not in self.touched:
                bucket.view(self.flats[number], index).zero_()
        return self.flats[number]

    def reset(self) -> None:
        """Forgets everything but the memory."""
        self.passes.clear()
        self.touched.clear()
        self.loss, self.valid = 0.0, 0.0


class StepLedger:
    """One step's shares."""

    def __init__(self) -> None:
        self._shares: dict[Members, LedgerShare] = {}
        self.settled: frozenset[int] = frozenset()
        """Sequences that somebody holds, as all members agreed on last."""

    @property
    def shares(self) -> list[LedgerShare]:
        """Always in the same order: a sum that is repeated gets the same bits."""
        return [self._shares[members] for members in sorted(self._shares)]

    @property
    def own(self) -> frozenset[int]:
        """Sequences that are held here."""
        passes = (sequences for share in self.shares for sequences in share.passes)
        return frozenset(sequence for sequences in passes for sequence in sequences)

    def open(self, members: Members) -> LedgerShare:
        """Returns the share of these members, a new one if there is none."""
        return self._shares.setdefault(members, LedgerShare())

    def drop(self, members: Members) -> None:
        self._shares.pop(members, None)

    def clear(self) -> None:
        self._shares.clear()
        self.settled = frozenset()

    def held(self) -> Held:
        """Returns what there is here, for the other members."""
        return {members: tuple(share.passes) for members, share in self._shares.items()}

    def settle(self, held: Mapping[int, Held]) -> None:
        """Keeps what all members that worked on it are still here with, and have in the same version.

        held: by member of the epoch. Every member that calls this with the same `held` has the same `settled` then.
        """
        done: set[int] = set()
        for members in {members for shares in held.values() for members in shares}:
            versions = {tuple(map(tuple, held[m].get(members, ()))) if m in held else None for m in members}
            passes = versions.pop()
            if versions or not passes:
                self.drop(members)
            else:
                done.update(sequence for sequences in passes for sequence in sequences)
        self.settled = frozenset(done)
