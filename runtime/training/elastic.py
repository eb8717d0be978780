"""The parts of a job whose members come and go, put together."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.collectives.direct import DirectCollectives
from heteromesh.comm.collectives.int8 import ErrorFeedback, Int8Collectives
from heteromesh.comm.collectives.uneven import UnevenCollectives
from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.tcp.state_transfer import digest_of, pack, unpack
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.comm.world import World, pick_device
from heteromesh.errors import UserError
from heteromesh.faults.member.member import Member
from heteromesh.faults.member.session import Elastic
from heteromesh.faults.member.world import EpochWorld
from heteromesh.faults.membership.view import Fenced, Finished, StateLost, Stopped
from heteromesh.parallel.initial.stand_ins import GradientSketches
from heteromesh.parallel.model.pass_buffers import unexpand
from heteromesh.parallel.state.copies import MirroredWeights
from heteromesh.parallel.state.owner import Replicated, StateOwner
from heteromesh.parallel.state.sharded import Sharded
from heteromesh.planner.cluster.cluster import local_cluster
from heteromesh.planner.cost.json import costs_to_json
from heteromesh.planner.reduction.nics import nic_rates
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.engine.layer_major import LayerMajor
from heteromesh.runtime.engine.member_costs import MemberCosts
from heteromesh.runtime.engine.passes import PassMajor
from heteromesh.runtime.hooks.api import TrainingReport
from heteromesh.runtime.hooks.calls import HookCalls
from heteromesh.runtime.hooks.console import Console
from heteromesh.runtime.hooks.cost_learning import CostLearning
from heteromesh.runtime.hooks.planned_work import PlannedWork
from heteromesh.runtime.hooks.records import RunRecords
from heteromesh.runtime.process.environment import (
    COORDINATORS,
    bounds_from_environment,
    is_first,
    job_from_environment,
    join_options,
)
from heteromesh.runtime.process.failure import JobOver, PeerLost, RunFinished
from heteromesh.runtime.process.interrupt import Interrupt
from heteromesh.runtime.records.checkpoint import shapes_of
from heteromesh.runtime.records.checkpoint_files import Superseded, read_meta
from heteromesh.runtime.records.rundir import finished_step
from heteromesh.runtime.records.writer import CheckpointWriter
from heteromesh.runtime.training.build import build_plan, elastic_cluster, plan_path
from heteromesh.runtime.training.consistency import elastic_facts
from heteromesh.runtime.training.job import Job
from heteromesh.runtime.training.job_check import check_job, check_precision
from heteromesh.runtime.training.layer_trial import layer_reducer, try_layers, working_weights
from heteromesh.runtime.training.loop import TrainingLoop
from heteromesh.runtime.training.progress import TrainingProgress, scale_of
from heteromesh.runtime.training.step import StepParts, TrainStep
from heteromesh.runtime.training.transactions import (
    Begin,
    End,
    Evaluate,
    MeasureLinks,
    Meet,
    Reshard,
    Save,
    Transaction,
)
from heteromesh.runtime.training.trial import learn_buffers, try_model
from heteromesh.runtime.work.plan_service import PlanService
from heteromesh.runtime.work.planned import Planned

JOINED = "HETEROMESH_MEMBER_JOINED"
"""The id of the process that has been a member, and of which job, set when it joins."""


class ElasticJob:
    """One call of `Trainer.fit` with fault tolerance. Everything it opens is closed by `stack`.

    Raises UserError for bad input, PeerLost when the job can't go on with this member, JobOver when it can't at all,
    and RunFinished in a process that was started again when all was done.
    """

    def __init__(self, job: Job, stack: ExitStack) -> None:
        check_settings(job)
        check_job(job)
        check_precision(job, World())
        self.job, self._stack, config = job, stack, job.config
        self.shards = config.shard_weights is True
        """Whether the weights are dealt out too."""
        self._sketches = self._fill()
        unexpand(job.model)
        self._shapes = shapes_of(job.model)
        self.interrupt = stack.enter_context(Interrupt())
        sampled = job.sampler.state_dict()
        self.progress = TrainingProgress(last=config.max_steps, sampled=sampled, scale=scale_of(config))
        self.engine = self._engine()
        stack.callback(self.engine.close)
        try_model(job.model, job.reader, job.loss)
        self._facts: dict[str, str] = {}
        """What members must have in common beside what they were told."""
        self.exchange = self._exchange()
        stack.callback(self.exchange.close)
        self.recorder = World().recorder
        alone = World(recorder=self.recorder)
        self.executor = StepExecutor.of(self.engine, self.exchange, alone, scatter=self.shards)
        self.buffers = learn_buffers(self.engine, job.reader, alone)
        self.records = RunRecords(
            Path(config.run_dir),
            self.recorder,
            self._resolved,
            resume=config.resume,
            together=None,
            job=job_from_environment(),
        )
        stack.callback(self.records.close)
        self._check_unfinished()
        self.console = Console(config.max_steps, 0, str(config.run_dir))
        self._measure()
        self.state: StateOwner = self._state()
        stack.callback(self.state.close)
        self.writer = self._writer()
        self._notes: list[str] = []
        self._restored = False
        """Whether members read their ranges from a checkpoint when these are dealt out first."""
        self._unreadable: UserError | None = None
        """Why this process, which was started again, has no state of its own; those it joins have."""
        wanted = config.resume == "auto" or self.records.restarted
        if config.resume is True or (wanted and self.writer.holds_any()):
            self._resume()
        check_travels(self._state_of_job())
        self._join()

    def run(self) -> TrainingReport:
        """Trains, saves."""
        try:
            report = self._run()
            self.records.finished(report)
            self.session.finished = report.signal is None
        except Finished as error:
            raise RunFinished(str(error)) from None
        except Superseded as error:
            raise PeerLost(str(error)) from None
        except Fenced as error:
            raise PeerLost(f"{error}; {self._hint()}") from None
        except StateLost as error:
            # whoever is started again begins at the last checkpoint
            raise PeerLost(f"{error}; {self._hint()}") from None
        except Stopped as error:
            raise JobOver(f"{error}; {self._hint()}") from None
        return report

    def _run(self) -> TrainingReport:
        job, progress, costs, session = self.job, self.progress, self.members, self.session
        ours = [self.costs, self.records, self.console, PlannedWork()]
        hooks = HookCalls(ours, job.hooks, session.busy)
        loop = TrainingLoop(session, progress, self.interrupt, hooks, str(job.config.run_dir))
        parts = StepParts(
            work=self.work, engine=self.engine, exchange=self.exchange, state=self.state, buffers=self.buffers
        )
        step = TrainStep(
            job, progress, parts, asked=loop.asked, kept=self._hint, hooks=loop.step_committed, busy=session.busy
        )
        transactions: list[Transaction] = [Begin(progress, self._create)]
        if costs.links_wanted:
            transactions.append(MeasureLinks(progress, costs))
        save = Save(progress, self.state, session, self.writer, hooks)
        evaluate = Evaluate(progress, self.state, job.model, hooks)
        end = End(progress, session, self.writer, hooks, loop.report, self.state.weights_ready)
        if isinstance(self.engine, LayerMajor):
            self.engine.attach(pick_device(), self._order, self._layer_weights)
            if self._sketches is not None:
                evaluate = Evaluate(progress, self.state, job.model, hooks, self.engine.forwards_of)
                end = End(progress, session, self.writer, hooks, loop.report, self._layer_weights.begin)
            # no layer can be gathered, for whatever it is, before its weights lie as this epoch's collectives cut them
            deal = Reshard(progress, self.state, session, costs.owned, always=True)
            transactions += [Meet(progress, costs), deal, evaluate, save, end, step]
        else:
            deal = Reshard(progress, self.state, session, costs.speeds)
            transactions += [Meet(progress, costs), evaluate, save, end, deal, step]
        loop.transactions = transactions

        def start() -> None:
            self._tell_joined()
            step.start()

        return loop.run(start)

    def _check_unfinished(self) -> None:
        """Raises RunFinished in a process that was started again although the run is done: it would train over it."""
        done = finished_step(self.records.path) if self.records.restarted else None
        if done is not None and done >= self.job.config.max_steps:
            raise RunFinished(f"all {done} steps of the run in {self.records.path} are done")

    def _tell_joined(self) -> None:
        if self.records.restarted and self.progress.begun:
            name = self.session.member.options.name
            self.console.say(f"worker {name}, started again, has joined after step {self.progress.done}")

    def _fill(self) -> GradientSketches | None:
        """Gives the model its first weights, or what stands in for them where each member reads its own part."""
        initial, device = self.job.initial, torch.device("cpu")
        if not (self.shards and initial.on_meta):
            initial.fill(device)
            return None
        sketches = initial.stand_in(device)
        self._stack.callback(sketches.close)
        return sketches

    def _engine(self) -> PassMajor:
        job, config = self.job, self.job.config
        if self.shards:
            return LayerMajor(job.model, seed=config.seed, autocast=config.autocast, loss=job.loss)
        return PassMajor(
            job.model,
            seed=config.seed,
            autocast=config.autocast,
            checkpoint_activations=config.checkpoint_activations,
            loss=job.loss,
        )

    def _exchange(self) -> GradientReducer:
        engine, reader, device = self.engine, self.job.reader, pick_device()
        if not isinstance(engine, LayerMajor):
            return GradientReducer(self.job.model.parameters(), keep=True)
        self._order = try_layers(engine, reader, device, self._sketches)
        halves = []
        if engine.autocast is not None:
            halves = working_weights(engine, reader, device, self._order, self._sketches)
        if not self._order.mappings:
            engine.recompute()
        self._facts = {"the order of layers": repr(self._order.layers), "the weights gathered in 16 bit": repr(halves)}
        parameters = list(self.job.model.parameters())
        self._working = {parameters[i]: engine.autocast for i in halves if engine.autocast is not None}
        return layer_reducer(engine, self._order, self._working, scatter=True)

    def _state(self) -> StateOwner:
        job, buckets = self.job, self.exchange.buckets
        if isinstance(self.engine, LayerMajor):
            if self._sketches is not None:
                self._sketches.close()
            self._layer_weights = MirroredWeights(
                job.optimizer,
                job.model,
                buckets,
                self.engine.own_parameters,
                working=self._working,
                source=job.initial if self._sketches is not None else None,
                restore=self._restore,
            )
            self.console.held = self._layer_weights.described
            return self._layer_weights
        if job.config.shard_optimizer:
            return Sharded(job.optimizer, job.model, buckets)
        return Replicated(job.optimizer, job.model, buckets)

    def _writer(self) -> CheckpointWriter:
        config = self.job.config
        writer = CheckpointWriter(
            Path(config.run_dir),
            self.job.model,
            self.state,
            lambda done, sampled: self.job.trainer_state(done, sampled, self.progress.scale),
            self.recorder,
            every=config.checkpoint_every,
            keep=config.keep_checkpoints,
            together=None,
            shapes=self._shapes,
            shares=self.shards,
        )
        self._stack.callback(writer.close)
        return writer

    def _resume(self) -> None:
        say = self.console.say if is_first() else lambda _: None
        try:
            path = self.writer.newest(say)
            state = read_meta(path)["trainer"] if self.shards else self.writer.load(path)
        except UserError as error:
            if not self.records.restarted:
                raise
            self._unreadable = error
            return
        self._restores(self.shards)
        self._notes = self.job.load_trainer_state(state)
        self.progress.resume(state)

    def _restore(self) -> None:
        """Loads what this member has been dealt, where the job begins with a checkpoint."""
        self.job.initial.forget()
        if self._restored:
            # what the checkpoint's groups have is changed to what this run was told once more
            self.job.load_trainer_state(self.writer.load(self.writer.path_of(self.progress.done)))

    def _restores(self, restored: bool) -> None:
        self._restored = restored
        if self.shards:
            self._layer_weights.restores = restored

    def _measure(self) -> None:
        """Measures this rank's device."""
        job, config = self.job, self.job.config
        cost_file = Path(config.cost) if config.cost is not None else None
        self._joining = joining = join_options(facts=elastic_facts(job) | self._facts)
        cluster, most = elastic_cluster(config, joining.place), bounds_from_environment().max
        self._plan = build_plan(config, cluster or local_cluster(most)) if plan_path(config) is not None else None
        self._links = 1 if cluster is None else max(1, *map(len, nic_rates(cluster)))
        self.members = MemberCosts(
            self.executor,
            job.reader,
            place=joining.place,
            nics=len(joining.hosts),
            ranks=most if cluster is None else cluster.ranks,
            tokens_per_device=config.tokens_per_device,
            cluster=cluster,
            cost_file=cost_file,
        )
        self.costs = CostLearning(self.members, learns=config.cost is None, waits_known=True)

    def _join(self) -> None:
        job, config = self.job, self.job.config
        service = PlanService(config.plan_seconds, self._plan)
        self._stack.callback(service.close)
        self.work = Planned(job.sampler, job.reader, service, self.costs, None)
        state = digest_of(self._state_of_job())
        member = Member(replace(self._joining, step=self.progress.done, state=state, links=self._links))
        os.environ[JOINED] = _this_process()
        self.session = Elastic(
            member,
            self._capture,
            self._adopt,
            step=self.progress.done,
            collectives=EpochCollectives(self.members, config),
            recorder=self.recorder,
        )
        self._stack.callback(self.session.close)
        self._stack.callback(tick_in_layers(job.model, member.tick))

    def _state_of_job(self) -> dict[str, Any]:
        """Returns what makes two members' states equal, before they have met."""
        schedule = self.job.schedule
        return {
            "progress": self.progress.snapshot(),
            "model": self.state.model_snapshot(self.job.model),
            "optimizer": self.state.snapshot(),
            "schedule": schedule.state_dict() if schedule is not None else None,
            "restored": self._restored,
        }

    def _capture(self) -> dict[str, Any]:
        """Returns all that a joining member must have."""
        return self._state_of_job() | {"costs": self.costs.snapshot()}

    def _adopt(self, state: dict[str, Any]) -> None:
        # members have the same model; of one whose weights are dealt out a snapshot has buffers only
        self.job.model.load_state_dict(state["model"], strict=False)
        self.state.adopt(state["optimizer"])
        self._restores(state["restored"])
        if self.job.schedule is not None:
            self.job.schedule.load_state_dict(state["schedule"])
        self.progress.adopt(state["progress"])
        self.job.sampler.load_state_dict(self.progress.sampled)
        self.work.restart()
        self.costs.adopt(state["costs"])
        self.members.links = self.progress.links
        self._unreadable = None

    def _create(self) -> None:
        if self._unreadable is not None:
            raise self._unreadable
        self._check_unfinished()
        self.records.create()
        for note in (*self._notes, self.job.reader.facts.warning()):
            if note:
                self.console.say(note)
        self.console.begin()

    def _resolved(self, members: tuple[int, ...]) -> dict[str, Any]:
        costs = self.costs.correction(members).applied(self.costs.of(members))
        cluster = self.members.cluster_of(members)
        described = {"name": cluster.name, "fingerprint": cluster.fingerprint} if cluster is not None else None
        return {
            "trainer": asdict(self.job.config),
            "ranks": len(members),
            "cluster": described,
            "costs": costs_to_json(costs),
            "gradient_compression": self.job.config.gradient_compression,
            "optimizer": self.job.described(),
        }

    def _hint(self) -> str:
        latest = self.writer.latest()
        if latest is None:
            return "no checkpoint had been written (checkpoint_every says how often to)"
        return f"start the run again with resume=True: it continues at {latest}"


