"""Whether a model does with packed and split sequences what it does with each alone: tried on the model itself.

A pass is exact for models that mix tokens in hm.attention alone and that treat each token by its own position. Layers
that mix tokens elsewhere (convolutions, recurrent states, masks of their own), or that look at all positions of a pass
at once, would train something else, silently. So before the first step a few dozen tokens go through the model: two
sequences, each alone and outside any pass; both packed into one; one as long as both split over two ranks, which are
threads here. And one whose positions are told, from 0, beside one that the model itself gives positions. All of it in
evaluation mode; the two also in the modes in which the model's modules train, with dropouts that draw by token.

What rounding may do is measured too: the same run with every module's output off by a few units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from heteromesh.comm.in_process import run_threads
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import PassContext, prepare_pass
from heteromesh.parallel.attention.layout import layout_of
from heteromesh.parallel.model.call import IGNORED, ModelCall, eagerly, plain_name, uncompiled
from heteromesh.parallel.model.draws import token_places
from heteromesh.parallel.model.randomness import PassRandomness
from heteromesh.parallel.model.rotary import follow_lengths
from heteromesh.parallel.model.trace import Trace, Tracer
from heteromesh.parallel.model.undisturbed import modes_kept, undisturbed
from heteromesh.planner.plan import Pass

SIZE = 13
"""Tokens of each of the two sequences that are packed; the one that is split has both."""
_ROUNDINGS = 4.0
"""Units in the last place by which outputs are moved to see what rounding does."""
_SURE = 32.0
"""Times what rounding does, from which on a difference is none of it."""


_ALONE = (
    ": it is called with a row of token ids and their position_ids, and no mask; make that work, or train another "
    "model (some of Transformers' can't do with attn_implementation='heteromesh')"
)
_PASSES = (
    ", though not on each alone: a pass has one row of all its tokens, position_ids that begin anew, and no mask; let "
    "attention go through hm.attention (Transformers: attn_implementation='heteromesh')"
)

_MIXES = (
    "mixes tokens outside hm.attention or looks at the positions of all tokens at once; have it use hm.attention or "
    "hm.linear_attention and each token's own position (Transformers: attn_implementation='heteromesh'), or train a "
    "model without it"
)
_DRAWS = (
    "looks at all tokens of the pass (batch statistics) or draws random numbers in their order; have it normalise each "
    "token by itself, call dropout as torch.nn.functional.dropout or nn.Dropout, or put it in evaluation mode"
)


@dataclass(frozen=True, slots=True)
class _Input:
    """Sequences in a row: (1, n) each."""

    tokens: torch.Tensor
    positions: torch.Tensor | None
    """None: the model's own."""
    labels: torch.Tensor

    def at(self, places: torch.Tensor) -> _Input:
        """Returns some of the tokens."""
        assert self.positions is not None
        return _Input(self.tokens[:, places], self.positions[:, places], self.labels[:, places])


@dataclass(frozen=True, slots=True)
class _Run:
    """What came of a run: losses (n,) and the modules' calls."""

    losses: torch.Tensor
    trace: Trace


@torch.no_grad()
def check_model(model: nn.Module, sample: torch.Tensor, longest: int, *, split: bool, own_loss: bool = False) -> None:
    """Returns where packed and, with `split`, split sequences come out as each alone; the model is as before.

    sample: token ids (n,) of the data, one at least. longest: tokens of the data's longest sequence, up to which
    positions are tried. own_loss: the model's outputs are no logits of labels. Raises UserError, naming the
    first layer that differs, where they don't.
    """
    size = min(SIZE, longest)
    device = next(model.parameters()).device
    tokens = sample[torch.arange(2 * size) * 7 % len(sample)].to(device)
    pair = [_sequence(tokens[:size], 0), _sequence(tokens[size:], 0)]
    # beside the end of the longest sequence what depends on all positions of a pass shows
    far = _sequence(tokens[:size], longest - size)
    whole = _sequence(tokens[: min(2 * size, longest)], 0)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        for hook in follow_lengths(model):
            stack.callback(hook.remove)
        stack.enter_context(exactly(model))
        tracer = Tracer(model)
        stack.enter_context(tracer.attached())
        trial = _Trial(model, tracer, device, own_loss)
        with modes_kept(model):
            model.eval()
            trial.compare_packed(pair, far)
            if split and whole.tokens.numel() > 1:
                trial.compare_split(whole)
        if any(module.training for module in model.modules()):
            trial.compare_training(pair)


