"""Why a model does not fit, rank by rank, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from heteromesh.errors import UserError
from heteromesh.planner.ownership.memory import replicated_memory, replicated_tokens
from heteromesh.planner.participation.layout import SHARDED, SHARDED_OPTIMIZER, Setting
from heteromesh.planner.participation.search import decide
from heteromesh.planner.participation.sharded import Part, sharded_shortage

HALVINGS = 6
HOST_MEMORY_GB = (64.0, 256.0, 1024.0)
SEARCH_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """Ranks that lack memory under a layout."""

    layout: str
    ranks: tuple[int, ...]
    device: str
    gigabytes: float
    """That each of them lacks, at most."""

    @property
    def words(self) -> str:
        """Returns how much is missing where."""
        first, last = self.ranks[0], self.ranks[-1]
        where = f"rank {first}" if first == last else f"each of ranks {first}-{last}"
        return f"{self.gigabytes:.1f} GB on {where} ({self.device})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change with which the model fits."""

    what: str
    seconds: float
    """Of the step that is then planned."""


class DoesNotFit(UserError):
    """No layout on any of a cluster's hosts holds the model: which ranks are short, and what helps."""

    def __init__(self, message: str, short: Sequence[Short], remedies: Sequence[Remedy]) -> None:
        super().__init__(message)
        self.short, self.remedies = tuple(short), tuple(remedies)

    def __reduce__(self) -> tuple[Any, ...]:
        # ranks tell each other, and an exception is made anew from its message alone
        return type(self), (str(self), self.short, self.remedies)

    def document(self) -> dict[str, Any]:
        """Returns the error as a JSON object."""
        return {
            "error": str(self),
            "short": [asdict(s) for s in self.short],
            "remedies": [asdict(r) for r in self.remedies],
        }


def replicated_short(setting: Setting) -> list[Short]:
    """Returns who lacks memory for replicated weights, with recomputation and an evenly sharded optimizer."""
    ranks = tuple(range(setting.cluster.ranks))
    token = replicated_tokens(setting.model, checkpointing=setting.checkpointing is not False).per_pass
    missing = {}
    for r in ranks:
        size = setting.device_bytes(r)
        missing[r] = replicated_memory(setting.model, device_bytes=size, optimizer=1 / len(ranks)).total + token - size
    return _grouped(setting, SHARDED_OPTIMIZER, {r: m for r, m in missing.items() if m > 0})


def sharded_short(setting: Setting) -> list[Short]:
    """Returns who lacks memory for sharded weights with the shortest passes."""
    missing = sharded_shortage(setting, Part(tuple(range(setting.cluster.ranks))))
    return _grouped(setting, SHARDED, missing)


def does_not_fit(setting: Setting, *, plan_seconds: float) -> DoesNotFit:
    """Returns the error for a setting for which `decide` found nothing."""
    short = [*replicated_short(setting), *sharded_short(setting)]
    remedies = sorted(_remedies(setting, plan_seconds), key=lambda r: r.seconds)
    lines = [
        f"{kind} weights lack {'; '.join(s.words for s in some)}"
        for kind, name in (("replicated", SHARDED_OPTIMIZER), ("sharded", SHARDED))
        if (some := [s for s in short if s.layout == name])
    ]
    ways = [f"{r.what} ({r.seconds:.4g} s a step)" for r in remedies]
    way_out = "; ".join(ways) if ways else "take devices with more memory, more hosts or a smaller model"
    name, longest = setting.model.name, max(setting.batch)
    message = (
        f"model {name} does not fit on this cluster with sequences of up to {longest} tokens and {setting.tokens} a "
        f"step: {'; '.join(lines) or 'its passes have too little room'}; what helps: {way_out}"
    )
    return DoesNotFit(message, short, remedies)


def _remedies(setting: Setting, plan_seconds: float) -> Iterator[Remedy]:
    for what, other in _changes(setting):
        decision = decide(other, seconds=SEARCH_SECONDS, plan_seconds=plan_seconds)
        if decision is not None:
            yield Remedy(what=what, seconds=decision.best.seconds)


def _changes(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Yields changes of the setting, of each kind the smallest that could help first; one of a kind is enough."""
    if setting.checkpointing is False:
        yield "recomputation (--fix checkpointing=on)", replace(setting, checkpointing=True)
    for change in (_shorter, _fewer, _hosts_memory):
        for what, other in change(setting):
            if decide(other, seconds=0.0, plan_seconds=0.01) is not None:
                yield what, other
                break


def _shorter(setting: Setting) -> Iterator[tuple[str, Setting]]:
    length = max(setting.batch)
    for _ in range(HALVINGS):
        length //= 2
        batch = tuple(n for n in setting.batch if n <= length)
        if batch:
            yield (
                f"shorter passes: sequences of at most {length} tokens (--fix max_length={length})",
                replace(setting, batch=batch),
            )


def _fewer(setting: Setting) -> Iterator[tuple[str, Setting]]:
    count = len(setting.batch)
    for _ in range(HALVINGS):
        count //= 2
        if count:
            what = f"fewer tokens a step: {count} of the {len(setting.batch)} sequences (--batch-sequences {count})"
            yield what, replace(setting, batch=setting.batch[:count])


def _hosts_memory(setting: Setting) -> Iterator[tuple[str, Setting]]:
    for size in HOST_MEMORY_GB:
        hosts = tuple(replace(h, memory_gb=max(size, h.memory_gb or 0.0)) for h in setting.cluster.hosts)
        if hosts != setting.cluster.hosts:
            what = (
                f"optimizer state and layer inputs in host memory: {size:g} GB a host (memory_gb of [[hosts]]; the "
                "Trainer moves the state, but not layer inputs yet)"
            )
            yield what, replace(setting, cluster=replace(setting.cluster, hosts=hosts))


def _grouped(setting: Setting, layout: str, missing: Mapping[int, float]) -> list[Short]:
    """Returns neighbouring ranks of a device with the most that one of them lacks."""
    found = []
    for device, own in groupby(sorted(missing), key=setting.cluster.device_name):
        ranks = tuple(own)
        most = max(missing[r] for r in ranks) / 1e9
        found.append(Short(layout=layout, ranks=ranks, device=device, gigabytes=round(most, 2)))
    return found
