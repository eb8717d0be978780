"""The training loop of `Trainer(fault_tolerance=True)`: members come and go, the curve and the data stay the same.

Every member applies the same committed sums (faults/member/commit.py) to the optimizer state that it holds, all of it
or a part (runtime/training/mirrored.py); a step is planned for whoever is in the job (runtime/training/step.py). A
joining member gets the state from one that has it.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch

from heteromesh.comm.tcp.state_transfer import digest_of, pack, unpack
from heteromesh.comm.world import World, pick_device
from heteromesh.errors import UserError
from heteromesh.faults.member.commit import Decided, Steps
from heteromesh.faults.member.group import Group
from heteromesh.faults.member.member import Member
from heteromesh.faults.member.world import EpochWorld
from heteromesh.faults.membership.view import Fenced, Stopped, View
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.runtime.engine.local_costs import OwnCosts
from heteromesh.runtime.engine.passes import StepExecutor
from heteromesh.runtime.process.environment import terms_from_environment
from heteromesh.runtime.process.failure import JobOver, PeerLost
from heteromesh.runtime.process.interrupt import Interrupt
from heteromesh.runtime.records.elastic_records import ElasticRecords, StepRecord, repairs
from heteromesh.runtime.records.metrics import HEADER, ProgressBar, StepMetrics
from heteromesh.runtime.training.consistency import elastic_facts
from heteromesh.runtime.training.loop import TrainingReport
from heteromesh.runtime.training.mirrored import OptimizerState, ShardedState, WholeState
from heteromesh.runtime.training.step import Result, StepWork
from heteromesh.runtime.work.planner import ElasticPlanner
from heteromesh.runtime.work.sampler import Batch

if TYPE_CHECKING:
    from heteromesh.runtime.trainer import Trainer

_TICK_SECONDS = 0.1


class ElasticLoop:
    """One call of `Trainer.fit` with fault tolerance. Everything it opens is closed by `stack`.

    Raises UserError for bad input, PeerLost when the job can't go on with this member, JobOver when it can't at all.
    """

    def __init__(self, trainer: Trainer, stack: ExitStack) -> None:
        self.trainer, self.config = trainer, trainer.config
        check_settings(trainer)
        self.interrupt = stack.enter_context(Interrupt())
        self.executor = StepExecutor(
            trainer.model,
            World(),
            seed=self.config.seed,
            autocast=self.config.autocast,
            checkpoint_activations=self.config.checkpoint_activations,
        )
        stack.callback(self.executor.close)
        self.records = ElasticRecords(self.config, self.executor.world.recorder)
        stack.callback(self.records.close)
        self.sampled = trainer.sampler.state_dict()
        """The sampler's state behind the last committed batch."""
        self.stopped: int | None = None
        self.done = self._resume() if self.config.resume or self.records.checkpointed_before else 0
        self.saved = self.done
        """Steps behind the state when it was last looked at whether to save it."""
        self.held: OptimizerState = self._hold()
        stack.callback(self.held.close)
        unpack_state(self._capture())
        own = OwnCosts(self.executor, trainer.reader, self.config.tokens_per_device)
        planner = ElasticPlanner(self.config.plan_seconds)
        stack.callback(planner.close)
        self.work = StepWork(self.executor, trainer.reader, own, planner, self._create)
        self.own = own
        state = digest_of(self._capture())
        self.member = Member(terms_from_environment(facts=elastic_facts(trainer), step=self.done, state=state))
        stack.callback(self.member.close)
        stack.callback(self._tick_in_passes())
        self.steps = Steps(self.member.group(), self._capture, self._adopt, step=self.done)
        self.next: Batch | None = None
        self.losses: list[float] = []
        self.norm = 0.0
        """Of the last step's gradients, before they were clipped."""
        self.overheads: deque[float] = deque(maxlen=9)
        self.progress = ProgressBar(self.config.max_steps)
        self.view: View | None = None
        """Of the last committed step."""

    def run(self) -> TrainingReport:
        """Trains, saves."""
        try:
            return self._run()
        except Fenced as error:
            raise PeerLost(f"{error}; {self._way_out()}") from None
        except Stopped as error:
            raise JobOver(f"{error}; {self._way_out()}") from None

    def _run(self) -> TrainingReport:
        self.steps.start()
        first, waited = self.done + 1, 0.0
        began = mark = time.perf_counter()
        while self.done < self.config.max_steps and self.stopped is None:
            decided = self._decide()
            metrics = self._apply(decided, mark)
            mark = time.perf_counter()
            waited += metrics.plan_wait_seconds
            self._record(decided, metrics, (mark - began) / max(1, len(self.losses)))
        elapsed = time.perf_counter() - began
        if self.losses or not self.held.fresh:
            # whoever has rank 0 writes; should it be lost meanwhile, the next one does
            self.steps.atomic(self._save_last)
        return TrainingReport(
            first_step=first,
            last_step=self.done,
            losses=tuple(self.losses),
            plan_wait_share=waited / elapsed if self.losses else 0.0,
            comparisons=(),
            signal=self.stopped,
        )

    def _hold(self) -> OptimizerState:
        if self.config.shard_optimizer:
            return ShardedState(self.trainer.optimizer, self.executor.world.recorder)
        return WholeState(self.trainer.optimizer)

    def _decide(self) -> Decided[Result]:
        """A committed step; before it whatever else is due is committed."""
        attempts = 0
        while True:
            decided = self.steps.atomic(self._attempt, self._take)
            attempts += decided.attempts
            if decided.result is not None:
                return Decided(
                    step=decided.step,
                    view=decided.view,
                    result=decided.result,
                    digest=decided.digest,
                    attempts=attempts,
                )
            with ticking(self.member):
                self.held.settled()
            self.saved = self.done
            attempts -= 1

    def _attempt(self, group: Group) -> tuple[Result | None, str]:
        """A body for `Steps.atomic`. What it does follows from what was committed: the same on every member."""
        self.executor.world.recorder.step = self.done + 1
        every = self.config.checkpoint_every
        due = bool(every) and self.done % every == 0 and self.saved != self.done
        if due:
            self._save(group)
        if due or not self.held.is_settled(group.view):
            return None, f"settled {self.done}:{self.held.settle(group, self.own)}"
        parameters = self.held.refresh(group)
        self.work.stop = self.interrupt.signal or 0
        if self.next is None:
            self.next = self.trainer.sampler.next_batch()
        result, digest = self.work.attempt(group, self.steps, self.done + 1, self.next)
        return result, f"{digest}:{parameters}"

    def _take(self, result: Result | None) -> None:
        """The sums become the parameters' gradients, while the coordinator hears that everybody has them."""
        if result is None:
            return
        assert self.next is not None
        scale = self.next.tokens / max(1, result.valid)
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        for parameter, total, present in zip(parameters, result.sums, result.present, strict=True):
            parameter.grad = total.mul_(scale) if present else None
        trained = [p for p in parameters if p.grad is not None]
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        self.norm = float(torch.nn.utils.clip_grad_norm_(trained, limit))

    def _create(self) -> None:
        self.records.create()
        self._say(HEADER)

    def _apply(self, decided: Decided[Result], mark: float) -> StepMetrics:
        """One update, the same on every member. mark: when the step before ended."""
        result, batch, number, norm = decided.result, self.next, self.done + 1, self.norm
        assert batch is not None
        loss = result.loss / max(1, result.valid)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {number}: look at the batch's sequences {list(batch.sequences[:8])}..., "
                f"lower the learning rate or clip_norm; {self._way_out()}"
            )
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient norm is {norm} at step {number} although the loss is finite: "
                f"lower the learning rate or use fp32; {self._way_out()}"
            )
        rate = float(self.trainer.optimizer.param_groups[0]["lr"])
        self.held.step()
        if self.trainer.schedule is not None:
            self.trainer.schedule.step()
        self.done, self.next = number, None
        self.sampled = self.trainer.sampler.state_after(batch)
        self.losses.append(loss)
        self.stopped = max(t.stop for t in result.told) or None
        return self._metrics(result, batch, loss, norm, rate, time.perf_counter() - mark)

    def _metrics(
        self, result: Result, batch: Batch, loss: float, norm: float, rate: float, seconds: float
    ) -> StepMetrics:
        busy = [t.busy_seconds for t in result.told]
        plans = [r.plan for r in result.rounds]
        self.overheads.append(max(0.0, seconds - max(busy)))
        if self.done > 1:
            self.work.seconds_per_step = statistics.median(self.overheads)
        return StepMetrics(
            step=self.done,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            tokens=batch.tokens,
            tokens_per_second=batch.tokens / seconds,
            predicted_seconds=sum(plan.seconds for plan in plans),
            measured_seconds=seconds,
            gap=plans[0].gap if plans else 0.0,
            imbalance=max(busy) * len(busy) / max(1e-9, sum(busy)),
            plan_wait_seconds=result.plan_wait_seconds,
            data_wait_seconds=0.0,
            exposed_comm_seconds=result.exposed_seconds,
            solve_seconds=sum(plan.solve_seconds for plan in plans),
            passes=sum(len(plan.passes) for plan in plans),
        )

    def _record(self, decided: Decided[Result], metrics: StepMetrics, pace: float) -> None:
        """pace: seconds a step so far."""
        result, view = decided.result, decided.view
        before, self.view = self.view, view
        if result.rounds:  # a member that joined when all was done knows of no plan
            self.records.remember(self._step_record(decided, metrics))
        if view.rank == 0:
            self.progress.clear()
            for line in changes(before, view, result):
                self._say(f"step {metrics.step}: {line}")
            eta = pace * (self.config.max_steps - self.done)
            self._say(metrics.line(eta))
            self.progress.show(self.done, eta)
            self.records.write(self._resolved(result), self.done - len(self.losses))
            if self.done < self.config.max_steps:
                self.next = self.trainer.sampler.next_batch()
                self.work.prepare(self.next, view.members, [t.pace for t in result.told])

    def _step_record(self, decided: Decided[Result], metrics: StepMetrics) -> StepRecord:
        result, view = decided.result, decided.view
        first, *others = result.rounds
        measured = {
            "seconds": metrics.measured_seconds,
            "busy_seconds": [t.busy_seconds for t in result.told],
            "passes": [measure._asdict() for told in result.told for measure in told.passes],
            "plan_wait_seconds": metrics.plan_wait_seconds,
            "members": list(view.members),
            "names": list(view.names),
            "epoch": view.epoch,
            "attempts": decided.attempts,
            "repairs": repairs([(r.places, r.plan) for r in others]),
        }
        assert self.sampled
        trained: dict[str, list[int]] = {}
        for told in result.told:
            for members, passes in told.shares.items():
                places = [i for places in passes for i in places]
                trained["+".join(map(str, members))] = places
        ledger = {"batch": self.sampled["index"], "epoch": view.epoch, "trained": trained, "digest": decided.digest}
        return StepRecord(metrics=metrics, plan=first.plan, measured=measured, ledger=ledger)

    def _resolved(self, result: Result) -> dict[str, Any]:
        costs = self.own.of_members([t.pace for t in result.told], self.work.links, self.work.seconds_per_step)
        return {"trainer": asdict(self.config), "ranks": len(result.told), "costs": costs_to_json(costs)}

    def _save_last(self, group: Group) -> tuple[None, str]:
        """A body for `Steps.atomic`."""
        self._save(group)
        if group.view.rank == 0:
            with ticking(self.member):
                self.records.open_checkpoints().wait()
            self.progress.clear()
            self.records.trace()
            if self.stopped is not None:
                self._say(
                    f"stopped by signal {self.stopped} after step {self.done}; the state is saved in "
                    f"{self.records.path}: resume continues it"
                )
        EpochWorld(group, self.executor.world.recorder).barrier()
        return None, f"saved {self.done}"

    def _save(self, group: Group) -> None:
        schedule = self.trainer.schedule
        state = {
            "step": self.done,
            "sampler": self.sampled,
            "schedule": schedule.state_dict() if schedule is not None else None,
        }
        with ticking(self.member), self.held.whole(group):
            if group.view.rank == 0:
                checkpoints = self.records.open_checkpoints()
                checkpoints.save(self.done, self.trainer.model, self.trainer.optimizer, state)

    def _resume(self) -> int:
        checkpoints = self.records.open_checkpoints()
        path = checkpoints.latest()
        if path is None:
            raise UserError(
                f"run directory {self.records.path} has no whole checkpoint to resume: start anew in another one"
            )
        state = checkpoints.load(path, self.trainer.model, self.trainer.optimizer)
        checkpoints.close()
        self.records.checkpoints = None
        self.trainer.sampler.load_state_dict(state["sampler"])
        self.sampled = state["sampler"]
        if self.trainer.schedule is not None:
            self.trainer.schedule.load_state_dict(state["schedule"])
        return int(state["step"])

    def _capture(self) -> dict[str, Any]:
        """All that a joining member must have."""
        schedule = self.trainer.schedule
        return {
            "done": self.done,
            "model": dict(self.trainer.model.state_dict()),
            "optimizer": self.held.capture(),
            "schedule": schedule.state_dict() if schedule is not None else None,
            "sampler": self.sampled,
            "saved": self.saved,
            "stopped": self.stopped,
        }

    def _adopt(self, state: dict[str, Any]) -> None:
        self.trainer.model.load_state_dict(state["model"])
        self.held.adopt(state["optimizer"])
        if self.trainer.schedule is not None:
            self.trainer.schedule.load_state_dict(state["schedule"])
        self.trainer.sampler.load_state_dict(state["sampler"])
        self.done, self.sampled, self.next = state["done"], state["sampler"], None
        self.saved, self.stopped = state["saved"], state["stopped"]

    def _tick_in_passes(self) -> Any:
        """Every layer is a sign of life; returns what takes the hooks off."""
        tick = self.member.tick
        hooks = [m.register_forward_pre_hook(lambda *_: tick()) for m in self.trainer.model.modules()]
        hooks += [
            p.register_post_accumulate_grad_hook(lambda _: tick())
            for p in self.trainer.model.parameters()
            if p.requires_grad
        ]

        def remove() -> None:
            for hook in hooks:
                hook.remove()

        return remove

    def _way_out(self) -> str:
        latest = self.records.latest
        if latest is None:
            return "no checkpoint had been written (checkpoint_every says how often to)"
        return f"start the run again with resume=True: it continues at {latest}"

    @staticmethod
    def _say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def check_settings(trainer: Trainer) -> None:
    """Raises UserError for what doesn't go together with fault tolerance."""
    config = trainer.config
    refused = {
        "gradient_compression": config.gradient_compression != "none",
        "compare_batches": bool(config.compare_batches),
        "cluster": config.cluster is not None,
        "plan": config.plan is not None,
        "cost": config.cost is not None,
    }
    for name, given in refused.items():
        if given:
            raise UserError(
                f"fault_tolerance=True and {name}={getattr(config, name)!r} don't go together: members come and go, "
                "and each is measured when it joins; leave one of the two out"
            )
    if pick_device().type != "cpu":
        raise UserError(
            "fault_tolerance=True works on CPU ranks so far and this rank has a CUDA device: "
            "hide it with CUDA_VISIBLE_DEVICES= or train without fault_tolerance"
        )


