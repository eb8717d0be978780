"""Which side of a split goes on: one rule for a living coordinator and for the election of a new one."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def holds(there: Collection[int], bases: Iterable[Collection[int]]) -> bool:
    """Whether these members outvote all others of every base.

    More than half of a base, or exactly half with its lowest member: any two such sets share a member, so two sides
    cannot both have one. A base is an epoch that every one of its members knew of; while a newer epoch is not known to
    all of its members, the older one counts too (joint consensus: Ongaro, Ousterhout, "In Search of an Understandable
    Consensus Algorithm", 2014, section 6).
    """
    return all(_outvotes(there, base) for base in bases)


def _outvotes(there: Collection[int], base: Collection[int]) -> bool:
    present = sum(member in there for member in base)
    return not base or 2 * present > len(base) or (2 * present == len(base) and min(base) in there)
