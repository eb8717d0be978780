"""Where weights come from that a rank has never had whole."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn


class WeightSource(Protocol):
    """The weights that training begins with, to be read in part."""

    def read(self, parameter: nn.Parameter, start: int, stop: int) -> torch.Tensor:
        """Returns elements [start, stop) of a parameter, row-major: (stop - start,), on any device, of any float dtype.

        The same on every rank.
        """
