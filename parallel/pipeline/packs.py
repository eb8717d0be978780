"""Micro-batches of a pipeline: packs of whole sequences, as equal in work as they can be, within a token budget."""

from __future__ import annotations

from collections.abc import Sequence

from heteromesh.errors import UserError
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.stages.stages import Placement


def pack_step(lengths: Sequence[int], placement: Placement, tokens: int, *, pairs_per_token: float = 0.0) -> Step:
    """Packs a step into micro-batches as passes of method `local`, whose one rank is their pipeline's first.

    lengths: of the batch's sequences. tokens: the most that a micro-batch may hold. A sequence of s tokens counts
    s + pairs_per_token * s * s of work; the heaviest sequence goes first, to the lightest micro-batch with room, and
    the heaviest micro-batches to the pipelines that run most of them. Micro-batches that stay without a sequence are
    left out. The step predicts no seconds (0.0): those of a pipeline are the placement's. Raises UserError where a
    sequence, or the batch, does not fit.
    """
    batch = tuple(int(n) for n in lengths)
    _check(batch, tokens)
    packs: list[list[int]] = [[] for _ in range(sum(placement.micro_batches))]
    room, load = [tokens] * len(packs), [0.0] * len(packs)
    for k in sorted(range(len(batch)), key=lambda k: (-batch[k], k)):
        open_ = [i for i in range(len(packs)) if room[i] >= batch[k]]
        if not open_:
            raise UserError(
                f"{sum(batch)} tokens don't pack into {len(packs)} micro-batches of {tokens} tokens: raise the tokens "
                "or the number of micro-batches, or take fewer sequences a step"
            )
        i = min(open_, key=lambda i: (load[i], i))
        packs[i].append(k)
        room[i] -= batch[k]
        load[i] += batch[k] * (1.0 + pairs_per_token * batch[k])
    entries = placement.stages[0].ranks
    passes = tuple(_pass(entries[pipeline], packs[i], batch) for pipeline, i in _deal(load, placement) if packs[i])
    return Step(passes=passes, seconds=0.0, bound_seconds=0.0, gap=0.0, solve_seconds=0.0, batch=batch)


def _check(batch: Sequence[int], tokens: int) -> None:
    if not batch or min(batch) < 1:
        raise UserError(
            f"a batch of lengths {list(batch[:8])} can't be packed: give at least one, each 1 token or more"
        )
    if max(batch) > tokens:
        raise UserError(
            f"sequence {batch.index(max(batch))} has {max(batch)} tokens and a micro-batch holds {tokens}: raise the "
            "tokens of a micro-batch to the longest sequence, or lower max_length"
        )


def _deal(load: Sequence[float], placement: Placement) -> list[tuple[int, int]]:
    """Returns (pipeline, pack): each pipeline gets its number of packs, round after round, the heaviest packs first."""
    left = list(placement.micro_batches)
    dealt = []
    for i in sorted(range(len(load)), key=lambda i: (-load[i], i)):
        # the pipeline that has most left in proportion to its number: the rounds stay even for unequal numbers
        pipeline = max(
            range(len(left)), key=lambda j: (left[j] / placement.micro_batches[j], placement.micro_batches[j], -j)
        )
        left[pipeline] -= 1
        dealt.append((pipeline, i))
    return dealt


def _pass(rank: int, sequences: Sequence[int], batch: Sequence[int]) -> Pass:
    shards = (tuple(batch[k] for k in sequences),)
    return Pass(ranks=(rank,), method="local", sequences=tuple(sequences), shards=shards, seconds=0.0)
