"""The gradient sum: buckets of gradients, each summed over all ranks as soon as the last backward has filled it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.gradients.buckets import Bucket, build_buckets
from heteromesh.comm.interfaces import Work
from heteromesh.comm.world import World
from heteromesh.errors import UserError


@dataclass(slots=True, eq=False)
class SumBucket(Bucket):
    """A bucket with its gradients of the step."""

    flat: torch.Tensor | None = None
    """None until the first gradient arrives."""
    shard: torch.Tensor | None = None
    """With `scatter`, after `finish`: this rank's range of the sum."""
    missing: int = 0
    handle: Work | None = None
    launched_ns: int = 0

    def place(self, index: int) -> torch.Tensor:
        """Returns where the gradient of a parameter lies."""
        if self.flat is None:
            self.flat = self.empty()
        return self.view(self.flat, index)


class GradientSum:
    """Sums gradients over the world while the last backward of a step still runs.

    Gradients are moved into flat buckets as they first arrive in a step and are added to there. Buckets are filled in
    reverse parameter order, as backward does; every rank launches them in the same order, whatever the order in which
    it fills them and however many passes it runs. With one rank nothing is bucketed and nothing is summed. A parameter
    that got no gradient on any rank has None afterwards, as it would in one process.

    `scatter`: each rank gets only its own range of each sum, in `Bucket.shard`; the parameters' gradients are None
    after `finish`, and their memory is free until the next backward (the sharded optimizer sets this).
    """

    def __init__(self, world: World, collectives: Collectives | None = None, *, bucket_bytes: int = 8 << 20) -> None:
        self.world, self.bucket_bytes = world, bucket_bytes
        self._given = collectives
        self.buckets: list[SumBucket] = []
        self.scatter = False
        self.parameter_seconds = 0.0
        """Waited for parameters from a sharded optimizer's owners since `take_exposed_seconds`; that optimizer adds."""
        self._exposed_seconds = 0.0
        self.present: dict[torch.nn.Parameter, bool] = {}
        """After `finish`: whether any rank has a gradient for the parameter."""
        self._home: dict[torch.nn.Parameter, tuple[SumBucket, int]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._touched: set[torch.nn.Parameter] = set()
        self._counts: Work | None = None
        self._count = torch.empty(0)
        self._next = 0
        self._armed = False

    @property
    def collectives(self) -> Collectives:
        """What gradients are summed with: what was given, else the world's."""
        collectives = self._given or self.world.collectives
        assert collectives is not None
        return collectives

    @collectives.setter
    def collectives(self, collectives: Collectives) -> None:
        self._given = collectives

    def attach(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Takes over the gradients of these parameters (those that require one)."""
        if self.world.size == 1:
            return
        for bucket in build_buckets(parameters, self.bucket_bytes):
            self.buckets.append(SumBucket(bucket.parameters, bucket.offsets))
            for index, parameter in enumerate(bucket.parameters):
                self._home[parameter] = self.buckets[-1], index
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._arrived))

    def detach(self) -> None:
        """Removes the hooks; the parameters keep their gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def clear(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """No gradients, for the next step."""
        for parameter in parameters:
            parameter.grad = None
        self._touched.clear()
        for bucket in self.buckets:
            bucket.shard = None

    def arm(self) -> None:
        """The next backward of this rank is its last in this step: buckets leave as they fill."""
        self._armed, self._next = True, 0
        for bucket in self.buckets:
            bucket.missing, bucket.handle = len(bucket.parameters), None

    def finish(self) -> None:
        """Launches what is left (parameters without gradient in this pass) and waits for every sum."""
        self._armed = False
        start = time.perf_counter()
        while self._next < len(self.buckets):
            self._launch()
        for index, bucket in enumerate(self.buckets):
            assert bucket.handle
            sent = self.collectives.sent_bytes
            bucket.handle.wait()
            sent, took = self.collectives.sent_bytes - sent, time.time_ns() - bucket.launched_ns
            self.world.recorder.add(f"gradient sum {index}", "comm", bucket.launched_ns, took, sent)
        if self._counts:
            self._counts.wait()
        self.collectives.commit()
        self._exposed_seconds += time.perf_counter() - start
        self.present = dict(zip(self._home, (self._count > 0).tolist(), strict=True))
        for bucket in self.buckets:
            self._hand_over(bucket)

    def take_exposed_seconds(self) -> tuple[float, float]:
        """Seconds waited in `finish`, and for parameters, since the last call."""
        seconds = self._exposed_seconds, self.parameter_seconds
        self._exposed_seconds = self.parameter_seconds = 0.0
        return seconds

    def _hand_over(self, bucket: SumBucket) -> None:
        for index, parameter in enumerate(bucket.parameters):
            wanted = self.present[parameter] and not self.scatter
            parameter.grad = bucket.place(index) if wanted else None
        if self.scatter:
            assert bucket.flat is not None
            low, high = self.collectives.bounds(bucket.numel)[self.world.rank :][:2]
            # a copy, so that the rest can go
            bucket.shard, bucket.flat = bucket.flat[low:high].clone(), None

    def _arrived(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, torch.nn.Parameter)
        bucket, index = self._home[parameter]
        if parameter not in self._touched:
            self._move(parameter, bucket.place(index))
        if not self._armed:
            return
        bucket.missing -= 1
        while self._next < len(self.buckets) and self.buckets[self._next].missing <= 0:
            self._launch()

    def _move(self, parameter: torch.nn.Parameter, place: torch.Tensor) -> None:
        """The first gradient of a step goes to its place in the bucket; later ones are added there by autograd."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse and self.scatter:
            raise UserError(
                f"a parameter of shape {tuple(parameter.shape)} got a sparse gradient, which can't be sharded: "
                "build its embedding with sparse=False or turn shard_optimizer off"
            )
        place.copy_(gradient.to_dense())
        parameter.grad = place
        self._touched.add(parameter)

    def _launch(self) -> None:
        bucket = self.buckets[self._next]
        for index, parameter in enumerate(bucket.parameters):
            if parameter not in self._touched:
                bucket.place(index).zero_()
        assert bucket.flat is not None
        bucket.launched_ns = time.time_ns()
        act = self.collectives.reduce_scatter if self.scatter else self.collectives.all_reduce
        bucket.handle = act(bucket.flat, self._next)
        self._next += 1
        if self._next == len(self.buckets):
            self._launch_counts(bucket.flat.device)

    def _launch_counts(self, device: torch.device) -> None:
        """On how many ranks each parameter got a gradient: known when the last bucket leaves."""
        flags = [float(p in self._touched) for p in self._home]
        self._count = torch.tensor(flags, device=device)
        self._counts = self.collectives.all_reduce(self._count)
