"""Who goes on after losses: quorums, what an elected coordinator makes of reports, and random histories of both."""

import random
from dataclasses import dataclass, field, replace

import pytest

from heteromesh.faults.coordinator.election import Election
from heteromesh.faults.membership.membership import Bounds, Membership
from heteromesh.faults.membership.quorum import holds
from heteromesh.faults.membership.view import view_of
from heteromesh.faults.wire.messages import (
    CommitNotice,
    EpochReport,
    Evicted,
    Healed,
    Heartbeat,
    JoinInfo,
    Leave,
    NewEpoch,
    Rejoin,
    Vote,
)


def info(elects=True):
    return JoinInfo(name="", addresses=(("h", 1),), facts={}, elects=elects)


def started(size, elects=True):
    """A job whose members all know the first epoch."""
    membership = Membership(Bounds())
    for _ in range(size):
        membership.join(info(elects))
    membership.admit()
    know(membership)
    return membership


def know(membership, *members):
    for member in members or membership.world.members:
        membership.knows(member, membership.world.epoch)


def rejoin(member, epoch, *, stale=False, **changes):
    """What a member says that has told its coordinator to know of this epoch."""
    values = {
        "epoch": epoch.epoch,
        "known": epoch.epoch,
        "committed": epoch.committed,
        "chain": epoch.chain,
        "members": epoch.members,
        "quorum_sets": epoch.quorum_sets,
    }
    places = tuple((("h", 1),) for _ in epoch.members)
    return Rejoin(member, EpochReport(**{**values, **changes}, stale=stale, addresses=places), info())


def report(membership, member, **changes):
    """What a member says that has heard of the coordinator's last epoch."""
    epoch = replace(membership.world.announcement(), quorum_sets=membership.say())
    return rejoin(member, epoch, **changes)


@pytest.mark.parametrize(
    ("there", "members", "wanted"),
    [
        ([1, 2], [1, 2, 3], True),
        ([1], [1, 2, 3], False),
        ([1, 4], [1, 2, 3, 4], True),
        ([2, 3], [1, 2, 3, 4], False),
        ([1], [1, 2], True),
        ([2], [1, 2], False),
        ([], [], True),
        ([1, 2, 9, 8], [1, 2, 3, 4, 5], False),
    ],
)
def test_more_than_half_or_half_with_the_lowest(there, members, wanted):
    assert holds(there, [members]) == wanted
    assert holds(there, [members, there]) == wanted


def test_a_coordinator_goes_on_while_it_has_a_quorum():
    membership = started(4)
    membership.lose(3, "silent")
    assert membership.lost_quorum() is None
    membership.lose(4, "silent")
    assert membership.lost_quorum() is None  # exactly half, with the lowest
    membership.lose(1, "silent")
    assert "members [2] are not the larger part of [1, 2, 3, 4]" in membership.lost_quorum()


def test_losses_that_the_others_have_heard_of_are_no_split():
    membership = started(6)
    for member in (1, 2, 3, 4, 5):
        membership.lose(member, "died")
        if len(membership.world.members) > 1:
            assert membership.lost_quorum() is None
            know(membership)
    assert membership.lost_quorum() is not None  # of 5 and 6 the higher is left
    membership = started(6)
    for member in (1, 2, 3, 4, 5):
        membership.lose(member, "left")
        assert membership.lost_quorum() is None


def test_half_of_the_members_without_the_lowest_is_outvoted_only_where_others_could_elect():
    for elects in (False, True):
        membership = started(4, elects)
        membership.lose(1, "silent")
        membership.lose(2, "silent")
        assert (membership.lost_quorum() is not None) == elects


def test_an_epoch_that_some_have_not_heard_of_does_not_count_alone():
    membership = started(5)
    membership.lose(1, "silent")
    know(membership, 2, 3)  # 4 and 5 have not said that they know of it
    membership.lose(2, "silent")
    assert membership.lost_quorum() is None
    membership.lose(3, "silent")
    assert membership.lost_quorum() is not None
    # 4 and 5 may still say it, but are half of 2, 3, 4 and 5 without the lowest
    assert not membership.may_regain_quorum()