class EpochCollectives:
    """Opens what the gradients of an epoch are summed with."""

    def __init__(self, members: MemberCosts, config: TrainerConfig) -> None:
        self._members, self._config = members, config
        self._errors = ErrorFeedback()

    def __call__(self, world: EpochWorld) -> Collectives:
        """Returns sums by the owners that the cluster file's links want, or in equal shares where there is none."""
        transport = world.exchange
        assert isinstance(transport, TcpTransport)
        reduction = self._members.reduction_of(world.members)
        inner: Collectives = (
            DirectCollectives(transport) if reduction is None else UnevenCollectives(transport, reduction)
        )
        if self._config.gradient_compression == "int8":
            return Int8Collectives(inner, transport, self._errors)
        return inner


def check_settings(job: Job) -> None:
    """Raises UserError for what fault tolerance can't be used with, or not again (docs/assumptions.md says why)."""
    config = job.config
    if os.environ.get(JOINED) == _this_process():
        raise UserError(
            "a second fit() with fault_tolerance=True in one process: its job is over with the first, as lost members "
            "come back as new processes; call `heteromesh run --fault-tolerance` once for each run"
        )
    refused = {
        "compare_batches": bool(config.compare_batches),
        "offload_optimizer": config.offload_optimizer in ("host", "disk"),
        "gradient_compression": config.gradient_compression == "auto",
    }
    for name, given in refused.items():
        if given:
            raise UserError(
                f"fault_tolerance=True and {name}={getattr(config, name)!r} don't go together: members come and go, "
                "and what is compared or chosen once needs ranks that stay; leave one of the two out"
            )
    if pick_device().type != "cpu":
        raise UserError(
            "fault_tolerance=True works on CPU ranks so far and this rank has a CUDA device: "
            "hide it with CUDA_VISIBLE_DEVICES= or train without fault_tolerance"
        )


def _this_process() -> str:
    return f"{os.getpid()} {os.environ.get(COORDINATORS, '')}"


def check_travels(state: dict[str, Any]) -> None:
    """Raises UserError for a state that can't be handed to a joining member."""
    try:
        unpack(pack(state)[0])
    except Exception as error:
        raise UserError(
            f"the optimizer's or schedule's state can't be handed to a joining member ({error}): "
            "use one whose state_dict has numbers and tensors only, or train without fault_tolerance"
        ) from None


def tick_in_layers(model: nn.Module, tick: Callable[[], None]) -> Callable[[], None]:
    """Makes every layer, forward and backward, a sign of life; returns what takes the hooks off."""
    hooks = [m.register_forward_pre_hook(lambda *_: tick()) for m in model.modules()]
    trained = (p for p in model.parameters() if p.requires_grad)
    hooks += [p.register_post_accumulate_grad_hook(lambda _: tick()) for p in trained]

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove
