"""Which ranks send which states of linear attention to whom (parallel.linear)."""

from __future__ import annotations

from dataclasses import dataclass

from heteromesh.planner.splitting.layout import Layout, Segment


@dataclass(frozen=True)
class StateRoute:
    """One member's part: states go to later segments, their gradients come back."""

    needs: dict[Segment, tuple[Segment, ...]]
    """The other segments whose states an own segment's tokens see, in the order of the sequence."""
    feeds: dict[Segment, tuple[Segment, ...]]
    """The other segments that see an own segment's state."""
    sends: dict[int, tuple[Segment, ...]]
    """Own segments whose states a peer needs."""
    receives: dict[int, tuple[Segment, ...]]
    """A peer's segments whose states are needed here."""
    gradient_receives: dict[int, tuple[Segment, ...]]
    """A peer's segments that see a state of this member, and so have a gradient for it."""
    gradient_sends: dict[int, tuple[Segment, ...]]
    """Own segments that have a gradient for a state of a peer's."""

    @property
    def shared(self) -> frozenset[Segment]:
        """Own segments whose state somebody needs."""
        return frozenset(s for s, others in self.feeds.items() if others)


def state_routes(layout: Layout, *, causal: bool) -> tuple[StateRoute, ...]:
    """Returns one route a member. Causal attention sees the states of earlier segments of a sequence, full of all
    others.
    """
    by_sequence: dict[int, list[tuple[int, Segment]]] = {}
    for member, segments in enumerate(layout.segments):
        for s in segments:
            by_sequence.setdefault(s.sequence, []).append((member, s))
    for held in by_sequence.values():
        held.sort(key=lambda entry: entry[1].start)

    def seen(s: Segment) -> list[tuple[int, Segment]]:
        return [(i, o) for i, o in by_sequence[s.sequence] if (o.start < s.start if causal else o != s)]

    def seeing(s: Segment) -> list[tuple[int, Segment]]:
        return [(i, o) for i, o in by_sequence[s.sequence] if (o.start > s.start if causal else o != s)]

    routes = []
    for member, own in enumerate(layout.segments):
        needs, feeds = {s: seen(s) for s in own}, {s: seeing(s) for s in own}
        routes.append(
            StateRoute(
                needs={s: tuple(o for _, o in others) for s, others in needs.items()},
                feeds={s: tuple(o for _, o in others) for s, others in feeds.items()},
                sends=_own_by_peer(member, feeds),
                receives=_others_by_peer(member, needs),
                gradient_receives=_others_by_peer(member, feeds),
                gradient_sends=_own_by_peer(member, needs),
            )
        )
    return tuple(routes)


Links = dict[Segment, list[tuple[int, Segment]]]


def _own_by_peer(member: int, links: Links) -> dict[int, tuple[Segment, ...]]:
    """Returns own segments that are linked to a peer, sorted, each once."""
    found: dict[int, set[Segment]] = {}
    for own, others in links.items():
        for peer, _ in others:
            if peer != member:
                found.setdefault(peer, set()).add(own)
    return _sorted(found)


def _others_by_peer(member: int, links: Links) -> dict[int, tuple[Segment, ...]]:
    """Returns a peer's segments that are linked to own ones, sorted, each once."""
    found: dict[int, set[Segment]] = {}
    for others in links.values():
        for peer, other in others:
            if peer != member:
                found.setdefault(peer, set()).add(other)
    return _sorted(found)


def _sorted(found: dict[int, set[Segment]]) -> dict[int, tuple[Segment, ...]]:
    return {
        peer: tuple(sorted(segments, key=lambda s: (s.sequence, s.start))) for peer, segments in sorted(found.items())
    }