def unpack_state(state: dict[str, Any]) -> None:
    """Raises UserError for a state that can't be handed to a joining member."""
    try:
        unpack(pack(state)[0])
    except Exception as error:
        raise UserError(
            f"the optimizer's or schedule's state can't be handed to a joining member ({error}): "
            "use one whose state_dict has numbers and tensors only, or train without fault_tolerance"
        ) from None


def changes(before: View | None, view: View, result: Result) -> list[str]:
    """What happened to the membership since the last committed step, for people."""
    names = dict(zip(view.members, view.names, strict=True))
    known = dict(zip(before.members, before.names, strict=True)) if before else names
    lines = []
    lost = [name for member, name in known.items() if member not in names]
    joined = [name for member, name in names.items() if member not in known]
    if lost:
        again = sum(len(r.places) for r in result.rounds[1:])
        lines.append(f"lost {', '.join(lost)}; {again} sequences were worked through again")
    if joined:
        lines.append(f"joined by {', '.join(joined)}")
    if lines:
        lines.append("1 member goes on" if view.size == 1 else f"{view.size} members go on")
    return lines


@contextmanager
def ticking(member: Member) -> Iterator[None]:
    """The main thread is at something long that shows no progress, and that is right."""
    ended = Event()

    def tick() -> None:
        while not ended.wait(_TICK_SECONDS):
            member.tick()

    thread = Thread(target=tick, name="heteromesh-tick", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
