"""What passes cost on this member's own device and over its links: measured when it joins a job of changing members."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from heteromesh.planner.cost.devices import DeviceCosts, LinkCosts, combine
from heteromesh.planner.cost.passes import Costs
from heteromesh.runtime.engine.calibrate import Calibration
from heteromesh.runtime.engine.passes import StepExecutor
from heteromesh.runtime.work.reader import Reader

_REMEMBERED = 9
"""Passes over whose median a device's slowness is taken."""


class OwnCosts:
    """This member's constants: measured alone before it joins, corrected by what its passes take from then on."""

    def __init__(self, executor: StepExecutor, reader: Reader, tokens_per_device: int | None) -> None:
        self._executor = executor
        self._tokens, self._longest = torch.from_numpy(reader.sample_tokens(4096)), max(reader.lengths)
        self._typical = [int(statistics.median(reader.lengths))]
        calibration = Calibration(executor, self._tokens, self._longest)
        self._shape = calibration.attention_shape()
        self._costs = calibration.measure(tokens_per_device)
        costs = self._costs
        self.measured = DeviceCosts(
            costs.seconds_per_token2, costs.seconds_per_token, costs.seconds_per_pass, costs.capacity[0]
        )
        self._slowness: list[float] = []

    @property
    def pace(self) -> DeviceCosts:
        """What was measured, as slow as the device lately was."""
        own, slowness = self.measured, statistics.median(self._slowness) if self._slowness else 1.0
        return DeviceCosts(
            own.seconds_per_token2 * slowness,
            own.seconds_per_token * slowness,
            own.seconds_per_pass * slowness,
            own.capacity,
        )

    def learn(self, lengths: Sequence[int], seconds: float) -> None:
        """A pass that this member did alone took so long."""
        factor = seconds / max(1e-9, self.measured.seconds(lengths))
        self._slowness = [*self._slowness, factor][-_REMEMBERED:]

    def measure_links(self) -> LinkCosts:
        """All members of the epoch together, in the executor's world."""
        calibration = Calibration(self._executor, self._tokens, self._longest)
        return LinkCosts(calibration.exchange_rate(), calibration.round_seconds())

    def of_members(self, paces: Sequence[DeviceCosts], links: LinkCosts | None, seconds_per_step: float) -> Costs:
        """The job's, for members of these paces in rank order. Without `links` no pass has several members."""
        methods = self._shape.methods(self._executor.forwards, range(len(paces))) if self._shape else ()
        return combine(
            paces,
            links,
            typical=self._typical,
            methods=methods,
            attention=self._costs.attention,
            seconds_per_step=seconds_per_step,
        )