class _Trial:
    """Runs of one model."""

    def __init__(self, model: nn.Module, tracer: Tracer, device: torch.device, own_loss: bool) -> None:
        self._model, self._tracer, self._device = model, tracer, device
        self._call, self._own_loss = ModelCall(model), own_loss

    def compare_packed(self, pair: Sequence[_Input], far: _Input) -> None:
        """Compares two sequences in one pass, `far` behind them, with each alone."""
        row = [*pair, far]
        lengths = [x.tokens.numel() for x in row]
        whole, context = _in_a_row(row), self._packed(lengths)
        alone = [self._attempt("a sequence alone", partial(self._run, x), _ALONE) for x in pair]
        rounded = [self._run_rounded(x) for x in pair]
        self._compare_positions(pair[0], alone[0], rounded[0])
        seen = self._attempt("packed sequences", lambda: self._run(whole, context))
        kept = torch.arange(sum(lengths[:2]))
        self._judge("packed sequences", _joined(alone), _joined(rounded), _joined([seen], kept))

    def _packed(self, lengths: Sequence[int]) -> PassContext:
        sequences, shards = tuple(range(len(lengths))), (tuple(lengths),)
        plan = Pass(ranks=(0,), method="local", sequences=sequences, shards=shards, seconds=0.0)
        return prepare_pass(plan, lengths, World(device=self._device), (1.0,))

    def _compare_positions(self, x: _Input, told: _Run, rounded: _Run) -> None:
        """Compares a sequence whose positions were told, from 0, with one that the model itself gives positions."""
        try:
            own = self._run(replace(x, positions=None))
        except Exception:
            return  # it must be told them
        off = _off(own, told)
        if off > _allowed(_off(rounded, told), _scale(told), self._epsilon()):
            raise UserError(
                f"{_name(self._model)} gives other losses without position_ids than with those from 0, off by "
                f"{off:.2g}: a pass tells each token's position in its sequence, from 0; wrap the model in a module "
                "that adds to position_ids what it adds where it has none, or train another one"
            )

    def compare_split(self, whole: _Input) -> None:
        """Compares one sequence over two ranks with the same alone."""
        count = whole.tokens.numel()
        shards = ((count - count // 2,), (count // 2,))
        plan = Pass(ranks=(0, 1), method="gather", sequences=(0,), shards=shards, seconds=0.0)
        held = layout_of(plan, [count]).segments
        places = [torch.cat([torch.arange(s.start, s.end) for s in segments]) for segments in held]

        def member(world: World) -> _Run:
            context = prepare_pass(plan, [count], world, (1.0, 1.0))
            with torch.no_grad():
                return self._run(whole.at(places[world.rank].to(self._device)), context)

        def both() -> _Run:
            return _joined(run_threads(2, self._device, member), torch.cat(places).argsort())

        seen = self._attempt("a sequence over two ranks", both)
        self._judge("a sequence over two ranks", self._run(whole), self._run_rounded(whole), seen)

    def compare_training(self, pair: Sequence[_Input]) -> None:
        """Compares two sequences in one pass with each in a pass of its own, in the modes in which modules train."""
        randomness = PassRandomness(self._model)

        def run(row: Sequence[_Input], first: int, act: Callable[[_Input, PassContext], _Run]) -> _Run:
            """Runs a pass of some of the step's sequences, from `first` on."""
            context = self._packed([x.tokens.numel() for x in row])
            places = range(first, first + len(row))
            drawn = token_places(context.layout.segments[0], places, self._device)
            with randomness.during(0, 1, drawn):
                return act(_in_a_row(row), context)

        try:
            alone, rounded = (
                _joined([run([x], i, act) for i, x in enumerate(pair)]) for act in (self._run, self._run_rounded)
            )
            what = "packed sequences in training mode"
            seen = self._attempt(what, lambda: run(pair, 0, self._run))
            self._judge(what, alone, rounded, seen, _DRAWS)
        finally:
            randomness.close()

    def _run(self, x: _Input, context: PassContext | None = None) -> _Run:
        with context.active() if context else nullcontext(), self._tracer.run(x.tokens.numel()) as trace:
            if self._own_loss:
                losses = _one_number(self._call.outputs(x.tokens, x.positions))
            else:
                losses = self._call.losses(x.tokens, x.positions, x.labels)
        return _Run(losses.double().cpu(), trace)

    def _run_rounded(self, x: _Input, context: PassContext | None = None) -> _Run:
        with _rounded(self._model):
            return self._run(x, context)

    def _attempt(self, what: str, act: Callable[[], _Run], way_out: str = _PASSES) -> _Run:
        try:
            return act()
        except UserError:
            raise
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{_name(self._model)} fails on {what} ({type(error).__name__}: {line}){way_out}"
            ) from error

    def _judge(self, what: str, alone: _Run, rounded: _Run, seen: _Run, why: str = _MIXES) -> None:
        """Raises UserError where what was seen differs from each alone by more than rounding does."""
        off, noise = _off(seen, alone), _off(rounded, alone)
        if off > _allowed(noise, _scale(alone), self._epsilon()) or off != off:
            self._refuse(what, off, noise, _culprit(alone.trace, rounded.trace, seen.trace, self._epsilon()), why)

    def _epsilon(self) -> float:
        dtypes = [p.dtype for p in self._model.parameters() if p.is_floating_point()]
        # models in float64 compute some of it in float32 all the same (routers, rotary embeddings)
        return max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32) if dtype.itemsize > 1)

    def _refuse(self, what: str, off: float, noise: float, layer: str, why: str) -> NoReturn:
        modules = {plain_name(n): m for n, m in self._model.named_modules()}
        kind = f" ({type(uncompiled(modules[layer])).__name__})" if layer in modules else ""
        raise UserError(
            f"{_name(self._model)} gives other losses for {what} than for each alone, off by {off:.2g} where rounding "
            f"explains {noise:.1g}: {layer}{kind} is the first to differ, as it {why} (docs/assumptions.md)"
        )


