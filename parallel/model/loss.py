"""Losses of the user's own: by token, or by item of the data, of outputs that may lie on several ranks of a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from heteromesh.comm.exchange import Exchange
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import PassContext
from heteromesh.parallel.attention.layout import Layout


class PassLosses(NamedTuple):
    """What a pass has come to on one rank."""

    losses: torch.Tensor
    """(n,) by token, weighted; an item's is at its last token. Their sum has the gradient."""
    weights: torch.Tensor
    """(n,) likewise; the losses' sum is to be divided by theirs, over all ranks and passes of a step."""


class LossBatch:
    """What this rank has of a pass, for a loss: `batch[name]` is a field of the data.

    A field with one value a token has a row for each of this rank's `tokens` tokens, in the order of the model's
    outputs; any other has a row for each of the `items` items of the data that end here. A sequence may be split over
    ranks: `sum` and `last` bring what its tokens have to the rank where its item ends. All ranks of a pass must call
    them alike, also where none of their items ends.
    """

    def __init__(
        self,
        context: PassContext,
        fields: Mapping[str, torch.Tensor],
        *,
        parts: int,
        device: torch.device,
    ) -> None:
        """parts: sequences of an item; they follow each other in the pass. fields: as `batch[name]` gives them."""
        layout, member = context.layout, context.member
        self._fields, self._parts, self._exchange = fields, parts, context.exchange
        self._order = context.order
        self._device, self._sequences = device, len(layout.lengths)
        owners = owned_items(layout, parts)
        self._owned = [torch.tensor(items, dtype=torch.int64, device=device) for items in owners]
        self._mine = self._owned[member]
        self.items: int = len(self._mine)
        """Items of the data that end on this rank."""
        self.tokens: int = layout.tokens(member)
        """Tokens of this rank."""
        rows = [(s.sequence, t) for s in layout.segments[member] for t in range(s.start, s.end)]
        self._sequence_of = torch.tensor([j for j, _ in rows], dtype=torch.int64, device=device)
        last = [row for row, (j, t) in enumerate(rows) if t == layout.lengths[j] - 1]
        self._last = torch.tensor(last, dtype=torch.int64, device=device)
        # of an item's sequences that end here, the last one's is the item's
        item_ends = {rows[row][0] // parts: row for row in last}
        ends = [item_ends[item] for item in owners[member]]
        self._ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self._made: list[torch.Tensor] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._fields:
            raise UserError(f"the loss asks for {name!r}, and the data has {', '.join(map(repr, self._fields))}")
        return self._fields[name].to(self._device)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums values (tokens, ...) over each sequence of the items that end here: (items, ...).

        Where items have several sequences: (items, sequences, ...). Gradients flow back to all of the tokens.
        """
        self._check(values)
        return self._gathered(values, self._sequence_of)

    def last(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the row of each sequence's last token; shapes are those of `sum`."""
        self._check(values)
        return self._gathered(values[self._last], self._sequence_of[self._last])

    def _gathered(self, values: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
        own = values.new_zeros(self._sequences, *values.shape[1:]).index_add(0, sequences, values)
        by_item = own.unflatten(0, (-1, self._parts)) if self._parts > 1 else own
        found = by_item[self._mine]
        if self._exchange is not None and self._order is not None:
            self._order.agree(f"values of a loss, {tuple(by_item.shape)} {by_item.dtype}")
            found = _ToOwners.apply(by_item, self._exchange, self._owned)  # type: ignore[no-untyped-call]
        self._made.append(found)
        return found

    def _check(self, values: torch.Tensor) -> None:
        if not values.dim() or len(values) != self.tokens:
            raise UserError(
                f"the loss brings values of shape {tuple(values.shape)} together by sequence: give one row for each of "
                f"the pass's {self.tokens} tokens here"
            )

    def weighed(self, returned: Any, outputs: torch.Tensor) -> PassLosses:
        """Returns what a loss has returned as losses by token. Raises UserError for what is no loss."""
        values, weights = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        if not isinstance(values, torch.Tensor) or values.shape not in ((self.tokens,), (self.items,)):
            what = (
                f"a tensor {tuple(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
            )
            raise UserError(
                f"the loss returned {what} for {self.tokens} tokens and {self.items} items that end here: return one "
                "value a token or one an item (or these and their weights), not their mean, which is taken over the "
                "whole step"
            )
        weights = torch.ones_like(values) if weights is None else torch.as_tensor(weights).to(values).detach()
        if weights.shape != values.shape:
            raise UserError(
                f"the loss returned {tuple(values.shape)} values and {tuple(weights.shape)} weights: give one a value"
            )
        losses = (values * weights).masked_fill(weights == 0, 0.0)
        if len(losses) != self.tokens:
            losses, weights = (t.new_zeros(self.tokens).index_copy(0, self._ends, t) for t in (losses, weights))
        # peers wait in their backward for this rank's, whatever the loss has left out here
        ties = [tensor.flatten()[:0].sum().to(losses) for tensor in (outputs, *self._made)]
        return PassLosses(losses + torch.stack(ties).sum(), weights)


Loss = Callable[[torch.Tensor, LossBatch], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
"""Called with the model's outputs (tokens, ...) and what goes with them; returns values, and weights where they are not
all 1. The loss of a step is the weighted mean of all its values."""


def owned_items(layout: Layout, parts: int) -> list[list[int]]:
    """Returns by member the items that end with one of its tokens."""
    holder = {}
    for member, segments in enumerate(layout.segments):
        holder.update({s.sequence: member for s in segments if s.end == layout.lengths[s.sequence]})
    owned: list[list[int]] = [[] for _ in layout.segments]
    for item in range(len(layout.lengths) // parts):
        ends = [j for j in range(item * parts, (item + 1) * parts) if j in holder]
        if ends:
            owned[holder[ends[-1]]].append(item)
    return owned


class _ToOwners(torch.autograd.Function):
    """Sums each item's rows over the ranks of a pass, on the rank that owns it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange, owned: Sequence[torch.Tensor]) -> torch.Tensor:
        ctx.exchange, ctx.owned = exchange, owned
        sends = [rows[items].contiguous() for items in owned]
        receives = [torch.empty_like(sends[exchange.member]) for _ in owned]
        exchange.all_to_all(sends, receives, "values of items to where they end")
        return torch.stack(receives).sum(0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        receives = [gradient.new_empty(len(items), *gradient.shape[1:]) for items in ctx.owned]
        ctx.exchange.all_to_all([gradient.contiguous()] * len(receives), receives, "gradients of items' values")
        found = gradient.new_empty(sum(map(len, ctx.owned)), *gradient.shape[1:])
        for items, received in zip(ctx.owned, receives, strict=True):
            found[items] = received
        return found, None, None
