"""The gradient sum: buckets of gradients, each summed over all ranks as soon as the last backward has filled it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.gradients.buckets import BUCKET_BYTES, build_buckets
from heteromesh.comm.gradients.exchange import GradientExchange, Held, Members, Share, Summed
from heteromesh.comm.gradients.ledger import LedgerShare, StepLedger
from heteromesh.comm.interfaces import Work
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.tcp.frame import bytes_of, checksum
from heteromesh.comm.world import World
from heteromesh.errors import UserError

_EVERYBODY: Members = ()
"""The one share of a reducer that keeps nothing apart."""


class _Sum(NamedTuple):
    """One tensor's sum under way."""

    flat: torch.Tensor
    work: Work | None
    """None in a world of one rank."""
    started_ns: int


class _Failed(Work):
    """A sum that could not be started."""

    def __init__(self, error: GroupAborted) -> None:
        self._error = error

    def wait(self) -> None:
        raise self._error


@dataclass(slots=True)
class _Attempt:
    """The sums of one attempt at a step."""

    missing: list[set[nn.Parameter]] | None = None
    """By bucket, the parameters whose gradients the last backward still owes; None before it has begun."""
    sums: list[_Sum] = field(default_factory=list)
    """Of the buckets that have left."""
    results: list[torch.Tensor] = field(default_factory=list)
    """Of those that have been waited for, what this rank gets."""
    complete: set[nn.Parameter] = field(default_factory=set)
    """Parameters to whose gradients nothing more is added."""
    facts: _Sum | None = None
    """Loss, valid tokens and presence of gradients."""
    collectives: Collectives | None = None
    """What these sums are made with; None before the first, and in a world of one rank."""
    unfinished: bool = False
    """Whether a sum was started and not all have been waited for."""


