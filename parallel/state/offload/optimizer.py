"""AdamW whose state lies where a plan says: on the device, in host memory, on disk.

Whatever the plan, all bits are those of torch.optim.AdamW(fused=True): over the weights where they are fp32, over fp32
masters, from which weights are rounded, where they are not. On a GPU subgroups that the device updates have the bits of
the device's own kernel, which may differ from the host's in the last ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from heteromesh.errors import UserError
from heteromesh.parallel.state.offload.cuda_lanes import CudaLanes
from heteromesh.parallel.state.offload.host_update import AdamOptions, HostUpdate, open_host_update
from heteromesh.parallel.state.offload.lanes import Lanes, ThreadLanes
from heteromesh.parallel.state.offload.layout import packed_numel
from heteromesh.parallel.state.offload.pieces import StoredPiece
from heteromesh.parallel.state.offload.speculation import Speculation
from heteromesh.parallel.state.offload.step import StepWork
from heteromesh.parallel.state.offload.subgroups import MASTER, ParameterState, Subgroups
from heteromesh.planner.ownership.offload import OffloadPlan, on_host

MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class OffloadedAdamW(torch.optim.AdamW):
    """Subgroups of parameters, updated in the order of a plan that is made when their number of elements is known.

    State dicts are AdamW's, both ways, with `master_param` for parameters that are not fp32. Hyperparameters are read
    when a step is made; parameters and state may be exchanged between steps, which plans and lays out anew. Where there
    are masters, weights that somebody else changes are overwritten by the next step: load them before the first.

    Raises UserError for parameters that can't be laid out flat (sparse, not contiguous, of several devices, fp64), for
    options that this update doesn't have, and where a tier has no room.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        plan: Callable[[int], OffloadPlan] | None = None,
        state_folder: str | Path | None = None,
        lanes: Lanes | None = None,
        threads: int | None = None,
        spare_bytes: float = 0.0,
        poison: bool = False,
    ) -> None:
        """plan: from the number of elements (`plan_offload` with rates and memory, or all on the host).

        state_folder: for the disk tier, on a local disk. threads: of the update on the host (all that torch uses).
        spare_bytes: of host memory, for updates that `step_clipped` begins before the norm is known. poison: fill
        buffers with NaN when they are free, on CPUs.
        """
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, fused=True)
        self._step_supports_amp_scaling = False  # scalers then unscale gradients themselves
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        self._planner = plan or partial(on_host, apart=device.type != "cpu")
        self._lanes = lanes or (CudaLanes(device) if device.type == "cuda" else ThreadLanes())
        self._folder = None if state_folder is None else Path(state_folder)
        self._threads, self._spare_bytes, self._poison = threads or torch.get_num_threads(), spare_bytes, poison
        self._host_update: HostUpdate = open_host_update()
        self._bound: tuple[Subgroups, StepWork] | None = None
        self._numbers: dict[torch.Tensor, int] = {}
        self._flipped, self._failed = False, False
        self._source: torch.optim.Optimizer | None = None
        self._check()

    @classmethod
    def taking_over(
        cls,
        optimizer: torch.optim.Optimizer,
        plan: Callable[[int], OffloadPlan],
        state_folder: str | Path | None,
        device: torch.device,
    ) -> OffloadedAdamW:
        """Returns one in place of a plain AdamW. Both have the same groups, so that schedules over it and settings that
        are changed in it count here; its hooks are called; its state is here alone from now on.

        device: where the parameters will be. Raises UserError for another optimizer, by `check_offloadable`.
        """
        check_offloadable(optimizer)
        groups = [{"params": list(group["params"])} for group in optimizer.param_groups]
        lanes = CudaLanes(device) if device.type == "cuda" else ThreadLanes()
        taken = cls(groups, plan=plan, state_folder=state_folder, lanes=lanes)
        taken._source, taken.param_groups, taken.defaults = optimizer, optimizer.param_groups, optimizer.defaults
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(taken, hooks, getattr(optimizer, hooks))
        taken.state.update(optimizer.state)
        optimizer.state.clear()
        return taken

    @property
    def plan(self) -> OffloadPlan:
        """Returns the plan for the parameters that there are now."""
        return self._bind()[0].plan

    @property
    def host_update(self) -> str:
        """Returns which update runs on the host."""
        return self._host_update.name

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._run(frozenset())
        if self._source is not None:
            self._source._opt_called = True  # type: ignore[attr-defined]  # what torch's schedules look for
        return loss

    @torch.no_grad()
    def step_clipped(self, limit: float, norm: Callable[[], float | torch.Tensor] | None = None) -> float:
        """Updates with gradients scaled so that their norm is at most `limit`; not at all where it is not finite.

        Returns the norm before. As many subgroups as there is spare memory for are updated while `norm` (by default
        of the gradients here, which it must not change) is found out; where it says that gradients are to be scaled,
        that is dropped. The result is that of clipping first, bit for bit.
        """
        subgroups, work = self._bind()
        self._begin(subgroups, work)
        speculation = Speculation(subgroups, work, self._host_update, self._threads, self._spare_bytes)
        parameters = [p for p in subgroups.parameters if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        try:
            found = torch.nn.utils.get_total_norm(gradients) if norm is None else norm()
        finally:
            speculation.wait()
        total = torch.as_tensor(found)
        if torch.isfinite(total):
            if limit / (total + 1e-6) < 1.0:  # torch's own formula, in the norm's own precision
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, total.to(subgroups.device))
                self._run(frozenset())
            else:
                self._run(speculation.commit())
        else:
            work.end()
        return float(total)

    def gradient_ready(self, parameter: torch.Tensor) -> None:
        """Starts to move a parameter's gradient to where the step will need it, during the backward.

        A hook for `register_post_accumulate_grad_hook`, or for who sums gradients over ranks. A gradient that is
        changed afterwards (more is added, it is clipped) is moved again by the step.
        """
        _, work = self._bind()
        work.send_early(self._numbers[parameter], parameter)

    def state_dict(self) -> dict[str, Any]:
        """Returns AdamW's: whole tensors, in the parameters' shapes, without subgroups."""
        self._refuse_after_failure()
        found = super().state_dict()
        state = {k: dict(v) if isinstance(v, ParameterState) else v for k, v in found["state"].items()}
        return found | {"state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes AdamW's, with or without masters; fp32 values stay fp32."""
        groups = self.param_groups
        # torch's own would cast moments to the parameters' dtype
        super().load_state_dict(state_dict | {"state": {}})
        self._keep_groups(groups)
        self._check()
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        states: Mapping[Any, Any] = state_dict["state"]
        given = {p: dict(states[i]) for i, p in zip(saved, own, strict=True) if states.get(i)}
        self.state.clear()
        self._failed = False
        if not self._holds(given):
            self._drop()  # what it holds is copied or given up: a tier need not hold two
            self.state.update(given)
        self._bind()

    def checkpoint_pieces(self, parameter: torch.Tensor, shape: Sequence[int], start: int) -> dict[str, Any]:
        """Returns what a checkpoint has of a parameter, which is elements from `start` on of a tensor of this shape.

        `StoredPiece` for masters and moments: `load_state_dict` takes them, once read, as they are.
        """
        self._refuse_after_failure()
        subgroups, _ = self._bind()
        index = self._numbers[parameter]
        rows = subgroups.views[index].rows
        pieces = {key: StoredPiece(subgroups, index, row, shape, start) for key, row in rows.items()}
        return {"step": torch.tensor(float(subgroups.steps[index])), **pieces}

    def close(self) -> None:
        """Drops the state, with the files of the disk tier."""
        self._drop()
        self.state.clear()

    def _drop(self) -> None:
        if self._bound is not None and self._bound[0].file is not None:
            self._bound[0].file.close()
        self._bound = None

    def _keep_groups(self, groups: list[dict[str, Any]]) -> None:
        """Has the groups be the same objects as before, with what they are now."""
        for group, new in zip(groups, self.param_groups, strict=True):
            group.clear()
            group.update(new)
        self.param_groups = groups

    def _holds(self, given: Mapping[torch.Tensor, Mapping[str, Any]]) -> bool:
        """Whether the state of all parameters is pieces that have been read into what is bound; then it is that."""
        pieces = [v for state in given.values() for v in state.values() if isinstance(v, StoredPiece)]
        if not pieces or self._bound is None:
            return False
        subgroups = self._bound[0]
        if any(piece.subgroups is not subgroups for piece in pieces):
            return False
        if any(not isinstance(state.get(key), StoredPiece) for state in given.values() for key in MOMENTS):
            return False
        masters = {piece.index for piece in pieces if piece.row == subgroups.views[piece.index].rows.get(MASTER)}
        steps = [int(given.get(p, {}).get("step", 0)) for p in subgroups.parameters]
        subgroups.restored(steps, masters)
        self.state.update(
            {p: view for p, view, n in zip(subgroups.parameters, subgroups.views, steps, strict=True) if n}
        )
        return True

    def _run(self, done: frozenset[int]) -> None:
        """Updates all subgroups but those that are done."""
        subgroups, work = self._bind()
        gradients = self._begin(subgroups, work)
        active = [bool(work.active(n)) and n not in done for n in range(len(subgroups.plan.subgroups))]
        step = subgroups.plan.step_tasks(flipped=self._flipped, active=active, held=subgroups.held)
        try:
            self._lanes.run(subgroups.plan, step.tasks, work)
        except BaseException:
            self._failed = subgroups.failed = True
            raise
        finally:
            work.end()
        self._flipped, subgroups.held = not self._flipped, step.held
        for index in gradients:
            subgroups.steps[index] += 1
            self.state[subgroups.parameters[index]] = subgroups.views[index]

    def _begin(self, subgroups: Subgroups, work: StepWork) -> dict[int, torch.Tensor]:
        """Returns the gradients (n,) of parameters that have one, and gives them to the work."""
        self._refuse_after_failure()
        self._check()
        if subgroups.file is not None:
            subgroups.file.check()
        subgroups.take_weights()
        subgroups.flush()
        gradients = {}
        for index, parameter in enumerate(subgroups.parameters):
            if parameter.grad is not None:
                if parameter.grad.layout != torch.strided:
                    raise UserError(f"parameter {index} has sparse gradients: build its module with sparse=False")
                gradients[index] = parameter.grad.contiguous().view(-1)
        options = [group for group in self.param_groups for _ in group["params"]]
        work.begin(gradients, [_options(g, n + 1) for g, n in zip(options, subgroups.steps, strict=True)])
        return gradients

    def _bind(self) -> tuple[Subgroups, StepWork]:
        """Returns what holds the state of the parameters and of `self.state` as they are now, made anew if need be."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if self._bound is not None and self._is_current(self._bound[0], parameters):
            return self._bound
        _check_parameters(parameters)
        numel = packed_numel([p.numel() for p in parameters])
        plan = self._planner(numel)
        if plan.numel != numel:
            raise UserError(
                f"the plan is of {plan.numel} elements where there are {numel}: make it from what it is given"
            )
        if not plan.apart and parameters and parameters[0].device.type != "cpu":
            raise UserError(
                f"the plan updates weights where they are, in host memory, but they are on {parameters[0].device}: "
                "make the plan with apart=True"
            )
        subgroups = Subgroups(parameters, plan, self._folder, self._lanes)
        states = [self.state.get(p) or {} for p in parameters]
        if any(states):
            subgroups.load(states)
        for parameter, view, state in zip(parameters, subgroups.views, states, strict=True):
            if state:
                self.state[parameter] = view
        self._numbers = {p: i for i, p in enumerate(parameters)}
        self._bound = subgroups, StepWork(subgroups, self._host_update, self._threads, poison=self._poison)
        return self._bound

    def _is_current(self, subgroups: Subgroups, parameters: list[torch.Tensor]) -> bool:
        if len(parameters) != len(subgroups.parameters):
            return False
        return all(
            mine is theirs and self.state.get(theirs) is (view if steps else None)
            for mine, theirs, view, steps in zip(
                subgroups.parameters, parameters, subgroups.views, subgroups.steps, strict=True
            )
        )

    def _check(self) -> None:
        """Raises UserError for options that this update doesn't have."""
        _check_options(self.param_groups)

    def _refuse_after_failure(self) -> None:
        if self._failed:
            raise UserError("an update of offloaded state has failed half-way: resume from the last checkpoint")


def check_offloadable(optimizer: torch.optim.Optimizer) -> None:
    """Raises UserError for an optimizer in whose place OffloadedAdamW can't work."""
    if isinstance(optimizer, OffloadedAdamW):
        raise UserError("OffloadedAdamW has a plan of its own: leave offload_optimizer at 'auto', or give an AdamW")
    if type(optimizer) is not torch.optim.AdamW:
        raise UserError(
            f"the state of {type(optimizer).__name__} can't be offloaded: it is for torch.optim.AdamW alone (and no "
            "subclass of it), whose arithmetic is known; use that one, or set offload_optimizer='none'"
        )
    _check_options(optimizer.param_groups)
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    other = next((p.dtype for p in trained if p.dtype != torch.float32), None)
    if other is not None:
        raise UserError(
            f"the optimizer has parameters in {other}, whose state AdamW keeps in {other} too and offload in fp32, "
            "with fp32 masters: keep weights in fp32 (precision='bf16' computes in bf16), give the Trainer an "
            "OffloadedAdamW, or set offload_optimizer='none'"
        )


def is_offloadable(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether `check_offloadable` has nothing to say."""
    try:
        check_offloadable(optimizer)
    except UserError:
        return False
    return True


def _check_options(groups: Sequence[Mapping[str, Any]]) -> None:
    for number, group in enumerate(groups):
        for option in ("amsgrad", "capturable", "differentiable"):
            if group.get(option):
                raise UserError(f"group {number} has {option}=True, which offload can't do: use torch.optim.AdamW")
        if not group.get("decoupled_weight_decay", True):
            raise UserError(f"group {number} has Adam's weight decay, which offload can't do: use AdamW's")


def _options(group: Mapping[str, Any], step: int) -> AdamOptions:
    beta1, beta2 = map(float, group["betas"])
    values = (float(group["lr"]), beta1, beta2, float(group["eps"]), float(group["weight_decay"]))
    return AdamOptions(*values, step, bool(group["maximize"]))


def _check_parameters(parameters: list[torch.Tensor]) -> None:
    for index, parameter in enumerate(parameters):
        if parameter.dtype not in _DTYPES:
            raise UserError(f"parameter {index} is {parameter.dtype}: offload updates fp32, bf16 and fp16 ones only")
        if parameter.layout != torch.strided or not parameter.is_contiguous():
            raise UserError(f"parameter {index} is not contiguous: offload needs dense row-major ones")
        if parameter.device != parameters[0].device:
            raise UserError(
                f"parameter {index} is on {parameter.device} and the first on {parameters[0].device}: "
                "give each device an optimizer of its own"
            )
