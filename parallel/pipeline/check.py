"""Whether a model's stages, one after the other, do what the model does: tried before the first step."""

from __future__ import annotations

import torch
from torch import nn

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import PassContext, prepare_pass
from heteromesh.parallel.model.call import IGNORED
from heteromesh.parallel.model.draws import token_places
from heteromesh.parallel.model.randomness import PassRandomness
from heteromesh.parallel.model.undisturbed import undisturbed
from heteromesh.parallel.pipeline.cut import cut
from heteromesh.parallel.pipeline.engine import boundary_of, stage_randomness
from heteromesh.parallel.pipeline.stage import StageModule
from heteromesh.planner.plan import Pass
from heteromesh.planner.stages.stages import Placement

_LENGTHS = (5, 3)
_TOLERANCE = 1e-4
"""Relative to the largest value; stages are the same operations on the same numbers."""


def check_stages(model: nn.Module, placement: Placement, tokens: torch.Tensor) -> None:
    """Runs two short packed sequences of `tokens` (8 at least) through the model and through its stages.

    Raises UserError where they differ: what forward does beside embedding, layers and end (scales of embeddings,
    skipped layers) would happen once a stage.
    """
    total = sum(_LENGTHS)
    plan = Pass(ranks=(0,), method="local", sequences=(0, 1), shards=(_LENGTHS,), seconds=0.0)
    context = prepare_pass(plan, _LENGTHS, World(), (1.0,))
    x = tokens[:total].view(1, total)
    boundary = boundary_of(model)
    whole = _run(StageModule(model, True, boundary, None), PassRandomness(model), x, context)
    for index, (first, last) in enumerate(placement.points):
        part, is_last = cut(model, first, last), index == len(placement.stages) - 1
        x = _run(StageModule(part, is_last, boundary, None), stage_randomness(part, first, is_last), x, context)
    scale = float(whole.abs().max())
    if not float((x - whole).abs().max()) <= _TOLERANCE * scale:
        raise UserError(
            f"{type(model).__name__} cut into {len(placement.stages)} stages gives other losses than whole: its "
            "forward does something beside embedding, layers and end that each stage would do again (scaled "
            "embeddings, layers skipped at random); move it into a layer or the embedding, or train without stages"
        )


@torch.no_grad()
def _run(module: StageModule, randomness: PassRandomness, x: torch.Tensor, context: PassContext) -> torch.Tensor:
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None]
    labels = torch.full_like(positions, IGNORED)
    labels[0, :-1] = 0
    places = token_places(context.layout.segments[0], (0, 1), x.device)
    try:
        with undisturbed(module), context.active(), randomness.during(0, 0, places):
            out: torch.Tensor = module(x, positions, labels)
            return out
    finally:
        randomness.close()
