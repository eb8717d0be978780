"""Updates before the norm is known, and their exact undoing: new state is written beside the old, and takes its place.

SuperOffload (arXiv 2509.21271) undoes by arithmetic, which gives other bits than there were. Here nothing is
overwritten until gradients are known not to be clipped.
"""

from __future__ import annotations

import threading

import torch

from heteromesh.parallel.state.offload.host_update import HostUpdate
from heteromesh.parallel.state.offload.step import StepWork
from heteromesh.parallel.state.offload.subgroups import Subgroups


class Speculation:
    """Updates of subgroups in host memory, as many as there is spare memory for, under way in a thread."""

    def __init__(
        self, subgroups: Subgroups, work: StepWork, update: HostUpdate, threads: int, spare_bytes: float
    ) -> None:
        self._subgroups, self._work, self._update, self._threads = subgroups, work, update, threads
        self._spares = subgroups.spares(spare_bytes)
        self._numbers = [number for number in self._spares if work.active(number)]
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if self._numbers:
            if subgroups.device.type == "cuda":  # the thread reads gradients where they are
                torch.cuda.current_stream(subgroups.device).synchronize()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Returns when all updates have ended. Raises what one has raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def commit(self) -> frozenset[int]:
        """Makes the new state the state, and the weights new; returns which subgroups."""
        for number in self._numbers:
            rows, weights = self._spares[number]
            for segment in self._work.active(number):
                new = rows[0] if weights is None else weights
                self._subgroups.weights(segment.parameter)[segment.of_parameter].copy_(new[segment.of_subgroup])
            self._subgroups.exchange(number)
        return frozenset(self._numbers)

    def _run(self) -> None:
        try:
            with torch.no_grad():
                for number in self._numbers:
                    self._update_beside(number)
        except BaseException as error:
            self._error = error

    def _update_beside(self, number: int) -> None:
        old = self._subgroups.slab(number)
        new, weights = self._spares[number]
        updates = self._work.updates(number, old)
        active = self._work.active(number)
        for segment in self._subgroups.segments[number]:
            if segment not in active:  # the slabs change roles as a whole
                new[:, segment.of_subgroup] = old[:, segment.of_subgroup]
        for update, segment in zip(updates, active, strict=True):
            update.gradient = update.gradient.to("cpu")
            update.weight = None
            first = new[0] if weights is None else weights
            update.out = (first[segment.of_subgroup], new[-2, segment.of_subgroup], new[-1, segment.of_subgroup])
        self._update(updates, self._threads)
