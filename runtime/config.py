"""What a training run is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from heteromesh.errors import UserError

SHARDED_WEIGHTS_REFUSE = {
    "compare_batches": "static layouts need the whole model on each rank",
}
"""Settings that can't go together with sharded weights, and why."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of a `Trainer`. Raises UserError on values that make no sense."""

    batch_tokens: int
    """Tokens of a step: whole sequences are taken until the next would exceed this."""
    max_steps: int
    """Optimizer updates."""
    run_dir: str | Path
    """Where everything the run writes goes (docs/run-directory.md)."""
    resume: bool | Literal["auto"] = False
    """Continue the run in `run_dir` from its last checkpoint. auto: start anew where there is none."""
    seed: int = 0
    """Order of the data, and dropout."""
    learning_rate: float = 1e-3
    """Of the AdamW that is made when no optimizer is given."""
    labels: Literal["shifted", "unshifted"] = "shifted"
    """Of data that has labels: shifted: `labels[i]` is what token i is to predict. unshifted: it is token i itself, as
    Transformers' own models take them, and predicted by the token before."""
    clip_norm: float | None = 1.0
    """Largest norm of all gradients together."""
    shard_optimizer: bool = False
    """Each rank updates its own part of the parameters and has the optimizer's state of no more than that."""
    shard_weights: bool | Literal["auto"] = "auto"
    """Each rank has no more than its part of the weights either: a layer is gathered when all passes go through it, and
    computed again in the backward (docs/sharded-weights.md). Shards the optimizer too. auto: where whole weights are
    known to exceed a rank's memory, by the cluster file's or by CUDA's."""
    offload_optimizer: Literal["auto", "none", "host", "disk"] = "auto"
    """Where AdamW's moments lie. host: in host memory (on CPU devices that is theirs, and nothing changes). disk: in
    files in `run_dir` while the job lives. auto: as much as must leaves a rank whose memory is known to be too little,
    for host memory, then for the disk. none: all stays on the device (docs/offload.md)."""
    gradient_compression: Literal["none", "int8", "auto"] = "none"
    """int8: gradients travel in int8, with error feedback (docs/sharded-optimizer.md). auto: where predicted to pay."""
    fault_tolerance: bool = False
    """Training goes on when ranks die, stop or join; `heteromesh run --fault-tolerance` starts it (docs/faults.md)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: forward and backward under torch.autocast; fp16, for devices without bf16, with dynamic loss scaling
    (docs/precision.md)."""
    checkpoint_activations: bool = False
    """Recompute each layer in the backward instead of keeping its activations."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    keep_checkpoints: int = 2
    """Older ones are removed."""
    cluster: str | Path | None = None
    """cluster.toml; without it, equal devices. `heteromesh run --cluster` sets it."""
    idle_hosts: bool = True
    """Hosts of the cluster file whose work would make steps clearly longer wait for the end (docs/participation.md)."""
    plan: str | Path | None = None
    """plan.json to follow as long as it has steps. `heteromesh run --plan` sets it."""
    cost: str | Path | None = None
    """Cost file; without it the model is measured at the start."""
    tokens_per_device: int | None = None
    """Tokens of activations that fit on a device in one pass; None: measured."""
    plan_ahead: int = 2
    """Steps planned ahead of the one that runs, at most: one where planning takes little of a step."""
    plan_seconds: float = 0.05
    """Processor time of the planner for a step, in seconds."""
    timeout_seconds: float = 600.0
    """Longest wait for a peer in an exchange."""
    compare_batches: int = 0
    """At the end, time this many of the last batches again under the static even layouts (no updates)."""
    print_plans: int = 2
    """How many of the first steps' plans are printed."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_steps", "keep_checkpoints", "plan_ahead"):
            self._require(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a whole number >= 1"
            )
        for name in ("checkpoint_every", "compare_batches", "print_plans", "seed"):
            self._require(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 0, "a whole number >= 0"
            )
        for name in ("learning_rate", "plan_seconds", "timeout_seconds"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a finite number > 0")
        self._require("clip_norm", self.clip_norm is None or self.clip_norm > 0, "a number > 0 or None")
        self._require("resume", self.resume in (True, False, "auto"), "True, False or 'auto'")
        self._require("shard_weights", self.shard_weights in (True, False, "auto"), "True, False or 'auto'")
        self._require("precision", self.precision in ("fp32", "bf16", "fp16"), "'fp32', 'bf16' or 'fp16'")
        self._require("labels", self.labels in ("shifted", "unshifted"), "'shifted' or 'unshifted'")
        self._require(
            "offload_optimizer",
            self.offload_optimizer in ("auto", "none", "host", "disk"),
            "'auto', 'none', 'host' (DeepSpeed's cpu) or 'disk' (its nvme)",
        )
        self._require(
            "gradient_compression", self.gradient_compression in ("none", "int8", "auto"), "'none', 'int8' or 'auto'"
        )
        for name, reason in SHARDED_WEIGHTS_REFUSE.items():
            if self.shard_weights is True and getattr(self, name):
                raise UserError(
                    f"{name} is {getattr(self, name)!r} and shard_weights is on ({reason}): turn one of them off"
                )
        if self.precision == "fp16" and self.gradient_compression != "none":
            raise UserError(
                f"gradient_compression is {self.gradient_compression!r} and precision is 'fp16' (what compression "
                "leaves for the next step is in units of a loss scale that changes): set one to 'none' or 'bf16'"
            )
        tokens = self.tokens_per_device
        self._require("tokens_per_device", tokens is None or tokens >= 1, "a whole number >= 1 or None")

    @property
    def shards_state(self) -> bool:
        """Whether each rank has a part of the optimizer's state alone; `auto` counts when it has been decided."""
        return self.shard_optimizer or self.shard_weights is True

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of `precision` for torch.autocast."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    def _require(self, name: str, fine: bool, rule: str) -> None:
        if not fine:
            raise UserError(f"{name} is {getattr(self, name)!r}: it must be {rule}")