class GradientReducer(GradientExchange):
    """Sums gradients over the world while the last backward of a step still runs.

    Buckets are filled in reverse parameter order, as backward does; every rank starts their sums in the same order,
    whatever the order in which it fills them and however many passes it runs. What is summed with is the world's
    affair (`World.collectives`), which may be that of some of the job's ranks (a pipeline stage's replicas).

    keep=False, for a world that stays: gradients are moved into buckets as they first arrive in a step, are added to
    there, and are summed in place. keep=True, for members that may be lost: each set of members that works on a pass
    has buckets of its own, which stay untouched until `committed`; the sum is formed in a copy. An attempt may be given
    up at any moment and repeated, with the same bits. Without keep an attempt that is repeated begins with nothing.

    scatter: each rank gets only its own range of each sum. In a world of one rank that keeps and scatters nothing,
    nothing is copied: gradients stay where autograd puts them, and a state owner must be given no buckets.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        scatter: bool = False,
        keep: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
        groups: Sequence[Sequence[nn.Parameter]] = (),
        working: Mapping[nn.Parameter, torch.dtype] | None = None,
    ) -> None:
        """groups, working: see `build_buckets`."""
        self.buckets = build_buckets(parameters, bucket_bytes, groups, working or {})
        self._scatter, self._keep = scatter, keep
        self._homes = {p: number for number, bucket in enumerate(self.buckets) for p in bucket.parameters}
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._homes]
        self._world, self._step, self._attempt = World(), -1, _Attempt()
        self._ledger = StepLedger()
        self._worked: dict[Members, list[tuple[int, ...]]] = {}
        """The passes of a reducer that keeps nothing apart."""
        self._open: LedgerShare | None = None
        self._totals: dict[int, torch.Tensor] = {}
        """By bucket, the copy that sums are formed in, kept from step to step: fresh memory is slow."""

    @property
    def done(self) -> frozenset[int]:
        return self._ledger.settled if self._keep else self._ledger.own

    def begin(self, step: int, world: World) -> None:
        if self._attempt.unfinished:
            # the threads of its collectives may still write there
            self._totals.clear()
            if not self._keep:
                self._ledger.clear()
        if step != self._step or not self._keep:
            self._forget()
        self._step, self._world, self._attempt = step, world, _Attempt()

    def held(self) -> Held:
        return self._ledger.held() if self._keep else {m: tuple(passes) for m, passes in self._worked.items()}

    def settle(self, held: Mapping[int, Held]) -> None:
        if self._keep:
            self._ledger.settle(held)

    @contextmanager
    def share(self, members: Members, sequences: Sequence[int]) -> Iterator[Share]:
        key = members if self._keep else _EVERYBODY
        share = self._open = self._ledger.open(key)
        for parameter in share.touched if self._keep else ():
            number = self._homes[parameter]
            parameter.grad = self.buckets[number].view(share.flats[number], self.buckets[number].index(parameter))
        try:
            yield share
            share.passes.append(tuple(sequences))
            if not self._keep:
                self._worked.setdefault(members, []).append(tuple(sequences))
        except BaseException:
            if self._keep:
                self._ledger.drop(key)
            raise
        finally:
            self._open = None
            if self._keep:
                self._take_off()

    def last_backward(self) -> None:
        self._attempt.missing = [set(bucket.parameters) for bucket in self.buckets]

    def complete(self, parameters: Iterable[nn.Parameter]) -> None:
        """Starts the sums of the buckets that are complete, then takes those in that were started before.

        These had the time of the computation between two calls; of each, this rank keeps what it gets.
        """
        attempt = self._attempt
        attempt.complete.update(parameters)
        if self._in_place:
            return
        before = len(attempt.sums)
        while len(attempt.sums) < len(self.buckets) and attempt.complete.issuperset(
            self.buckets[len(attempt.sums)].parameters
        ):
            self._launch()
        while len(attempt.results) < before:
            self._take_in()

    def flush(self) -> None:
        if self._in_place:
            return
        while len(self._attempt.sums) < len(self.buckets):
            self._launch()
        if self._attempt.facts is None:
            self._attempt.facts = self._start(self._own_facts(), None)

    def finish(self) -> Summed:
        self.flush()
        if self._in_place:
            flags = [parameter.grad is not None for parameter in self._homes]
            return self._summed(self._own_facts(flags), (), "", 0.0)
        start, words, vector = time.perf_counter(), [], self._attempt.facts
        assert vector
        while len(self._attempt.results) < len(self._attempt.sums):
            flat = self._take_in()
            if self._keep and not self._scatter:
                words.append(checksum(bytes_of(flat.cpu())).to_bytes(8, "big"))
        if vector.work is not None:
            vector.work.wait()
        waited, facts = time.perf_counter() - start, vector.flat.cpu()
        self._take_off()
        # whoever gets them gives their memory back
        tensors = tuple(self._attempt.results)
        self._attempt.results.clear()
        self._attempt.unfinished = False
        digest = hashlib.blake2b(b"".join((*words, bytes_of(facts))), digest_size=16).hexdigest() if self._keep else ""
        return self._summed(facts, tensors, digest, waited)

    def committed(self) -> None:
        self._step = -1
        if self._keep:
            self._ledger.clear()
        if self._attempt.collectives is not None:
            self._attempt.collectives.commit()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def _in_place(self) -> bool:
        return self._world.size == 1 and not self._keep and not self._scatter

    def _forget(self) -> None:
        """Drops the gradients of the last step, but not the memory that the next one can use."""
        self._take_off()
        if self._keep:
            self._ledger.clear()
        else:
            self._ledger.open(_EVERYBODY).reset()
            self._worked.clear()

    def _take_off(self) -> None:
        for parameter in self._homes:
            parameter.grad = None

    def _arrived(self, parameter: torch.Tensor) -> None:
        if self._open is None or self._in_place:
            return
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        number = self._homes[parameter]
        if number < len(self._attempt.sums):
            raise UserError(
                f"a parameter of shape {tuple(parameter.shape)} got a gradient again when its sum had begun, as it is "
                "used in several parts that are computed again each by itself: checkpoint with use_reentrant=False"
            )
        if parameter.grad.is_sparse and self._scatter:
            raise UserError(
                f"a parameter of shape {tuple(parameter.shape)} got a sparse gradient, which can't be sharded: "
                "build its embedding with sparse=False or turn shard_optimizer and shard_weights off"
            )
        self._open.put(number, self.buckets[number], self.buckets[number].index(parameter))
        attempt = self._attempt
        if attempt.missing is None:
            return
        attempt.missing[number].discard(parameter)
        while len(attempt.sums) < len(self.buckets) and not attempt.missing[len(attempt.sums)]:
            self._launch()

    def _launch(self) -> None:
        """Starts the next bucket's sum."""
        number = len(self._attempt.sums)
        self._attempt.sums.append(self._start(self._contribution(number), number))

    def _start(self, flat: torch.Tensor, key: int | None) -> _Sum:
        self._attempt.unfinished, started = True, time.time_ns()
        if self._world.size == 1:
            return _Sum(flat, None, started)
        try:
            collectives = self._attempt.collectives = self._attempt.collectives or self._world.collectives
            assert collectives is not None
            if not self._scatter or key is None:
                return _Sum(flat, collectives.all_reduce(flat, key), started)
            return _Sum(flat, collectives.reduce_scatter(flat, key, cuts=self.buckets[key].cuts), started)
        except GroupAborted as error:
            # for `finish` to raise: the pass whose backward has come here is none the worse for it
            return _Sum(flat, _Failed(error), started)

    def _contribution(self, number: int) -> torch.Tensor:
        bucket, shares = self.buckets[number], self._ledger.shares
        if not self._keep:
            return self._ledger.open(_EVERYBODY).filled(number, bucket)
        if number not in self._totals:
            self._totals[number] = bucket.empty()
        total, parts = self._totals[number], [s.filled(number, bucket) for s in shares if number in s.flats]
        if not parts:
            return total.zero_()
        total.copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        return total

    def _own_facts(self, flags: Sequence[bool] | None = None) -> torch.Tensor:
        """Returns this rank's loss, what divides it and, for each parameter, whether it has a gradient: (2 + n,)."""
        shares = self._ledger.shares
        touched = {parameter for share in shares for parameter in share.touched}
        flags = [p in touched for p in self._homes] if flags is None else flags
        numbers = [sum(float(s.loss) for s in shares), float(sum(s.valid for s in shares)), *map(float, flags)]
        return torch.tensor(numbers, dtype=torch.float64, device=self._world.device)

    def _take_in(self) -> torch.Tensor:
        """Waits for the next sum that has been started; returns it whole, or this rank's range of it."""
        number = len(self._attempt.results)
        flat = self._attempt.sums[number].flat
        self._wait(number, self._attempt.sums[number])
        self._attempt.results.append(self._own_range(number, flat))
        return self._attempt.results[-1]

    def _wait(self, number: int, under_way: _Sum) -> None:
        collectives = self._attempt.collectives
        if under_way.work is None or collectives is None:
            return
        sent = collectives.sent_bytes
        under_way.work.wait()
        sent, took = collectives.sent_bytes - sent, time.time_ns() - under_way.started_ns
        self._world.recorder.add(f"gradient sum {number}", "comm", under_way.started_ns, took, sent)

    def _own_range(self, number: int, flat: torch.Tensor) -> torch.Tensor:
        """Returns what this rank gets of a bucket's sum; where that is a part, the memory of the rest is given back."""
        if not self._scatter or self._attempt.collectives is None:
            return flat
        low, high = self.buckets[number].bounds(self._attempt.collectives)[self._world.rank :][:2]
        self._totals.pop(number, None)
        if not self._keep:
            self._ledger.open(_EVERYBODY).flats.pop(number, None)
            for parameter in self.buckets[number].parameters:
                parameter.grad = None
        self._attempt.sums[number] = self._attempt.sums[number]._replace(flat=flat.new_empty(0))
        return flat[low:high].clone()

    def _summed(self, facts: torch.Tensor, tensors: tuple[torch.Tensor, ...], digest: str, waited: float) -> Summed:
        loss, valid, *flags = facts.tolist()
        return Summed(
            loss=loss,
            valid=valid,
            present={parameter: flag > 0 for parameter, flag in zip(self._homes, flags, strict=True)},
            tensors=tensors,
            digest=digest,
            exposed_seconds=waited,
        )
