"""Tokenizers: bytes round trip, Hugging Face files, what is refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heteromesh.errors import UserError
from heteromesh.runtime.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer


@given(st.text())
def test_bytes_round_trip_between_begin_and_end(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == [256, *text.encode(), 257]
    assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 257)))
def test_bytes_decode_any_ids(ids):
    ByteTokenizer().decode(ids)


def test_cut_character_is_marked():
    assert ByteTokenizer().decode(ByteTokenizer().encode("h\xe9")[:-2]) == "h\ufffd"


def test_bytes_refuse_a_lone_surrogate():
    with pytest.raises(UnicodeEncodeError):
        ByteTokenizer().encode("\ud800")


def test_ids_stay_below_the_vocabulary():
    tokenizer = load_tokenizer()
    assert tokenizer.name == "bytes"
    assert tokenizer.vocab_size == 258
    assert max(i.max() for i in tokenizer.encode_batch(["a", "\U0010ffff"])) == 257


TEXTS = ["the cat sat on the mat\n", "def caf\xe9(): return 'the \u732b'\n" * 20, ""]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    backend = pytest.importorskip("tokenizers", reason="tokenizers is an extra: heteromesh[data]")
    tokenizer = backend.Tokenizer(backend.models.BPE())
    tokenizer.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = backend.decoders.ByteLevel()
    alphabet = backend.pre_tokenizers.ByteLevel.alphabet()
    trainer = backend.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_hugging_face_file_round_trips(bpe):
    tokenizer = load_tokenizer(bpe)
    assert tokenizer.name == "tokenizer.json"
    batch = tokenizer.encode_batch(TEXTS)
    for text, ids in zip(TEXTS, batch, strict=True):
        assert tokenizer.decode(ids) == text
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert not ids.size or ids.max() < tokenizer.vocab_size
    assert batch[0].size < len(TEXTS[0])


def test_truncation_and_padding_in_the_file_are_switched_off(bpe, tmp_path):
    import tokenizers

    cut = tokenizers.Tokenizer.from_file(str(bpe))
    cut.enable_truncation(4)
    cut.enable_padding(length=500)
    cut.save(str(tmp_path / "cut.json"))
    expected = load_tokenizer(bpe).encode(TEXTS[1])
    assert expected.size > 4
    assert load_tokenizer(tmp_path / "cut.json").encode(TEXTS[1]).tolist() == expected.tolist()


def test_vocabulary_covers_the_highest_id_even_with_holes(bpe, tmp_path):
    data = json.loads(bpe.read_text())
    data["model"]["vocab"]["unused"] = 5000
    (tmp_path / "holes.json").write_text(json.dumps(data))
    assert load_tokenizer(tmp_path / "holes.json").vocab_size == 5001


def test_fingerprints_tell_tokenizers_apart(bpe, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text(bpe.read_text().replace('"<s>"', '"<t>"'))
    names = [load_tokenizer().fingerprint, load_tokenizer(bpe).fingerprint, load_tokenizer(other).fingerprint]
    assert len(set(names)) == 3
    assert HuggingFaceTokenizer(bpe).fingerprint == names[1]


def test_bad_tokenizer_files_are_refused(bpe, tmp_path):
    with pytest.raises(UserError, match=r"gpt can't be read \(No such file or directory\): name a tokenizer.json"):
        load_tokenizer(tmp_path / "gpt")
    for content in (b"", b"{}", b"\xff\0", bpe.read_bytes()[:-40]):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.json is not a tokenizers JSON file") as error:
            load_tokenizer(tmp_path / "bad.json")
        assert "\n" not in str(error.value)


def test_empty_vocabulary_is_refused(tmp_path):
    backend = pytest.importorskip("tokenizers", reason="tokenizers is an extra: heteromesh[data]")
    backend.Tokenizer(backend.models.BPE()).save(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="empty vocabulary"):
        load_tokenizer(tmp_path / "none.json")


def test_missing_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "t.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"heteromesh\[data\]"):
        load_tokenizer(tmp_path / "t.json")


def test_ids_are_unsigned_integers(bpe):
    for tokenizer in (load_tokenizer(), load_tokenizer(bpe)):
        assert np.issubdtype(tokenizer.encode("abc").dtype, np.unsignedinteger)
        assert np.issubdtype(tokenizer.encode("").dtype, np.unsignedinteger)
