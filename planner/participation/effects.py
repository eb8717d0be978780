"""What each class of hosts adds to a step or costs it, and what faster NICs would change: by planning again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from heteromesh.planner.cluster.cluster import Nic
from heteromesh.planner.participation.layout import Setting
from heteromesh.planner.participation.search import Participation, ParticipationSearch, PlannedLayout, all_subsets

RATES = (1.0, 2.5, 10.0, 25.0, 40.0, 50.0, 100.0, 200.0, 400.0, 800.0)
"""Usual NICs, Gbit/s."""
FASTER = 4.0
"""How many times faster NICs are asked about."""
WORTH_TELLING = 0.01
"""Of the step's seconds."""
SEARCH_SECONDS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A change, and the step that it would lead to."""

    what: str
    seconds: float | None
    """None: memory would not hold the model."""
    chosen_seconds: float
    """Of the plan as it is."""

    @property
    def words(self) -> str:
        """Returns the change and both seconds."""
        if self.seconds is None:
            return f"{self.what}: does not fit"
        return f"{self.what}: {self.seconds:.4g} s (planned: {self.chosen_seconds:.4g} s)"


def host_effects(setting: Setting, decision: Participation, *, seconds: float, plan_seconds: float) -> list[Effect]:
    """Returns what a step takes on all hosts, without and with each class of hosts, and with its NICs faster.

    seconds: of processor time; what it does not suffice for is left out.
    """
    began, found = time.thread_time(), []
    for make in (_executed, _everyone, _without_and_with, _faster_nics):
        for effect in make(setting, decision, plan_seconds):
            found.append(effect)
            if time.thread_time() - began > seconds:
                return found
    return found


def _executed(setting: Setting, decision: Participation, plan_seconds: float) -> Iterator[Effect]:
    if not decision.best.layout.sharded:
        return
    found = ParticipationSearch(setting, plan_seconds, SEARCH_SECONDS, least_tried=1, executed=True).run(
        all_subsets(setting)
    )
    what, best = "replicated weights, as the Trainer executes them", found.best if found else None
    if best is not None:
        hosts = sorted({setting.cluster.rank_hosts[r] for r in best.layout.ranks})
        what += f", on {host_names(setting, hosts)}"
    yield Effect(what=what, seconds=best.seconds if best else None, chosen_seconds=decision.best.seconds)


def _everyone(setting: Setting, decision: Participation, plan_seconds: float) -> Iterator[Effect]:
    everyone = tuple(range(setting.cluster.ranks))
    if decision.best.layout.ranks != everyone and len(setting.classes) > 1:
        yield _effect("all hosts working", setting, [everyone], decision, plan_seconds)


def _without_and_with(setting: Setting, decision: Participation, plan_seconds: float) -> Iterator[Effect]:
    working = set(decision.best.layout.ranks)
    for hosts in setting.classes:
        ranks = {r for h in hosts for r in setting.host_ranks[h]}
        rest = [s for s in all_subsets(setting) if not ranks.intersection(s)] if ranks & working else []
        if rest:
            yield _effect(f"without {host_names(setting, hosts)}", setting, rest, decision, plan_seconds)
        if not ranks & working:
            both = tuple(sorted(working | ranks))
            if len(both) < setting.cluster.ranks or len(setting.classes) < 2:
                yield _effect(f"with {host_names(setting, hosts)} working", setting, [both], decision, plan_seconds)


def _faster_nics(setting: Setting, decision: Participation, plan_seconds: float) -> Iterator[Effect]:
    """Asks about every class of hosts whose NICs are slower than the fastest usual ones; tells what helps."""
    working = set(decision.best.layout.ranks)
    chosen = decision.best.seconds
    if setting.cluster.measured.nic_gbit or len(setting.cluster.hosts) < 2:
        return
    for hosts in setting.classes:
        old, new = _faster(setting.cluster.hosts[hosts[0]].nics)
        if not new:
            continue
        changed = list(setting.cluster.hosts)
        for h in hosts:
            changed[h] = replace(changed[h], nics=new)
        other = replace(setting, cluster=replace(setting.cluster, hosts=tuple(changed)))
        ranks = {r for h in hosts for r in setting.host_ranks[h]}
        sets = [tuple(sorted(working)), tuple(sorted(working | ranks))]
        effect = _effect(f"{old} on {host_names(setting, hosts)}", other, sets, decision, plan_seconds)
        if effect.seconds is not None and effect.seconds < chosen * (1 - WORTH_TELLING):
            yield effect


def _faster(nics: Sequence[Nic]) -> tuple[str, tuple[Nic, ...]]:
    """Returns what becomes of the slowest NICs, in words, and all NICs then; none where no faster ones are usual."""
    slowest = min(nic.gbit for nic in nics)
    rate = next((r for r in RATES if r >= FASTER * slowest), None)
    if rate is None:
        return "", ()
    new = tuple(replace(nic, gbit=rate) if nic.gbit == slowest else nic for nic in nics)
    return f"{slowest:g} -> {rate:g} Gbit/s", new


def _effect(
    what: str, setting: Setting, subsets: Iterable[tuple[int, ...]], decision: Participation, plan_seconds: float
) -> Effect:
    found = ParticipationSearch(setting, plan_seconds, SEARCH_SECONDS, least_tried=1).run(subsets)
    best: PlannedLayout | None = None if found is None else found.best
    return Effect(what=what, seconds=best.seconds if best else None, chosen_seconds=decision.best.seconds)


def host_names(setting: Setting, hosts: Sequence[int]) -> str:
    """Returns the names of hosts, runs of neighbours shortened: g0-g2."""
    names = [setting.cluster.hosts[h].name for h in hosts]
    neighbours = list(hosts) == list(range(hosts[0], hosts[0] + len(hosts)))
    return f"{names[0]}-{names[-1]}" if len(names) > 2 and neighbours else ", ".join(names)
