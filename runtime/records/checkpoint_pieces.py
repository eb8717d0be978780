"""Fragments of tensors in torch.distributed.checkpoint: written and read as boxes of the whole tensor.

A checkpoint of a sharded optimizer has the entries of an unsharded one, so that either can be resumed as the other.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from heteromesh.parallel.state.fragments import Box, Piece
from heteromesh.runtime.records.checkpoint_files import MetadataReader

STATE = ("optimizer", "state")


class PieceSavePlanner(DefaultSavePlanner):
    """Writes the pieces in a state dict as boxes."""

    def create_local_plan(self) -> SavePlan:
        """Returns the default plan for all else, and an item a box."""
        pieces = {key: value for key, value in self.state_dict.items() if isinstance(value, Piece)}
        everything, self.state_dict = self.state_dict, {k: v for k, v in self.state_dict.items() if k not in pieces}
        plan = super().create_local_plan()
        self.state_dict = everything
        items = [item for key, piece in pieces.items() for item in _write_items(key, piece)]
        return SavePlan([*plan.items, *items], planner_data=plan.planner_data)

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        if isinstance(value, Piece):
            assert index.offset is not None
            return value.box(index.offset)
        return super().lookup_object(index)


class PieceLoadPlanner(DefaultLoadPlanner):
    """Reads what a checkpoint has of a state dict, and pieces (by flat key) from whatever boxes were written."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        # optimizers make state as gradients come: a parameter that never had one has none to load
        super().__init__(allow_partial_load=True)
        self._pieces = pieces

    def create_local_plan(self) -> LoadPlan:
        """Returns the default plan for all else, and reads for every box."""
        plan = super().create_local_plan()
        assert self.metadata is not None
        for key, piece in self._pieces.items():
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            plan.items.extend(create_read_items_for_chunk_list(key, stored, _chunks(piece.boxes())))
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # torch's own would run what a pickle says: this raises where it says more than plain values
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        if index.fqn in self._pieces:
            assert index.offset is not None
            return self._pieces[index.fqn].target(index.offset, read_item.dest_offsets, read_item.lengths)
        found: torch.Tensor = super().resolve_tensor(read_item)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        index = read_item.dest_index
        if index.fqn in self._pieces:
            assert index.offset is not None
            self._pieces[index.fqn].take(index.offset, read_item.dest_offsets, tensor)


class Stored(NamedTuple):
    """A value in a checkpoint."""

    flat: str
    """Its key there."""
    metadata: Any


def stored_state(path: Path) -> dict[str, dict[str, Stored]]:
    """Returns what a checkpoint has of optimizer state, by parameter name and key."""
    metadata = MetadataReader(path).read_metadata()
    found: dict[str, dict[str, Stored]] = {}
    for flat, entry in metadata.state_dict_metadata.items():
        where = (metadata.planner_data or {}).get(flat, ())
        if tuple(where[:2]) == STATE and len(where) == 4:
            found.setdefault(str(where[2]), {})[str(where[3])] = Stored(flat, entry)
    return found


def stored_weights(path: Path) -> dict[str, str]:
    """Returns by name of a model's tensor its key in a checkpoint."""
    metadata = MetadataReader(path).read_metadata()
    where = {flat: tuple((metadata.planner_data or {}).get(flat, ())) for flat in metadata.state_dict_metadata}
    return {str(names[1]): flat for flat, names in where.items() if len(names) == 2 and names[0] == "model"}


def _chunks(boxes: Sequence[Box]) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]


def _write_items(key: str, piece: Piece) -> list[WriteItem]:
    properties = TensorProperties.create_from_tensor(piece.tensor)
    return [
        WriteItem(
            index=MetadataIndex(key, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=piece.shape),
        )
        for chunk in _chunks(piece.written())
    ]
