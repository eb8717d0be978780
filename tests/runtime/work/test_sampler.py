"""Sampler: every sequence once an epoch, budgets kept, exact resume, other states refused."""

from __future__ import annotations

import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heteromesh.errors import UserError
from heteromesh.runtime.work.sampler import Sampler

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=60)
BUDGET = st.integers(1, 400)
SEED = st.integers(0, 2**40)


def epoch_of(sampler, number):
    batches = []
    while True:
        batch = sampler.next_batch()
        if batch.epoch > number:
            return batches
        if batch.epoch == number:
            batches.append(batch)


@given(LENGTHS, BUDGET, SEED, st.integers(0, 2))
def test_every_sequence_exactly_once_an_epoch_within_the_budget(lengths, budget, seed, epoch):
    batches = epoch_of(Sampler(lengths, batch_tokens=budget, seed=seed), epoch)
    order = [i for b in batches for i in b.sequences]
    assert sorted(order) == list(range(len(lengths)))
    for batch in batches:
        assert batch.lengths == tuple(lengths[i] for i in batch.sequences)
        assert batch.tokens <= budget or len(batch.sequences) == 1
    for batch, following in itertools.pairwise(batches):
        assert batch.tokens + following.lengths[0] > budget  # no batch could have taken one more
        assert following.index == batch.index + 1


@given(LENGTHS, BUDGET, SEED, st.integers(0, 40), st.integers(0, 20))
def test_resume_equals_no_interruption(lengths, budget, seed, consumed, prefetched):
    whole = Sampler(lengths, batch_tokens=budget, seed=seed)
    expected = [whole.next_batch() for _ in range(consumed + 30)]
    first = Sampler(lengths, batch_tokens=budget, seed=seed)
    handed_out = [first.next_batch() for _ in range(consumed)]
    plain = first.state_dict()
    for _ in range(prefetched):
        first.next_batch()
    state = first.state_after(handed_out[-1]) if handed_out else plain
    assert state == plain
    second = Sampler(np.array(lengths), batch_tokens=budget, seed=seed)
    second.next_batch()
    second.load_state_dict(json.loads(json.dumps(state)))
    assert second.state_dict() == state
    assert handed_out + [second.next_batch() for _ in range(30)] == expected


def test_epochs_and_seeds_differ():
    lengths = list(range(1, 101))
    sampler = Sampler(lengths, batch_tokens=10_000, seed=1)
    orders = [sampler.next_batch().sequences, sampler.next_batch().sequences]
    orders.append(Sampler(lengths, batch_tokens=10_000, seed=2).next_batch().sequences)
    assert len(set(orders)) == 3
    assert sampler.next_batch().epoch == 2


def test_order_is_pinned_for_all_machines_and_versions():
    """A change of this order would silently change the data of every run that resumes."""
    assert Sampler([1] * 10, batch_tokens=10, seed=7).next_batch().sequences == (8, 0, 7, 1, 3, 6, 2, 4, 5, 9)


def test_long_sequence_is_a_batch_of_its_own():
    sampler = Sampler([5, 500, 5], batch_tokens=10, seed=0)
    batches = epoch_of(sampler, 0)
    assert (500,) in [b.lengths for b in batches]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 9}, "checkpoint has seed 0, this run has 9"),
        ({"batch_tokens": 11}, "checkpoint has batch size in tokens 10, this run has 11"),
        ({"lengths": [1, 2, 3]}, "checkpoint has number of sequences 4, this run has 3"),
        ({"lengths": [1, 2, 4, 3]}, "checkpoint has data set (sequence lengths)"),
    ],
)
def test_state_of_another_run_is_refused(change, said):
    setup = {"lengths": [1, 2, 3, 4], "batch_tokens": 10, "seed": 0}
    state = Sampler(**setup).state_dict()
    other = Sampler(**{**setup, **change})
    before = other.state_dict()
    with pytest.raises(UserError) as error:
        other.load_state_dict(state)
    assert said in str(error.value)
    assert other.state_dict() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"position": 5}, "position 5 is beyond the 4 sequences"),
        ({"position": -1}, "position is -1"),
        ({"epoch": 1.5}, r"epoch is 1\.5"),
        ({"index": None}, "index is None"),
    ],
)
def test_damaged_state_is_refused(change, said):
    sampler = Sampler([1, 2, 3, 4], batch_tokens=10, seed=0)
    with pytest.raises(UserError, match=said):
        sampler.load_state_dict({**sampler.state_dict(), **change})


def test_incomplete_state_is_refused():
    sampler = Sampler([1, 2], batch_tokens=10, seed=0)
    for key in sampler.state_dict():
        state = sampler.state_dict()
        del state[key]
        with pytest.raises(UserError, match=f"lacks '{key}'"):
            sampler.load_state_dict(state)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([], "at least one"),
        ([[1, 2]], "one length per sequence"),
        ([3, 0, 2], "sequence 1 has length 0"),
        ([3, 2, -7], "sequence 2 has length -7"),
        ([1.5, 2.0], "not whole numbers"),
        ([float("nan")], "not whole numbers"),
        (["a"], "not whole numbers"),
        ([True], "not whole numbers"),
    ],
)
def test_bad_lengths_are_refused(lengths, said):
    with pytest.raises(UserError, match=said):
        Sampler(lengths, batch_tokens=10, seed=0)


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), "8", None, True])
def test_bad_batch_tokens_are_refused(value):
    with pytest.raises(UserError, match="batch_tokens is"):
        Sampler([1, 2], batch_tokens=value, seed=0)


@pytest.mark.parametrize("value", [-1, 0.5, None])
def test_bad_seed_is_refused(value):
    with pytest.raises(UserError, match="seed is"):
        Sampler([1, 2], batch_tokens=4, seed=value)


def test_batches_stay_cheap_with_many_sequences():
    """A batch must not cost a pass over the data set: as a ratio, so that a busy machine can't break it."""
    lengths = np.full(1_000_000, 100)
    start = time.perf_counter()
    sampler = Sampler(lengths, batch_tokens=1_000, seed=0)
    epoch = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(200):
        sampler.next_batch()
    assert time.perf_counter() - start < epoch