def test_what_a_member_said_before_its_loss_counts():
    """Of 1 to 5, 3 is lost; 4 and 5 say that they know of it before they are lost too."""
    membership = started(5)
    membership.lose(3, "silent")
    know(membership, 4, 5)
    membership.lose(4, "silent")
    assert membership.lost_quorum() is None
    membership.lose(5, "silent")
    assert membership.lost_quorum() is not None  # of five, as far as is known
    assert membership.may_regain_quorum()
    membership.knows(1, 2)
    assert membership.lost_quorum() is not None
    membership.knows(2, 2)
    assert membership.lost_quorum() is None  # 1 and 2 are half of 1, 2, 4, 5, with the lowest
    assert membership.quorum_sets[0] == [1, 2, 4, 5]


def test_commit_tells_that_all_know_of_its_epoch():
    membership = started(5)
    membership.lose(5, "died")
    for member in (1, 2, 3, 4):
        vote = Vote(epoch=membership.world.epoch, step=0, digest="d")
        assert bool(membership.vote(member, vote)) == (member == 4)
    assert membership.quorum_sets == [[1, 2, 3, 4]]


def test_silent_members_are_lost_together():
    membership = started(5)
    orders = membership.lose_all([3, 4, 5, 9], "silent")
    assert membership.world.epoch == 2
    assert [member for member, message in orders if isinstance(message, NewEpoch)] == [1, 2]
    assert membership.lost_quorum() is not None


def test_commit_that_only_some_have_heard_of_stands():
    election = Election()
    assert not election.quorum()
    for member, committed, stale in ((3, 6, False), (4, 5, True), (1, 5, False)):
        epoch = NewEpoch(epoch=2, members=(1, 2, 3, 4), stale=(), committed=committed, chain=f"c{committed}")
        election.add(rejoin(member, epoch, stale=stale))
        assert election.quorum() == (member == 1)
    assert election.missing() == {2: (("h", 1),)}
    membership = Membership(Bounds(), people=dict.fromkeys((1, 3, 4), info()))
    orders = election.conclude(membership)
    epoch = orders[0][1]
    assert [member for member, _ in orders] == [1, 3, 4]
    assert (epoch.committed, epoch.chain, epoch.stale) == (6, "c6", (4,))
    assert epoch.epoch > 1000  # whatever the lost coordinator may have counted on to
    assert epoch.quorum_sets == ((1, 2, 3, 4),)
    assert view_of(epoch, 3).quorum_sets == ((1, 2, 3, 4),)
    assert membership.join(info()) == 5
    # the old epoch's members have their say until all of the new one's have heard of it
    membership.lose(4, "silent")
    membership.lose(3, "silent")
    assert membership.lost_quorum() is not None


def test_strangers_do_not_vote():
    election = Election()
    older, newer = started(3), started(3)
    newer.lose(3, "silent")
    know(newer)
    for member in (3, 2):
        election.add(report(newer if member == 2 else older, member))
    # the newest epoch that anyone knows has members 1 and 2
    assert not election.quorum()
    election.add(report(newer, 1))
    assert not election.missing()
    assert election.quorum()
    membership = Membership(Bounds(), people=dict.fromkeys((1, 2, 3), info()))
    orders = election.conclude(membership)
    assert [(m, type(o)) for m, o in orders] == [(3, Evicted), (1, NewEpoch), (2, NewEpoch)]


def test_an_epoch_that_one_of_it_has_not_told_of_has_no_say():
    """Of 1 to 5, 3 is put out, then 4; 5 has heard of neither. Then 3, 4 and 5 are cut off from 1 and 2."""
    membership = started(5)
    first = report(membership, 3)
    membership.lose(3, "silent")
    second = report(membership, 4)
    election = Election()
    for told in (first, second, replace(first, member=5)):
        election.add(told)
    assert election.newest.epoch == 1
    assert election.quorum()
    people = Membership(Bounds(), people=dict.fromkeys((3, 4, 5), info()))
    orders = election.conclude(people)
    assert sorted((m, type(o).__name__) for m, o in orders) == [(3, "NewEpoch"), (4, "NewEpoch"), (5, "NewEpoch")]
    assert people.last == 5
    # had 5 told that it knows of the second epoch, the coordinator might go on with 1 and 2 of 1, 2, 4 and 5
    election.add(replace(second, member=5))
    assert not election.quorum()