def _in_a_row(row: Sequence[_Input]) -> _Input:
    return _Input(*(torch.cat([getattr(x, name) for x in row], 1) for name in ("tokens", "positions", "labels")))


def _off(run: _Run, alone: _Run) -> float:
    return float((run.losses - alone.losses).abs().max())


def _scale(alone: _Run) -> float:
    return max(1.0, float(alone.losses.abs().max()))


def _allowed(noise: float, scale: float, epsilon: float) -> float:
    return _SURE * (noise + _ROUNDINGS * epsilon * scale)


def _culprit(alone: Trace, rounded: Trace, seen: Trace, epsilon: float) -> str:
    """Returns the first module that makes something else of the same, or the first that differs at all."""

    def differs(key: tuple[str, int], side: str) -> bool:
        values = [getattr(t.calls[key], side) for t in (alone, rounded, seen) if key in t.calls]
        present: list[torch.Tensor] = [v for v in values if v is not None]
        if len(present) < 3:
            return False
        own, near, other = present
        noise, scale = float((near - own).abs().max()), float(own.abs().max())
        return float((other - own).abs().max()) > _allowed(noise, scale, epsilon)

    different = [key for key in seen.calls if differs(key, "made")]
    first = next((key for key in different if not differs(key, "given")), None)
    return (first or next(iter(different), ("the model", 0)))[0]


def _sequence(tokens: torch.Tensor, first: int) -> _Input:
    """Returns a sequence whose first token is at position `first`, to be told its next tokens."""
    positions = torch.arange(first, first + len(tokens), device=tokens.device)
    labels = torch.cat([tokens[1:], torch.full_like(tokens[:1], IGNORED)])
    return _Input(tokens[None], positions[None], labels[None])


def _one_number(outputs: torch.Tensor) -> torch.Tensor:
    """Returns (n,) of outputs (n, ...): a sum of all with weights that let nothing cancel out."""
    flat = outputs.flatten(1)
    return flat @ torch.arange(1.0, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype).sqrt() / flat.shape[1]


def _joined(runs: Sequence[_Run], order: torch.Tensor | None = None) -> _Run:
    """Returns runs as one; order: where its tokens are in the row of all."""
    losses, trace = torch.cat([run.losses for run in runs]), Trace.joined([run.trace for run in runs])
    if order is None:
        return _Run(losses, trace)
    for call in trace.calls.values():
        call.given = call.given if call.given is None else call.given[order]
        call.made = call.made if call.made is None else call.made[order]
    return _Run(losses[order], trace)


@contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """Moves what the model's innermost modules return by a few units in the last place."""
    generator = torch.Generator().manual_seed(0)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point() or not output.numel():
            return None
        signs = (torch.randint(2, output.shape[-1:], generator=generator) * 2 - 1).to(output)
        return output * (1 + _ROUNDINGS * torch.finfo(output.dtype).eps * signs)

    leaves = [m for m in model.modules() if next(m.children(), None) is None]
    hooks = [m.register_forward_hook(hook, prepend=True) for m in leaves]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """Computes in float32 at least, where the device has room, and without compilers within the block."""
    halves = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    if halves and halves[0].device.type == "cuda":
        free = torch.cuda.mem_get_info(halves[0].device)[0]
        halves = halves if 4 * sum(t.numel() for t in {_memory(t): t for t in halves}.values()) < 0.9 * free else []
    originals = [t.data for t in halves]
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        # what shares memory (weights that stand in for several layers') goes on sharing it
        made = {_memory(t): t.detach().float() for t in {_memory(t): t for t in halves}.values()}
        for tensor in halves:
            tensor.data = made[_memory(tensor)]
        made.clear()
        with eagerly(model):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for tensor, original in zip(halves, originals, strict=True):
            tensor.data = original


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage().data_ptr()
    # without elements there is no memory to be told apart by
    return (storage or id(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def _name(model: nn.Module) -> str:
    return type(uncompiled(model)).__name__
