"""Which side of a split goes on: one rule for a living coordinator and for the election of a new one."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def holds(there: Collection[int], quorum_sets: Iterable[Collection[int]]) -> bool:
    """Tells whether these members outvote all others of every quorum set.

    More than half of a set, or exactly half with its lowest member: any two such sets share a member, so two sides
    cannot both have one. A set is an epoch that every one of its members knew of; while a newer epoch is not known to
    all of its members, the older one counts too (joint consensus: Ongaro, Ousterhout, "In Search of an Understandable
    Consensus Algorithm", 2014, section 6).
    """
    return all(_outvotes(there, members) for members in quorum_sets)


def _outvotes(there: Collection[int], members: Collection[int]) -> bool:
    present = sum(member in there for member in members)
    return not members or 2 * present > len(members) or (2 * present == len(members) and min(members) in there)
