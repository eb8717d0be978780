"""Whether a loss of the user's own gives for packed and split items what it gives for each alone: tried on the data."""

from __future__ import annotations

import torch
from torch import nn

from heteromesh.comm.in_process import run_threads
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.parallel.model.call import ModelCall, eagerly
from heteromesh.parallel.model.loss import Loss, LossBatch
from heteromesh.parallel.model.undisturbed import undisturbed
from heteromesh.planner.plan import Pass
from heteromesh.runtime.work.examples import Example, stretched
from heteromesh.runtime.work.reader import Reader

_LONGEST = 512
"""Tokens of an item that is tried whole."""
_TOLERANCE = 1e-4
"""Relative: of float32 sums in another order, which are a hundred times closer."""


@torch.no_grad()
def check_loss(model: nn.Module, loss: Loss, reader: Reader) -> None:
    """Raises UserError for a loss that depends on which items are packed together, or on which ranks they lie.

    The model's outputs for two of the data's items are given to it alone, in one pass and over two ranks.
    """
    examples = [e if sum(map(len, e.ids)) <= _LONGEST else stretched(e, _LONGEST) for e in reader.shortest_examples()]
    device = next(model.parameters()).device
    with undisturbed(model), eagerly(model):
        call = ModelCall(model)
        outputs = [_outputs(call, example, device) for example in examples]

    def total(members: int, *chosen: int) -> torch.Tensor:
        return _total(loss, reader, [(examples[i], outputs[i]) for i in chosen], members, device)

    alone = torch.cat([total(1, 0), total(1, 1)])
    for what, seen in (("packed", total(1, 0, 1)), ("split over two ranks", total(2, 0, 1))):
        if not torch.allclose(seen, alone, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            raise UserError(
                f"the loss comes to {_told(seen)} for two items {what}, and to {_told(alone)} for each alone (losses "
                "and weights): it must treat each item by itself, return values and not their mean, and bring what a "
                "sequence's tokens have together with batch.sum and batch.last (docs/losses.md)"
            )


def _told(totals: torch.Tensor) -> str:
    return " and ".join(f"{loss:.6g} ({weight:.6g})" for loss, weight in totals.tolist())


def _outputs(call: ModelCall, example: Example, device: torch.device) -> list[torch.Tensor]:
    """Returns what the model gives for each of an item's sequences alone."""
    rows = [torch.from_numpy(row).to(device)[None] for row in example.ids]
    return [call.outputs(row, torch.arange(row.shape[1], device=device)[None]) for row in rows]


def _total(
    loss: Loss, reader: Reader, items: list[tuple[Example, list[torch.Tensor]]], members: int, device: torch.device
) -> torch.Tensor:
    """Returns the losses and weights of items in one pass over so many ranks: (items, 2)."""
    lengths = [sum(map(len, example.ids)) for example, _ in items]
    shards = tuple(tuple(n * (m + 1) // members - n * m // members for n in lengths) for m in range(members))
    method = "gather" if members > 1 else "local"
    plan = Pass(
        ranks=tuple(range(members)), method=method, sequences=tuple(range(len(items))), shards=shards, seconds=0
    )
    parts = [row for _, outputs in items for row in outputs]

    def member(world: World) -> torch.Tensor:
        given = reader.example_input(plan, [example for example, _ in items], world.rank)
        context = prepare_pass(*given.divided(plan, lengths), world, (1.0,) * members)
        segments = context.layout.segments[context.member]
        outputs = torch.cat([parts[0][:0], *(parts[s.sequence][s.start : s.end] for s in segments)])
        batch = LossBatch(context, given.fields, parts=given.parts_per_item, device=device)
        made = batch.weighed(loss(outputs, batch), outputs)
        if context.order is not None:
            context.order.agree()
        item = torch.tensor([s.sequence // given.parts_per_item for s in segments for _ in range(len(s))])
        values = torch.stack([made.losses, made.weights], 1).double().cpu()
        return torch.zeros(len(items), 2, dtype=torch.float64).index_add(0, item.long(), values)

    return torch.stack(run_threads(members, device, member)).sum(0)
