"""Token store: nothing lost or changed, one build per machine, damage and full disks survived."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heteromesh.errors import UserError
from heteromesh.runtime.data import tokens
from heteromesh.runtime.data.documents import open_corpus
from heteromesh.runtime.data.tokenizer import ByteTokenizer
from heteromesh.runtime.data.tokens import cut, open_tokens

BYTES = ByteTokenizer()


class Letters:
    """One id per letter, no specials: documents of any length from 1, vocabulary of any size."""

    name = "letters"
    fingerprint = "letters"

    def __init__(self, vocab_size=128, shift=0):
        self.vocab_size, self.shift = vocab_size, shift

    def encode(self, text):
        return np.array([ord(c) + self.shift for c in text], dtype=np.int64)

    def encode_batch(self, texts):
        return [self.encode(t) for t in texts]

    def decode(self, ids):
        return "".join(chr(i - self.shift) for i in ids)


def folder(path, *texts):
    path.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (path / f"{i:04}.txt").write_text(text)
    return open_corpus(path)


def texts_of(store, tokenizer=BYTES):
    return [tokenizer.decode(store.sequence(i)) for i in range(len(store))]


@given(st.integers(2, 10_000), st.integers(3, 300))
def test_cut_loses_nothing_and_leaves_no_single_token(length, max_length):
    pieces = cut(length, max_length)
    assert sum(pieces) == length
    assert all(2 <= p <= max_length for p in pieces)
    assert len(pieces) == -(-length // max_length)
    assert all(p >= max_length - 1 for p in pieces[:-1])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text("ab\n\xe9", min_size=1, max_size=40), min_size=1, max_size=12),
    st.integers(3, 20),
    st.sampled_from([0, 1_000, 100_000]),
)
def test_all_tokens_come_back_in_order(tmp_path_factory, texts, max_length, shift):
    tmp_path, tokenizer = tmp_path_factory.mktemp("any"), Letters(256 + shift, shift)
    corpus = folder(tmp_path / "in", *texts)
    documents = [tokenizer.encode(t) for t in corpus.read()]
    kept = [d for d in documents if d.size >= 2]
    options = {"max_length": max_length, "cache_dir": tmp_path / "cache"}
    if not kept:
        with pytest.raises(UserError, match="shorter than 2 tokens: name a source of longer documents"):
            open_tokens(corpus, tokenizer, **options)
        assert not list((tmp_path / "cache").iterdir())
        return
    store = open_tokens(corpus, tokenizer, **options)
    assert np.array_equal(np.concatenate([store.sequence(i) for i in range(len(store))]), np.concatenate(kept))
    assert store.lengths.tolist() == [p for d in kept for p in cut(d.size, max_length)]
    assert store.report.documents == len(kept)
    assert store.report.skipped.get("shorter than 2 tokens", 0) == len(documents) - len(kept)
    assert store._tokens.dtype == np.min_scalar_type(255 + shift)


def test_types_shapes_and_slices(tmp_path):
    store = open_tokens(folder(tmp_path / "in", "hello", "xy"), BYTES, max_length=100, cache_dir=tmp_path / "cache")
    assert len(store) == 2
    assert store.vocab_size == 258
    assert store.lengths.dtype == np.int64
    whole = store.sequence(0)
    assert whole.dtype == np.int64
    assert whole.tolist() == [256, *b"hello", 257]
    assert [ids.tolist() for ids in store] == [whole.tolist(), store[1].tolist()]
    assert store.slice(0, 2, 5).tolist() == whole[2:5].tolist()
    assert store.slice(1, 0, 4).tolist() == store.sequence(1).tolist()
    assert store.slice(0, 3, 3).shape == (0,)
    whole[:] = 0  # a copy: nobody can change the file
    assert store.sequence(0)[0] == 256
    with pytest.raises(ValueError, match="read-only"):
        store.lengths[0] = 9


@pytest.mark.parametrize(("index", "start", "end"), [(2, 0, 1), (-1, 0, 1), (0, -1, 2), (0, 0, 8), (0, 3, 2)])
def test_slices_outside_a_sequence_are_refused(tmp_path, index, start, end):
    store = open_tokens(folder(tmp_path / "in", "hello", "xy"), BYTES, max_length=100, cache_dir=tmp_path / "cache")
    with pytest.raises(IndexError):
        store.slice(index, start, end)
    with pytest.raises(IndexError):
        store.sequence(2)


def test_second_open_does_not_build(tmp_path, monkeypatch):
    corpus = folder(tmp_path / "in", "hello", "world")
    first = open_tokens(corpus, BYTES, max_length=100, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(tokens, "_build", None)
    second = open_tokens(open_corpus(tmp_path / "in"), BYTES, max_length=100, cache_dir=tmp_path / "cache")
    assert texts_of(second) == texts_of(first) == ["hello", "world"]
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report


def test_anything_that_changes_the_tokens_makes_another_store(tmp_path):
    options = {"max_length": 100, "cache_dir": tmp_path / "cache"}
    corpus = folder(tmp_path / "in", "hello")
    open_tokens(corpus, BYTES, **options)
    open_tokens(corpus, BYTES, **{**options, "max_length": 5})
    open_tokens(corpus, Letters(), **options)
    assert texts_of(open_tokens(folder(tmp_path / "in", "hullo!"), BYTES, **options)) == ["hullo!"]
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_fingerprint_is_of_the_contents_not_of_the_place(tmp_path):
    stores = [
        open_tokens(folder(tmp_path / name, *texts), BYTES, max_length=max_length, cache_dir=tmp_path / "cache")
        for name, texts, max_length in [
            ("a", ["hello", "x"], 100),
            ("b", ["hello", "x"], 100),
            ("c", ["hello", "y"], 100),
            ("d", ["hello", "x"], 4),
        ]
    ]
    prints = [s.fingerprint for s in stores]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def damage(data, how):
    if how == "empty":
        return b""
    if how == "half":
        return data[: len(data) // 2]
    if how == "last byte gone":
        return data[:-1]
    if how == "longer":
        return data + b"x"
    at = {"token": 3, "offset": data.index(b'{"source') - 12, "footer": len(data) - 40, "trailer": len(data) - 2}[how]
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("how", ["empty", "half", "last byte gone", "longer", "token", "offset", "footer", "trailer"])
def test_damaged_cache_is_built_again(tmp_path, caplog, how):
    corpus = folder(tmp_path / "in", "hello", "world")
    options = {"max_length": 100, "cache_dir": tmp_path / "cache"}
    open_tokens(corpus, BYTES, **options)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole, how))
    with caplog.at_level(logging.WARNING):
        assert texts_of(open_tokens(corpus, BYTES, **options)) == ["hello", "world"]
    assert "damaged" in caplog.text
    assert path.read_bytes() == whole


def test_leftovers_of_killed_builds_are_removed_but_not_those_at_work(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "dead.part").write_bytes(b"x" * 100)
    with tokens._locked(cache / "live.part") as live:
        assert live is not None
        open_tokens(folder(tmp_path / "in", "hello"), BYTES, max_length=100, cache_dir=cache)
        assert sorted(p.suffix for p in cache.iterdir()) == [".part", ".tokens"]
        assert (cache / "live.part").exists()
    assert [p.suffix for p in cache.iterdir()] == [".tokens"]


def test_cleaning_spares_a_build_begun_meanwhile(tmp_path, monkeypatch):
    part, real = tmp_path / "x.part", fcntl.flock
    part.write_bytes(b"dead")

    def late(file, flags):
        part.unlink()
        part.write_bytes(b"new")
        real(file, flags)

    monkeypatch.setattr(tokens.fcntl, "flock", late)
    tokens._remove_leftovers(tmp_path)
    assert part.read_bytes() == b"new"


def test_lock_ends_with_the_build_even_if_a_child_was_forked_in_it(tmp_path):
    context = multiprocessing.get_context("fork")
    done = context.Event()
    child = context.Process(target=done.wait, args=(60,), daemon=True)
    with tokens._locked(tmp_path / "x.part") as file:
        assert file is not None
        child.start()
        waiter = (tmp_path / "x.part").open("rb")
    with waiter:
        fcntl.flock(waiter, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert child.is_alive()
    done.set()
    child.join(150)


def test_leftover_of_the_same_store_is_taken_over(tmp_path):
    corpus = folder(tmp_path / "in", "hello")
    options = {"max_length": 100, "cache_dir": tmp_path / "cache"}
    open_tokens(corpus, BYTES, **options)
    (path,) = (tmp_path / "cache").iterdir()
    path.unlink()
    path.with_suffix(".part").write_bytes(b"y" * 10_000)
    assert texts_of(open_tokens(corpus, BYTES, **options)) == ["hello"]
    assert list((tmp_path / "cache").iterdir()) == [path]


def _open_and_count(source, cache, builds, results):
    real = tokens._build

    def counted(*args):
        builds.put(os.getpid())
        real(*args)

    tokens._build = counted
    store = open_tokens(open_corpus(source), BYTES, max_length=50, cache_dir=cache)
    results.put((len(store), int(store.lengths.sum()), store.fingerprint))


def test_concurrent_processes_build_once(tmp_path):
    folder(tmp_path / "in", *[f"document {i} " * 200 for i in range(60)])
    context = multiprocessing.get_context("fork")
    builds, results = context.Queue(), context.Queue()
    workers = [
        context.Process(target=_open_and_count, args=(tmp_path / "in", tmp_path / "cache", builds, results))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    seen = {results.get(timeout=150) for _ in workers}
    for worker in workers:
        worker.join(150)
    assert [w.exitcode for w in workers] == [0] * 4
    assert len(seen) == 1
    assert builds.get(timeout=100)
    assert builds.empty()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _build_for_ever(source, cache, started):
    class Stuck(ByteTokenizer):
        def encode_batch(self, texts):
            started.set()
            time.sleep(60)

    open_tokens(open_corpus(source), Stuck(), max_length=50, cache_dir=cache)


def test_killed_builder_holds_up_nobody(tmp_path):
    corpus = folder(tmp_path / "in", "hello")
    context = multiprocessing.get_context("fork")
    started = context.Event()
    builder = context.Process(target=_build_for_ever, args=(tmp_path / "in", tmp_path / "cache", started))
    builder.start()
    assert started.wait(150)
    builder.kill()
    builder.join(150)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".part"]
    assert texts_of(open_tokens(corpus, BYTES, max_length=50, cache_dir=tmp_path / "cache")) == ["hello"]
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".tokens"]


def test_waiter_builds_when_the_builder_gave_up(tmp_path):
    corpus = folder(tmp_path / "in", "hello")
    started, go_on, stores = threading.Event(), threading.Event(), []

    class Failing(Letters):
        def encode_batch(self, texts):
            started.set()
            go_on.wait(150)
            raise RuntimeError("builder died")

    def fail():
        with pytest.raises(RuntimeError):
            open_tokens(corpus, Failing(), max_length=100, cache_dir=tmp_path / "cache")

    def wait():
        stores.append(open_tokens(corpus, Letters(), max_length=100, cache_dir=tmp_path / "cache"))

    threads = [threading.Thread(target=fail), threading.Thread(target=wait)]
    threads[0].start()
    assert started.wait(150)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(150)
    assert texts_of(stores[0], Letters()) == ["hello"]
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".tokens"]


def test_write_error_is_a_user_error_and_leaves_nothing(tmp_path):
    corpus = folder(tmp_path / "in", *["many words " * 20_000] * 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses to write more, as on a full disk
    try:
        with pytest.raises(UserError, match=r"cache can't be used \(File too large\): make room there or name another"):
            open_tokens(corpus, BYTES, max_length=100, cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())


def test_full_disk_at_the_last_moment_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tokens.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        open_tokens(folder(tmp_path / "in", "hello"), BYTES, max_length=100, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_unusable_cache_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match=f"token cache directory {directory} can't be used"):
            open_tokens(folder(tmp_path / "in", "hello"), BYTES, max_length=100, cache_dir=directory)


def test_bad_document_stops_the_build_and_leaves_nothing(tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(UserError, match="line 2"):
        open_tokens(open_corpus(source), BYTES, max_length=100, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("max_length", [2, 1, 0, -5])
def test_max_length_without_room_for_a_target_is_refused(tmp_path, max_length):
    with pytest.raises(UserError, match=f"max_length {max_length} is below 3"):
        open_tokens(folder(tmp_path / "in", "hello"), BYTES, max_length=max_length, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(("shift", "said"), [(100, "gave token id 219"), (-105, "gave token id -4")])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, shift, said):
    with pytest.raises(UserError, match=said):
        open_tokens(folder(tmp_path / "in", "west"), Letters(128, shift), max_length=100, cache_dir=tmp_path / "cache")


def test_progress_reaches_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 1)
    monkeypatch.setattr(tokens, "_PROGRESS_SECONDS", 0)
    seen = []
    corpus = folder(tmp_path / "in", *["hello"] * 10)
    store = open_tokens(corpus, BYTES, max_length=100, cache_dir=tmp_path / "cache", progress=seen.append)
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions)
    assert len(fractions) > 5
    assert (seen[-1].fraction, seen[-1].documents, seen[-1].tokens) == (1, 10, int(store.lengths.sum()))


def test_description_gives_the_numbers(tmp_path):
    corpus = folder(tmp_path / "in", *["a" * 8] * 18, "b" * 198, "c" * 198, "")
    store = open_tokens(corpus, BYTES, max_length=1000, cache_dir=tmp_path / "cache")
    text = store.describe()
    assert "20 documents (0.0 MB), skipped 1: 1 empty" in text
    assert "20 sequences of at most 1000 tokens, 580 tokens (bytes, vocabulary 258)" in text
    assert "min 10, 25 % 10, median 10, 75 % 10, 95 % 200, max 200" in text
    assert "the longest 15 % of the sequences hold 71 % of the tokens" in text  # (200 + 200 + 10) / 580


def test_standard_library_end_to_end(tmp_path):
    corpus = open_corpus(limit=300)
    store = open_tokens(corpus, BYTES, max_length=4096, cache_dir=tmp_path)
    assert store.report.documents == 300
    assert int(store.lengths.sum()) == store.report.bytes + 2 * 300
    assert store.lengths.max() == 4096
    assert store.lengths.min() >= 2
    rebuilt = BYTES.decode(np.concatenate([store.sequence(i) for i in range(len(store))]))
    assert rebuilt == "".join(corpus.read())
