"""An independent check that a step can run and takes as long as it says; shares only the cost model with the solver."""

from __future__ import annotations

import math
from itertools import chain

from heteromesh.errors import UserError
from heteromesh.planner.cost.passes import LOCAL, Costs
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.sequences.timeline import tokens_of, with_bytes

TOLERANCE = 1e-9
REMAKE = "make the plan again with `heteromesh plan`"


def check_feasible(step: Step, costs: Costs) -> None:
    """Raises UserError at the first thing in `step` that can't run, whatever it says about time."""
    _check_batch(step)
    for position, p in enumerate(step.passes):
        where = f"pass {position}"
        _check_ranks(p, where, costs)
        _check_method(p, where, costs)
        _check_shards(p, where, step.batch, costs)
    for rank, (held, most) in enumerate(zip(tokens_of(step.passes, costs.ranks), costs.step_capacity, strict=False)):
        if held > most:
            raise UserError(
                f"step: rank {rank} gets {held} tokens in all its passes but holds the layer inputs of {most}: lower "
                "batch_tokens or make the plan again for this cluster"
            )


def check_step(step: Step, costs: Costs) -> None:
    """Raises UserError at the first thing in `step` that is infeasible or wrongly predicted under `costs`."""
    check_feasible(step, costs)
    free = dict.fromkeys(range(costs.ranks), 0.0)
    for position, p in enumerate(step.passes):
        where = f"pass {position}"
        lengths = [step.batch[k] for k in p.sequences]
        exact = costs.pass_seconds(p.ranks, p.method, lengths, p.shards, p.offload)
        _check_number(p.seconds, exact, f"{where}: seconds")
        if p.sent_bytes and p.sent_bytes != with_bytes(p, step.batch, costs).sent_bytes:
            raise UserError(f"{where}: sent_bytes {list(p.sent_bytes)} are not what this cost model says: {REMAKE}")
        end = max(free[r] for r in p.ranks) + p.seconds
        free.update((r, end) for r in p.ranks)
    seconds = costs.traffic.step_seconds(step.passes, list(free.values())) + costs.seconds_per_step
    _check_number(step.seconds, seconds, "step: seconds")
    if not 0 <= step.bound_seconds <= step.seconds * (1 + TOLERANCE):
        raise UserError(
            f"step: bound_seconds {step.bound_seconds} is not between 0 and the step's seconds {step.seconds}: {REMAKE}"
        )
    if step.bound_seconds:
        _check_number(step.gap, step.seconds / step.bound_seconds - 1, "step: gap")


def _check_batch(step: Step) -> None:
    if not step.passes:
        raise UserError(f"step has no pass: {REMAKE}")
    for k, length in enumerate(step.batch):
        if not isinstance(length, int) or isinstance(length, bool) or length <= 0:
            raise UserError(f"batch[{k}] is {length!r}: a length is a whole number of tokens, at least 1; {REMAKE}")
    times = [0] * len(step.batch)
    for position, k in chain.from_iterable(((i, k) for k in p.sequences) for i, p in enumerate(step.passes)):
        if not isinstance(k, int) or not 0 <= k < len(step.batch):
            raise UserError(f"pass {position}: sequence {k} is not in the batch of {len(step.batch)}: {REMAKE}")
        times[k] += 1
    for k, count in enumerate(times):
        if count != 1:
            raise UserError(f"sequence {k} is in {count} passes but every sequence is trained exactly once: {REMAKE}")


def _check_ranks(p: Pass, where: str, costs: Costs) -> None:
    if not p.ranks:
        raise UserError(f"{where} names no rank: {REMAKE}")
    for r in p.ranks:
        if not isinstance(r, int) or not 0 <= r < costs.ranks:
            raise UserError(f"{where}: rank {r} is not one of the cluster's {costs.ranks} ranks: {REMAKE}")
    if any(a >= b for a, b in zip(p.ranks, p.ranks[1:], strict=False)):
        raise UserError(f"{where}: ranks {list(p.ranks)} must ascend without repeats: {REMAKE}")


def _check_method(p: Pass, where: str, costs: Costs) -> None:
    if (p.method == LOCAL) != (len(p.ranks) == 1):
        raise UserError(
            f"{where}: method {p.method!r} on {len(p.ranks)} ranks, but `local` is for exactly one: {REMAKE}"
        )
    if p.method == LOCAL:
        return
    known = {m.name: m for m in costs.methods}
    if p.method not in known:
        raise UserError(f"{where}: method {p.method!r} is unknown, known are {', '.join(known) or 'none'}: {REMAKE}")
    if not known[p.method].fits(len(p.ranks)):
        raise UserError(f"{where}: method {p.method!r} can't split over {len(p.ranks)} ranks: {REMAKE}")


def _check_shards(p: Pass, where: str, batch: tuple[int, ...], costs: Costs) -> None:
    if not p.sequences:
        raise UserError(f"{where} has no sequence: {REMAKE}")
    if len(p.shards) != len(p.ranks) or any(len(row) != len(p.sequences) for row in p.shards):
        raise UserError(
            f"{where}: shards must be {len(p.ranks)} rows (ranks) of {len(p.sequences)} numbers (sequences): {REMAKE}"
        )
    if not 0.0 <= p.offload <= 1.0:
        raise UserError(f"{where}: offload {p.offload} is not between 0 and 1: {REMAKE}")
    holds = costs.memory(costs.method(p.method), [sum(row) for row in p.shards])
    for rank, row, held in zip(p.ranks, p.shards, holds, strict=True):
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in row):
            raise UserError(f"{where}: shards {list(row)} of rank {rank} must be whole numbers, at least 0: {REMAKE}")
        if not sum(row):
            raise UserError(f"{where}: rank {rank} holds no token: leave it out of the pass or {REMAKE}")
        kept = held * (1 - p.offload * costs.offload_share)
        if kept > costs.capacity[rank] * (1 + TOLERANCE):
            raise UserError(
                f"{where}: rank {rank} gets {math.ceil(kept)} tokens but holds {costs.capacity[rank]}: "
                "raise tokens_per_device or make the plan again for this cluster"
            )
    for j, k in enumerate(p.sequences):
        dealt = sum(row[j] for row in p.shards)
        if dealt != batch[k]:
            raise UserError(f"{where}: shards of sequence {k} sum to {dealt}, its length is {batch[k]}: {REMAKE}")


def _check_number(said: float, exact: float, where: str) -> None:
    if not math.isclose(said, exact, rel_tol=TOLERANCE, abs_tol=1e-12):
        raise UserError(
            f"{where} {said!r} differs from {exact!r} under this cost model: {REMAKE} for this cluster and cost file"
        )
