"""The cost model of whoever is in the job just now: each member knows what passes cost on its own device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from heteromesh.planner.cost.passes import Costs, RateByDegree
from heteromesh.runtime.engine.calibrate import Calibration
from heteromesh.runtime.engine.fit import relative
from heteromesh.runtime.engine.passes import StepExecutor
from heteromesh.runtime.work.reader import Reader

_REMEMBERED = 9
"""Passes over whose median a device's slowness is taken."""


class Links(NamedTuple):
    """What exchanges among members cost, as it was measured once in the job."""

    bytes_per_second: float
    seconds_per_round: float


@dataclass(frozen=True, slots=True)
class Pace:
    """What one member tells the others about its device: the constants of planner/cost/passes.py, as they are now."""

    seconds_per_token2: float
    seconds_per_token: float
    seconds_per_pass: float
    capacity: int

    def seconds(self, lengths: Sequence[int]) -> float:
        """Of a pass over these whole sequences."""
        pairs, tokens = sum(n * n for n in lengths), sum(lengths)
        return self.seconds_per_token2 * pairs + self.seconds_per_token * tokens + self.seconds_per_pass


class OwnCosts:
    """This member's constants: measured alone before it joins, corrected by what its passes take from then on."""

    def __init__(self, executor: StepExecutor, reader: Reader, tokens_per_device: int | None) -> None:
        self._executor = executor
        self._tokens, self._longest = torch.from_numpy(reader.sample_tokens(4096)), max(reader.lengths)
        self._typical = [int(statistics.median(reader.lengths))]
        calibration = Calibration(executor, self._tokens, self._longest)
        self._shape = calibration.attention_shape()
        self._costs = calibration.measure(tokens_per_device)
        self._slowness: list[float] = []

    @property
    def pace(self) -> Pace:
        """As of now."""
        own = self._measured()
        slowness = statistics.median(self._slowness) if self._slowness else 1.0
        return Pace(
            own.seconds_per_token2 * slowness,
            own.seconds_per_token * slowness,
            own.seconds_per_pass * slowness,
            own.capacity,
        )

    def learn(self, lengths: Sequence[int], seconds: float) -> None:
        """A pass that this member did alone took so long."""
        factor = seconds / max(1e-9, self._measured().seconds(lengths))
        self._slowness = [*self._slowness, factor][-_REMEMBERED:]

    def measure_links(self) -> Links:
        """All members of the epoch together, in the executor's world."""
        calibration = Calibration(self._executor, self._tokens, self._longest)
        return Links(calibration.exchange_rate(), calibration.round_seconds())

    def of_members(self, paces: Sequence[Pace], links: Links | None, seconds_per_step: float) -> Costs:
        """The job's, for members of these paces in rank order. Without `links` no pass has several members."""
        took = [pace.seconds(self._typical) for pace in paces]
        best = took.index(min(took))
        reference, hosts = paces[best], tuple(range(len(paces)))
        return replace(
            self._costs,
            seconds_per_token2=reference.seconds_per_token2,
            seconds_per_token=reference.seconds_per_token,
            seconds_per_pass=reference.seconds_per_pass,
            seconds_per_round=links.seconds_per_round if links else 0.0,
            seconds_per_step=seconds_per_step,
            speeds=tuple(relative([took[best]], [seconds]) for seconds in took),
            capacity=tuple(pace.capacity for pace in paces),
            methods=self._shape.methods(self._executor.forwards, hosts) if links and self._shape else (),
            rate=RateByDegree({len(paces): links.bytes_per_second} if links else {}),
            hosts=hosts,
            offload_seconds=(),
        )

    def _measured(self) -> Pace:
        costs = self._costs
        return Pace(costs.seconds_per_token2, costs.seconds_per_token, costs.seconds_per_pass, costs.capacity[0])
