"""How far a job is: equal on every rank, and handed to ranks that join."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from heteromesh.planner.cost.devices import LinkCosts
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.engine.loss_scale import LossScale
from heteromesh.runtime.hooks.api import Stop


@dataclass(slots=True)
class TrainingProgress:
    """What is committed so far."""

    last: int
    """The step after which the job ends."""
    done: int = 0
    """Steps."""
    sampled: dict[str, Any] = field(default_factory=dict)
    """The sampler's state behind the last committed batch."""
    saved: int = 0
    """Steps behind the newest checkpoint."""
    evaluated: int = 0
    """Steps behind the last evaluation."""
    met: list[int] = field(default_factory=list)
    """The members who have told each other what they are."""
    begun: bool = False
    """Whether the run directory is this job's."""
    over: bool = False
    """Whether nothing is left to do."""
    stop: Stop | None = None
    links: LinkCosts | None = None
    """What exchanges cost, where that is measured once in the job."""
    scale: LossScale | None = None
    """Of the next step's losses; None: they are not scaled."""

    @property
    def training(self) -> bool:
        """Whether a step is left to do."""
        return self.done < self.last and self.stop is None

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint has of the trainer."""
        self.done = self.saved = self.evaluated = int(state["step"])
        self.sampled = state["sampler"]
        if self.scale is not None and state.get("loss_scale"):
            self.scale = LossScale(**state["loss_scale"])

    def snapshot(self) -> dict[str, Any]:
        """Returns plain values, which `adopt` takes."""
        values = {k: v for k, v in asdict(self).items() if k != "last"}
        # asdict leaves named tuples as they are, and a joining member takes plain values only
        return values | {"links": self.links._asdict() if self.links else None}

    def adopt(self, values: Mapping[str, Any]) -> None:
        """Takes over what another rank's `snapshot` gave."""
        for name, value in values.items():
            setattr(self, name, value)
        self.stop = Stop(**values["stop"]) if values["stop"] else None
        self.links = LinkCosts(**values["links"]) if values["links"] else None
        self.scale = LossScale(**values["scale"]) if values["scale"] else None


def scale_of(config: TrainerConfig) -> LossScale | None:
    """Returns the scale that a job's losses begin with; None where they are not scaled."""
    return LossScale() if config.precision == "fp16" else None
