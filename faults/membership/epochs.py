"""A job's epochs, steps and commits, as the coordinator decides them. No network, no clock."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from heteromesh.faults.wire.messages import CommitNotice, NewEpoch, Vote


def next_link(chain: str, step: int, digest: str) -> str:
    """Extends the hash chain over all committed steps: equal chains mean equal histories."""
    return hashlib.blake2b(f"{chain}|{step}|{digest}".encode(), digest_size=16).hexdigest()


@dataclass(slots=True)
class Epochs:
    """The authority on a job: who is in it, what has been committed, who holds the state of the last commit."""

    members: list[int] = field(default_factory=list)
    """Ids in rank order."""
    epoch: int = 0
    committed: int = 0
    """Steps that are committed."""
    chain: str = ""
    current: set[int] = field(default_factory=set)
    """Members that hold, or will hold when they have read their messages, the state after `committed` steps."""
    votes: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Each member's result in this epoch: (step, digest)."""
    losses: int = 0
    """Epochs that ended without a commit since the last one."""
    blamed: Counter[frozenset[int]] = field(default_factory=Counter)
    """Pairs of members between whom connections have failed since the last commit."""

    def announcement(self) -> NewEpoch:
        """Returns the epoch as its members must know it, but for who they are."""
        return NewEpoch(
            epoch=self.epoch,
            members=tuple(self.members),
            stale=tuple(m for m in self.members if m not in self.current),
            committed=self.committed,
            chain=self.chain,
        )

    def change(self, members: list[int]) -> None:
        """Begins the next epoch, with these members."""
        self.members = members
        self.current &= set(members)
        self.blamed = Counter({pair: n for pair, n in self.blamed.items() if pair <= set(members)})
        self.epoch += 1
        self.votes.clear()
        self.losses += 1

    def healed(self, member: int, epoch: int, step: int) -> None:
        """Counts a member that has got the state: a property of the member, not of the epoch in which it happened.

        One that reports an older state stays stale (research/fault-tolerance.md, section 7, bug a).
        """
        if step == self.committed and member in self.members and epoch <= self.epoch:
            self.current.add(member)

    def vote(self, member: int, vote: Vote) -> bool:
        """Counts a member's result of a step; True when it was the last of all members.

        What comes from an older epoch is ignored.
        """
        known = member in self.members and member in self.current
        if not known or vote.epoch != self.epoch or vote.step != self.committed:
            return False
        self.votes[member] = (vote.step, vote.digest)
        return len(self.votes) == len(self.members)

    def agreed(self) -> bool:
        """Tells whether every member has the same result."""
        return len(set(self.votes.values())) == 1

    def minority(self) -> list[int]:
        """Returns the members whose result is not the most frequent one (the lowest member's among equals)."""
        counts = Counter(self.votes[m] for m in self.members)
        best = max(counts.values())
        chosen = next(self.votes[m] for m in self.members if counts[self.votes[m]] == best)
        return [m for m in self.members if self.votes[m] != chosen]

    def most_blamed(self) -> int:
        """Returns the member in most of the failed connections; the highest among equals."""
        counts = Counter(member for pair in self.blamed.elements() for member in pair)
        return max(self.members, key=lambda m: (counts[m], m))

    def commit(self) -> CommitNotice:
        """Commits the step that all members have voted on."""
        step, digest = self.votes[self.members[0]]
        self.chain = next_link(self.chain, step, digest)
        self.committed = step + 1
        self.votes.clear()
        self.losses = 0
        self.blamed.clear()
        return CommitNotice(epoch=self.epoch, committed=self.committed, chain=self.chain)
