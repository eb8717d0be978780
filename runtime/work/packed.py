"""Batches packed into micro-batches for a job in pipeline stages. Every rank packs for itself, and alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.pipeline.packs import pack_step
from heteromesh.planner.plan import Step
from heteromesh.planner.stages.stages import Placement
from heteromesh.runtime.work.reader import PassInput, Reader
from heteromesh.runtime.work.sampler import Batch, Sampler
from heteromesh.runtime.work.source import Assignment, PlanningFailed

_Packed = tuple[Batch, Assignment | UserError]


class PackedPipeline:
    """The `WorkSource` of a placement: the next batch is packed and read while a step runs.

    entry: the rank whose micro-batches are read. pairs_per_token: work of a sequence of s tokens is
    s + pairs_per_token * s * s. tokens: the most that a micro-batch may hold; None: twice what an even one of the batch
    would. step_seconds, pass_seconds: predicted for a unit of work, of a step and of a micro-batch on its first stage
    (by rank).
    """

    def __init__(
        self,
        sampler: Sampler,
        reader: Reader,
        placement: Placement,
        entry: int,
        *,
        pairs_per_token: float,
        tokens: int | None,
        step_seconds: float,
        pass_seconds: Mapping[int, float],
    ) -> None:
        self._sampler, self._reader, self._placement, self._entry = sampler, reader, placement, entry
        self._pairs, self._tokens = pairs_per_token, tokens
        self._step_seconds, self._pass_seconds = step_seconds, pass_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="heteromesh-packs")
        self._next: Future[_Packed] | None = None
        self._current: _Packed | None = None

    def plan(self, number: int, world: World, done: frozenset[int]) -> Assignment:
        started = time.perf_counter()
        if self._current is None:
            self._current = (self._next or self._thread.submit(self._pack)).result()
            self._next = self._thread.submit(self._pack)
        waited = time.perf_counter() - started
        _, packed = self._current
        if isinstance(packed, UserError):
            raise PlanningFailed(packed)
        return replace(packed, number=number, data_wait_seconds=waited)

    def committed(self, world: World, number: int, last: bool) -> None:
        self._current = None

    def restart(self) -> None:
        if self._next is not None:
            self._next.result()
        self._next = self._current = None

    def close(self) -> None:
        self._thread.shutdown()

    def _pack(self) -> _Packed:
        batch = self._sampler.next_batch()
        count = sum(self._placement.micro_batches)
        room = self._tokens or 2 * max(*batch.lengths, -(-batch.tokens // count))
        try:
            step = pack_step(batch.lengths, self._placement, room, pairs_per_token=self._pairs)
        except UserError as error:
            return batch, error
        inputs: dict[int, PassInput] = self._reader.step_inputs(step, batch.sequences, self._entry)
        return batch, Assignment(
            number=0,
            batch=batch,
            places=tuple(range(len(batch.lengths))),
            step=self._timed(step),
            inputs=inputs,
            # the valid tokens of the batch are known when all have read theirs; the loop makes up for the difference
            divisor=max(1, batch.tokens),
        )

    def _timed(self, step: Step) -> Step:
        work = [work_of(p.shards[0], self._pairs) for p in step.passes]
        passes = (
            replace(p, seconds=w * self._pass_seconds[p.ranks[0]]) for p, w in zip(step.passes, work, strict=True)
        )
        return replace(step, passes=tuple(passes), seconds=sum(work) * self._step_seconds)


def work_of(lengths: Sequence[int], pairs_per_token: float) -> float:
    """Returns the work of sequences of these lengths."""
    return sum(n * (1.0 + pairs_per_token * n) for n in lengths)
