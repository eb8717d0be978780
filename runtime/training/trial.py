"""A model and its data tried together before the first step: ids, positions and labels fit, passes are exact."""

from __future__ import annotations

import torch
from torch import nn

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.parallel.model.loss import Loss
from heteromesh.parallel.model.pass_buffers import PassBuffers
from heteromesh.parallel.model.self_check import check_model
from heteromesh.parallel.model.tables import Tables, find_tables
from heteromesh.planner.plan import Pass
from heteromesh.runtime.engine.loss_check import check_loss
from heteromesh.runtime.engine.passes import PassMajor
from heteromesh.runtime.work.reader import Reader

_SAMPLE, _LEARNING = 256, 16


def try_model(model: nn.Module, reader: Reader, loss: Loss | None) -> None:
    """Returns where the model can be trained on the data exactly. Changes nothing of it.

    Raises UserError for ids, positions and labels outside the model's tables, and for a model that does something else
    with packed or split sequences than with each alone; so for a loss of the user's own.
    """
    _check_fits(find_tables(model), reader)
    sample = torch.from_numpy(reader.sample_tokens(_SAMPLE))
    check_model(model, sample, max(reader.lengths), split=True, own_loss=loss is not None)
    if loss is not None:
        check_loss(model, loss, reader)


def learn_buffers(engine: PassMajor, reader: Reader, world: World) -> PassBuffers:
    """Returns the buffers that passes of the engine's model change, found out by two small ones; no gradients are
    left."""
    buffers = PassBuffers(engine.model)
    count = min(_LEARNING, max(reader.lengths))
    plan = Pass(ranks=(world.rank,), method="local", sequences=(0,), shards=((count,),), seconds=0.0)
    given = reader.sample_input(plan, [count], world.rank)
    context = prepare_pass(*given.divided(plan, [count]), world, (1.0,) * world.size)
    buffers.learn(lambda: engine.forward_backward(context, given, count, world))
    for parameter in engine.model.parameters():
        parameter.grad = None
    return buffers


def _check_fits(tables: Tables, reader: Reader) -> None:
    if tables.vocabulary is not None and (wrong := reader.id_beyond(tables.vocabulary)) is not None:
        raise UserError(
            f"sequence {wrong.sequence} of the data has the token id {wrong.value}, and the model's vocabulary "
            f"({tables.vocabulary_name}) has {tables.vocabulary} ids from 0: use the tokenizer that the model was "
            f"made for, or "
            "enlarge its embedding"
        )
    longest = max(reader.lengths)
    if tables.positions is not None and longest > tables.positions:
        raise UserError(
            f"sequence {reader.lengths.index(longest)} of the data has {longest} tokens, and the model's table of "
            f"positions ({tables.positions_name}) has {tables.positions}: cut the sequences "
            f"(max_length={tables.positions}), or enlarge the table"
        )
    if tables.outputs is not None and reader.facts.targets and reader.facts.targets[1].value >= tables.outputs:
        high = reader.facts.targets[1]
        raise UserError(
            f"sequence {high.sequence} of the data has the label {high.value}, and the model has logits for "
            f"{tables.outputs} ids "
            "from 0: a label is one of these, or -100 where there is nothing to predict"
        )
