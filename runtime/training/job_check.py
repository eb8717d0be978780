"""What is wrong with a job's model, data, optimizer and schedule, told before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.model.undisturbed import modes_kept
from heteromesh.parallel.state.offload.optimizer import check_offloadable
from heteromesh.runtime.records.plain import from_text, is_same, to_text
from heteromesh.runtime.training.job import Job


def check_job(job: Job) -> None:
    """Raises UserError for what can't be trained, or would be trained as something else."""
    _check_optimizer(job.optimizer, job.model)
    if job.config.offload_optimizer in ("host", "disk"):
        check_offloadable(job.optimizer)
    if job.schedule is not None:
        _check_schedule(job.schedule, job.optimizer)


def check_precision(job: Job, world: World) -> None:
    """Raises UserError, on every rank, where the precision is none of any rank's device or of the model."""
    found = next(filter(None, world.gather(_wrong_precision(job, world.device))), "")
    if found:
        raise UserError(found)


def _wrong_precision(job: Job, device: torch.device) -> str:
    """Says what is wrong with the job's precision on a device; empty: nothing."""
    precision, dtype = job.config.precision, job.config.autocast
    if dtype is None:
        return ""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return (
            f"precision is 'bf16' and {where} has none: use precision='fp16', whose losses are scaled so that "
            "gradients keep their digits, or 'fp32'"
        )
    halves = [name for name, p in job.model.named_parameters() if p.requires_grad and p.dtype is torch.float16]
    if precision == "fp16" and halves:
        return (
            f"precision is 'fp16' and parameter {halves[0]} is float16: updates are lost in it, so keep trained "
            "weights in float32 (model.float()); layers compute in fp16 all the same"
        )
    try:
        weight = torch.ones(8, 8, device=device, requires_grad=True)
        with torch.autocast(device.type, dtype):
            made = weight @ weight
        made.float().sum().backward()
        fine = made.dtype is dtype
    except RuntimeError:
        fine = False
    return "" if fine else f"precision is {precision!r} and {where} can't compute in it: use precision='fp32'"


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Has a model that is in evaluation mode in training mode inside, and each of its modules as before outside."""
    if model.training:
        yield
        return
    with modes_kept(model):
        model.train()
        yield


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    name, own = type(optimizer).__name__, set(model.parameters())
    if not any(p.requires_grad for p in own):
        raise UserError(
            f"all {len(own)} parameters of {type(model).__name__} are frozen (requires_grad is False), so there is "
            "nothing to train: let some of them have gradients"
        )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(p not in own for p in held)
    if foreign:
        raise UserError(
            f"{foreign} of the {len(held)} parameters of the optimizer ({name}) are not the model's: make the "
            f"optimizer from "
            "model.parameters(), after the last change of the model"
        )
    if not any(p.requires_grad for p in held):
        raise UserError(f"all {len(held)} parameters of the optimizer ({name}) are frozen: give it trained ones")
    if any(isinstance(v, torch.Tensor) and v.is_meta for state in optimizer.state.values() for v in state.values()):
        raise UserError(
            f"{name} has state on the meta device, whose values nobody knows: use an optimizer that makes its state in "
            "its first step, such as AdamW, or build the model with real weights"
        )
    for argument in _required(type(optimizer).step):
        raise UserError(
            f"{name}.step needs {argument!r}, which a step here does not have: use an optimizer that steps by "
            "gradients alone, such as AdamW"
        )


def _check_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, optimizer: torch.optim.Optimizer) -> None:
    name = type(schedule).__name__
    if getattr(schedule, "optimizer", optimizer) is not optimizer:
        raise UserError(
            f"the schedule ({name}) is of another optimizer than the one given ({type(optimizer).__name__}), whose "
            "learning rate it would never change: make it of that one, and give both to the Trainer"
        )
    for argument in _required(type(schedule).step):
        raise UserError(
            f"{name}.step needs {argument!r}, and a schedule is stepped once a step without any: use one that depends "
            "on the number of steps only, such as CosineAnnealingLR"
        )
    if any(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups):
        raise UserError(
            f"the learning rate is a tensor and there is a schedule ({name}), whose state would share it: give the "
            "rate as a number"
        )
    _check_state(name, schedule.state_dict())


def _check_state(name: str, state: dict[str, Any]) -> None:
    """Raises UserError for state that would not come out of a checkpoint as it went in."""
    for key, value in state.items():
        try:
            fine = is_same(from_text(to_text(value)), value)
        except Exception as error:
            raise UserError(
                f"the schedule's ({name}) {key!r}, a {type(value).__name__}, can't be saved in a checkpoint "
                f"({type(error).__name__}): leave it out of its state_dict, or make it of numbers, strings and tensors"
            ) from error
        if not fine:
            raise UserError(
                f"the schedule's ({name}) {key!r}, a {type(value).__name__}, does not come out of a checkpoint as it "
                "went in: make it of numbers, strings and tensors"
            )


def _required(call: Callable[..., Any]) -> list[str]:
    """Returns the arguments that a method can't do without."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    # of the class: a schedule wraps its optimizer's own
    parameters = list(inspect.signature(call).parameters.values())[1:]
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in kinds]
