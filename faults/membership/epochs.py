"""One group's epochs, steps and commits, as the coordinator decides them. No network, no clock."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from heteromesh.faults.wire.messages import Message


def next_link(chain: str, step: int, digest: str) -> str:
    """The hash chain over all committed steps: equal chains mean equal histories."""
    return hashlib.blake2b(f"{chain}|{step}|{digest}".encode(), digest_size=16).hexdigest()


@dataclass(slots=True)
class Epochs:
    """The authority on one group: who is in it, what has been committed, who holds the state of the last commit."""

    name: str
    members: list[int] = field(default_factory=list)
    """Ids in rank order."""
    epoch: int = 0
    committed: int = 0
    """Steps that are committed."""
    chain: str = ""
    current: set[int] = field(default_factory=set)
    """Members that hold, or will hold when they have read their messages, the state after `committed` steps."""
    fins: dict[int, tuple[int, str]] = field(default_factory=dict)
    """What each member has finished in this epoch: (step, digest)."""
    losses: int = 0
    """Epochs that ended without a commit since the last one."""
    blamed: Counter[frozenset[int]] = field(default_factory=Counter)
    """Pairs of members between whom connections have failed since the last commit."""

    def config(self) -> Message:
        """The epoch as its members must know it. `stale`: those that need the state before they can take part."""
        return {
            "kind": "config",
            "group": self.name,
            "epoch": self.epoch,
            "members": self.members,
            "stale": [m for m in self.members if m not in self.current],
            "committed": self.committed,
            "chain": self.chain,
        }

    def change(self, members: list[int]) -> None:
        """The next epoch, with these members."""
        self.members = members
        self.current &= set(members)
        self.blamed = Counter({pair: n for pair, n in self.blamed.items() if pair <= set(members)})
        self.epoch += 1
        self.fins.clear()
        self.losses += 1

    def healed(self, member: int, epoch: int, step: int) -> None:
        """A member has got the state: a property of the member, not of the epoch in which it happened.

        One that reports an older state stays stale (research/fault-tolerance.md, section 7, bug a).
        """
        if step == self.committed and member in self.members and epoch <= self.epoch:
            self.current.add(member)

    def finish(self, member: int, epoch: int, step: int, digest: str) -> bool:
        """A member has the result of a step, not applied yet. True when it was the last of all members.

        What comes from an older epoch is ignored.
        """
        if epoch != self.epoch or member not in self.members or step != self.committed or member not in self.current:
            return False
        self.fins[member] = (step, digest)
        return len(self.fins) == len(self.members)

    def agreed(self) -> bool:
        """Every member has the same result."""
        return len(set(self.fins.values())) == 1

    def minority(self) -> list[int]:
        """The members whose result is not the most frequent one (the lowest member's among equals)."""
        counts = Counter(self.fins[m] for m in self.members)
        best = max(counts.values())
        chosen = next(self.fins[m] for m in self.members if counts[self.fins[m]] == best)
        return [m for m in self.members if self.fins[m] != chosen]

    def most_blamed(self) -> int:
        """The member in most of the failed connections; the highest among equals."""
        counts = Counter(member for pair in self.blamed.elements() for member in pair)
        return max(self.members, key=lambda m: (counts[m], m))

    def commit(self) -> Message:
        """Commits the step that all members have finished."""
        step, digest = self.fins[self.members[0]]
        self.chain = next_link(self.chain, step, digest)
        self.committed = step + 1
        self.fins.clear()
        self.losses = 0
        self.blamed.clear()
        return {
            "kind": "commit",
            "group": self.name,
            "epoch": self.epoch,
            "committed": self.committed,
            "chain": self.chain,
        }
