"""A checkpoint that members write each its share of, without a process group: files first, then one description.

Each writes its files and says in `__RANK.metadata` what is in them, as torch does where ranks don't talk to each other.
Then the first one joins these to the `.metadata` of an ordinary checkpoint and makes it whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from heteromesh.parallel.state.fragments import Piece
from heteromesh.runtime.records.checkpoint_files import FileDigest, MetadataReader, PartWriter
from heteromesh.runtime.records.checkpoint_pieces import PieceSavePlanner

Digests = list[tuple[str, int, str]]
"""Name, size and digest of files, as they travel."""


class SharePlanner(PieceSavePlanner):
    """Plans one member's share, which covers tensors in part only."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, found = create_default_global_save_plan(all_plans)
        self.global_plan, self.metadata = plans, replace(found, planner_data=all_plans[0].planner_data)
        return plans, self.metadata


class ShareWriter(PartWriter):
    """Writes one member's share; on the first member, makes the checkpoint whole in the end."""

    def __init__(self, part: Path, final: Path, meta: Mapping[str, Any], *, rank: int, first: bool) -> None:
        super().__init__(part, final, meta, first=first)
        self._share = rank
        self.digests: Digests = []
        """Of the files of this member, when they are written."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs | {"rank": self._share, "use_collectives": False})

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Describes what this member has written."""
        written = [result for each in results for result in each]
        digests = [r.storage_data for r in written if isinstance(r.storage_data, FileDigest)]
        self.digests = [(digest.name, digest.size, digest.digest) for digest in digests]
        FileSystemWriter.finish(self, metadata, [[r for r in written if not isinstance(r.storage_data, FileDigest)]])

    def complete(self, shares: list[Digests]) -> None:
        """Joins all members' shares, by rank, and makes the checkpoint whole. On the first member, when all are done.

        Raises RuntimeError where they don't cover all of a tensor.
        """
        reader = MetadataReader(self._part)
        described = [reader.read_metadata(rank=rank) for rank in range(len(shares))]
        whole = joined(described)
        digests = [FileDigest(*each) for share in shares for each in share]
        for rank in range(len(shares)):
            Path(reader._get_metadata_path(rank)).unlink()
        self.rank = None  # torch names the description after the rank that has one
        self.make_whole(whole, whole.storage_data, digests)


def share_of(state: Mapping[str, Any], *, first: bool) -> dict[str, Any]:
    """Returns what a member writes of what it has: what all have alike only on the first one."""
    if first:
        return dict(state)
    pieces = {name: value for name, value in state["model"].items() if isinstance(value, Piece)}
    return {"model": pieces, "optimizer": {"state": state["optimizer"]["state"]}}


def joined(shares: list[Metadata]) -> Metadata:
    """Returns the description of all shares together; what several have written is taken from the first."""
    entries: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    names: dict[str, Any] = {}
    for share in shares:
        names = (share.planner_data or {}) | names
        for key, entry in share.state_dict_metadata.items():
            if key not in entries:
                entries[key] = entry
            elif isinstance(entry, TensorStorageMetadata):
                known = {tuple(chunk.offsets) for chunk in entries[key].chunks}
                entries[key].chunks += [chunk for chunk in entry.chunks if tuple(chunk.offsets) not in known]
        stored = (share.storage_data or {}) | stored
    for key, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if covered != math.prod(entry.size):
                raise RuntimeError(f"members have written {covered} of the {math.prod(entry.size)} elements of {key}")
    return Metadata(entries, planner_data=names, storage_data=stored, storage_meta=shares[0].storage_meta)