@pytest.mark.parametrize("apart", [(0, 1), (1, 0)])
def test_rivals_elected_from_the_same_reports_are_told_apart(apart):
    """1 and 3 elect one whom 3 leaves before it hears of it; 2 and 3 elect another, which may go on with 2 alone."""
    membership, told = started(3), {}
    for voters, distance in zip(((1, 3), (2, 3)), apart, strict=True):
        election = Election(apart=distance)
        for member in voters:
            election.add(report(membership, member))
        assert election.quorum()
        orders = election.conclude(Membership(Bounds(), people=dict.fromkeys(voters, info())))
        told.update((member, rejoin(member, epoch)) for member, epoch in orders)
    assert told[1].report.epoch != told[3].report.epoch
    last = Election()
    for member in (1, 3):
        last.add(told[member])
    assert not last.quorum()


@dataclass
class Node:
    """A member of the simulation."""

    name: int
    link: "Link | None" = None
    view: NewEpoch | None = None
    told: NewEpoch | None = None
    agreed: int = -1
    committed: int = 0
    chain: str = ""
    stale: bool = False
    fenced: bool = False

    def hear(self, message):
        if isinstance(message, NewEpoch):
            self.view, self.committed, self.chain = message, message.committed, message.chain
            self.stale = self.name in message.stale
        elif isinstance(message, CommitNotice):
            self.committed, self.chain, self.agreed = message.committed, message.chain, message.epoch
        elif isinstance(message, Evicted):
            self.fenced, self.link = True, None

    def tell(self):
        if self.view is not None:
            self.link.up.append(Heartbeat(epoch=self.view.epoch))
            self.told = self.view

    def report(self):
        told = self.told or self.view
        epoch = replace(told, committed=self.committed, chain=self.chain)
        sets = () if self.agreed == told.epoch else told.quorum_sets
        return rejoin(self.name, epoch, stale=self.stale, known=self.view.epoch, quorum_sets=sets)


@dataclass
class Link:
    """A connection; what is sent arrives later, in order, as long as both ends are open."""

    node: Node
    down: list = field(default_factory=list)
    up: list = field(default_factory=list)


class Server:
    """A coordinator without a network: what faults/coordinator/server.py does with a membership."""

    def __init__(self, membership):
        self.membership, self.links, self.held, self.over = membership, {}, [], False

    def take(self, node):
        node.link = self.links[node.name] = Link(node)

    def act(self, orders):
        self.held += orders
        if self.membership.lost_quorum():
            self.over = self.over or not self.membership.may_regain_quorum()
            return
        orders, self.held = self.held, []
        for member, message in orders:
            if isinstance(message, NewEpoch):
                message = replace(message, quorum_sets=self.membership.say())
            if member in self.links:
                self.links[member].down.append(message)

    def hear(self, link):
        message = link.up.pop(0)
        if isinstance(message, Heartbeat):
            self.membership.knows(link.node.name, message.epoch)
            self.act([])
        elif isinstance(message, Vote):
            self.act(self.membership.vote(link.node.name, message))
        elif isinstance(message, Healed):
            self.act(self.membership.healed(link.node.name, message))
        elif isinstance(message, Leave):  # here: the end of its connection
            self.lose([link.node.name])

    def lose(self, members):
        self.act(self.membership.lose_all(members, "silent"))

    def attached(self):
        there = {m for m, link in self.links.items() if link.node.link is link}
        return there & self.membership.people.keys()


