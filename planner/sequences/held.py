"""Steps whose ranks hold something of every token until the step ends: no rank's total may exceed its limit.

In layer-major order a rank keeps the layers' inputs of all its passes (`Costs.step_capacity`). Where the plan that
looks at passes alone gives a rank too much, it is made again as if ranks were as fast as they may hold tokens, and
compared with a list that is sure to fit: the longest sequence first, each to the rank that is done with it first among
those that can still hold it, or split over the fewest that can together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from heteromesh.errors import UserError
from heteromesh.planner.cost.passes import LOCAL, Costs
from heteromesh.planner.cost.shards import costed, deal, shares, without_idle
from heteromesh.planner.plan import Pass
from heteromesh.planner.sequences.timeline import tokens_of

WAYS_OUT = "lower batch_tokens, or give the ranks more memory (memory_gb of the cluster file) or add ranks"


def holds(passes: Sequence[Pass], costs: Costs) -> bool:
    """Returns whether no rank gets more tokens than it can hold in a step."""
    held = tokens_of(passes, costs.ranks)
    return all(n <= most for n, most in zip(held, costs.step_capacity, strict=False))


def check_held(batch: Sequence[int], costs: Costs) -> None:
    """Raises UserError where all ranks together can't hold the batch."""
    most = sum(costs.step_capacity)
    if costs.step_capacity and sum(batch) > most:
        raise UserError(
            f"the batch has {sum(batch)} tokens and the ranks' memory holds the layer inputs of {most} in a step "
            f"({' + '.join(map(str, costs.step_capacity))}): {WAYS_OUT}"
        )


def leaning(costs: Costs, tokens: int) -> Costs:
    """Returns costs under which ranks get at most what they can hold of so many tokens, dealt by speed."""
    dealt = shares(tokens, costs.speeds, costs.step_capacity)
    top = max(range(costs.ranks), key=lambda r: costs.speeds[r])
    scale = costs.speeds[top] / max(dealt[top], 1.0)
    # a rank that can hold next to nothing still counts as one, however slow
    return replace(costs, speeds=tuple(max(1e-3 * costs.speeds[r], n * scale) for r, n in enumerate(dealt)))


def priced_anew(passes: Sequence[Pass], batch: Sequence[int], costs: Costs) -> list[Pass]:
    """Returns the same passes with the seconds of these costs."""
    return [
        costed(p.ranks, costs.method(p.method), p.sequences, p.shards, [batch[k] for k in p.sequences], costs)
        for p in passes
    ]


def held_passes(batch: Sequence[int], costs: Costs) -> list[Pass]:
    """Returns passes that every rank can hold. Raises UserError where no way to split fills the ranks' memory."""
    return _Held(batch, costs).passes()


class _Held:
    def __init__(self, batch: Sequence[int], costs: Costs) -> None:
        self._batch, self._costs = batch, costs
        self._left = list(costs.step_capacity)
        self._ends = [0.0] * costs.ranks
        self._made: list[Pass] = []
        self._open: list[list[int]] = [[] for _ in self._left]
        """Per rank, the sequences of its pass that still takes some."""

    def passes(self) -> list[Pass]:
        for k in sorted(range(len(self._batch)), key=lambda k: (-self._batch[k], k)):
            rank = self._alone(k)
            if rank is None:
                self._split(k)
            else:
                self._put(k, rank)
        for rank in range(self._costs.ranks):
            self._close(rank)
        return self._made

    def _alone(self, k: int) -> int | None:
        """Returns the rank that is done with the sequence first among those that can hold it."""
        n, costs = self._batch[k], self._costs
        able = [r for r in range(costs.ranks) if min(self._left[r], costs.capacity[r]) >= n]
        return min(able, key=lambda r: (self._ends[r] + self._seconds((k,), r), r), default=None)

    def _put(self, k: int, rank: int) -> None:
        open_, n = self._open[rank], self._batch[k]
        if sum(self._batch[i] for i in open_) + n > self._costs.capacity[rank]:
            self._close(rank)
        self._open[rank].append(k)
        self._left[rank] -= n
        self._ends[rank] += self._seconds((k,), rank)

    def _close(self, rank: int) -> None:
        sequences, self._open[rank] = tuple(self._open[rank]), []
        if sequences:
            lengths = [self._batch[k] for k in sequences]
            self._made.append(costed((rank,), None, sequences, (tuple(lengths),), lengths, self._costs))

    def _split(self, k: int) -> None:
        n, costs = self._batch[k], self._costs
        order = sorted(range(costs.ranks), key=lambda r: (-min(self._left[r], costs.capacity[r]), r))
        for degree in range(2, costs.ranks + 1):
            ranks = tuple(sorted(order[:degree]))
            method = costs.method_for(ranks, float(n))
            if method is None:
                continue
            fits = costs.capacity_for(ranks, method, n)
            room = [min(self._left[r], most) for r, most in zip(ranks, fits, strict=True)]
            if sum(room) < n:
                continue
            ranks, shards = without_idle(ranks, deal([n], [costs.speeds[r] for r in ranks], room))
            if not method.fits(len(ranks)):
                continue
            made = costed(ranks, method, (k,), shards, [n], costs)
            start = max(self._ends[r] for r in ranks)
            for rank, row in zip(ranks, shards, strict=True):
                self._close(rank)  # what it has begun comes before, for all of its ranks
                self._left[rank] -= row[0]
                self._ends[rank] = start + made.seconds
            self._made.append(made)
            return
        raise UserError(
            f"sequence {k} ({n} tokens) finds no ranks whose memory still holds its layer inputs beside those of the "
            f"step's other sequences ({sum(self._batch)} tokens in all, {sum(costs.step_capacity)} can be held): "
            f"{WAYS_OUT}"
        )

    def _seconds(self, sequences: Sequence[int], rank: int) -> float:
        lengths = [self._batch[k] for k in sequences]
        return self._costs.pass_seconds((rank,), LOCAL, lengths, (lengths,))