class History:
    """Random deliveries, losses, joins, commits and elections. No member dies, so somebody can always go on."""

    def __init__(self, seed, silent):
        self.dice, self.silent, self.elections = random.Random(seed), silent, 0
        first = Server(Membership(Bounds()))
        self.servers, self.nodes = [first], []
        for _ in range(self.dice.randint(2, 6)):
            self.join(first)
        first.act(first.membership.admit())
        for link in first.links.values():
            link.node.hear(link.down.pop(0))
            link.node.tell()

    def join(self, server):
        node = Node(server.membership.join(info()))
        self.nodes.append(node)
        server.take(node)

    def step(self):
        act = self.dice.choices(
            [self.deliver, self.hear, self.finish, self.leave, self.lose, self.grow, self.elect],
            [20, 20, 12, 3, 2, 2, 3],
        )[0]
        living = [server for server in self.servers if not server.over]
        act(self.dice.choice(living) if living else None)
        for server in self.servers:
            if server.over:
                self.part(server)
        earnest = [s for s in self.servers if not s.over and holds(s.attached(), s.membership.quorum_sets)]
        assert len(earnest) <= 1, "two jobs"

    def some(self, links):
        return self.dice.choice(links) if links else None

    def deliver(self, server):
        if server is not None:
            link = self.some([link for link in server.links.values() if link.node.link is link and link.down])
            if link is not None:
                link.node.hear(link.down.pop(0))
                if link.node.link is link and self.dice.random() < 0.9:
                    link.node.tell()

    def hear(self, server):
        link = self.some([link for link in server.links.values() if link.up]) if server is not None else None
        if link is not None:
            server.hear(link)

    def finish(self, server):
        node = self.some([n for n in self.nodes if n.link is not None and n.view is not None])
        if node is not None:
            node.told = node.view  # by what it sends now
            if node.stale:
                node.link.up.append(Healed(epoch=node.view.epoch, step=node.committed))
                node.stale = False
            node.link.up.append(Vote(epoch=node.view.epoch, step=node.committed, digest="d"))

    def leave(self, server):
        """A member takes its coordinator for lost. What it said may be lost too where connections end silently."""
        node = self.some([node for node in self.nodes if node.link is not None])
        if node is not None:
            if self.silent and self.dice.random() < 0.5:
                node.link.up.clear()
            node.link.up.append(Leave())
            node.link = None

    def lose(self, server):
        people = sorted(server.membership.people) if server is not None else []
        if self.silent and len(people) > 1:
            server.lose(self.dice.sample(people, self.dice.randint(1, 2)))

    def grow(self, server):
        if server is not None and len(self.nodes) < 9 and not server.membership.electing:
            self.join(server)
            server.act(server.membership.admit())

    def elect(self, server):
        apart = [n for n in self.nodes if n.link is None and n.view is not None and not n.fenced]
        if self.dice.random() < 0.5:
            apart = [node for node in apart if self.dice.random() < 0.8]
        self.vote(apart)

    def vote(self, nodes):
        election = Election(apart=self.dice.randrange(1 << 20))
        for node in nodes:
            election.add(node.report())
        if not election.quorum():
            return False
        self.elections += 1
        elected = Server(Membership(Bounds(), electing=True))
        for node in nodes:
            elected.membership.people[node.name] = info()
            elected.take(node)
        orders = election.conclude(elected.membership)
        told = [node for node in nodes if node.name in elected.membership.people]
        for committed in {node.committed for node in told if not node.stale}:
            chains = {node.chain for node in told if node.committed == committed and not node.stale}
            assert len(chains) == 1, "two histories"
        elected.act(orders)
        self.servers.append(elected)
        return True

    def part(self, server):
        for link in server.links.values():
            if link.node.link is link:
                link.node.link = None

    def settle(self):
        """Everything that was sent arrives and every silence is noticed; whether somebody goes on then."""
        for server in self.servers:
            for _ in range(1000):
                links = [link for link in server.links.values() if link.up or (link.node.link is link and link.down)]
                if server.over or not links:
                    break
                for link in links:
                    if link.node.link is link and link.down:
                        link.node.hear(link.down.pop(0))
                        if link.node.link is link:
                            link.node.tell()
                    elif link.up:
                        server.hear(link)
            server.over = server.over or server.membership.lost_quorum() is not None
            if server.over:
                self.part(server)
        if any(not server.over and server.membership.world.members for server in self.servers):
            return True
        return self.vote([n for n in self.nodes if n.link is None and n.view is not None and not n.fenced])


@pytest.mark.parametrize("silent", [False, True])
def test_two_sides_never_go_on_and_one_does(silent):
    """Where what was said before a connection ended arrives, one side goes on.

    Where it may be lost nobody can know whether it was heard, so now and then none does.
    """
    elections = ended = 0
    for seed in range(600):
        history = History(seed, silent)
        for _ in range(history.dice.randint(20, 120)):
            history.step()
        ended += not history.settle()
        elections += history.elections
    assert elections > 400
    assert ended <= (3 if silent else 0)
