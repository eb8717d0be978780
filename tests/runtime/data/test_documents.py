"""Documents: every kind of source, order, what is skipped and counted, what is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from heteromesh.errors import UserError
from heteromesh.runtime.data.documents import STDLIB, open_corpus


def write(root, **files):
    """Files below root; `__` in a name stands for a folder."""
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(source, **options):
    reader = open_corpus(source, **options).read()
    return list(reader), reader


def test_folder_is_read_recursively_in_order_of_relative_paths(tmp_path):
    write(tmp_path, b_txt="two", a__z_txt="one", c__d__e_txt="four", c_txt="three")
    texts, reader = read(tmp_path)
    assert texts == ["one", "two", "three", "four"]  # a/z.txt b.txt c.txt c/d/e.txt
    assert (reader.report.documents, reader.report.bytes, dict(reader.report.skipped)) == (4, 15, {})
    assert reader.fraction == 1


def test_hidden_files_and_caches_are_ignored(tmp_path):
    write(tmp_path, keep_txt="keep")
    for hidden in (".git/config", ".env", "__pycache__/x.txt", "sub/.hidden"):
        path = tmp_path / hidden
        path.parent.mkdir(exist_ok=True)
        path.write_text("hidden")
    assert read(tmp_path)[0] == ["keep"]


def test_what_cannot_be_text_is_skipped_and_counted(tmp_path):
    write(tmp_path, a_txt="good", b_txt=b"\x89PNG\0\1", c_txt="caf\xe9".encode("latin-1"), d_txt="", e_txt="caf\xe9")
    (tmp_path / "f.txt").symlink_to(tmp_path / "nowhere")
    texts, reader = read(tmp_path)
    assert texts == ["good", "caf\xe9"]
    assert reader.report.bytes == 9
    assert dict(reader.report.skipped) == {"binary": 1, "not UTF-8": 1, "empty": 1, "unreadable": 1}
    assert reader.report.describe() == ("2 documents (0.0 MB), skipped 4: 1 binary, 1 empty, 1 not UTF-8, 1 unreadable")


def test_file_that_vanishes_after_listing_is_counted(tmp_path):
    corpus = open_corpus(write(tmp_path, a_txt="a", b_txt="b"))
    (tmp_path / "a.txt").unlink()
    reader = corpus.read()
    assert list(reader) == ["b"]
    assert reader.report.skipped == {"unreadable": 1}


def test_pipe_in_a_folder_does_not_block(tmp_path):
    os.mkfifo(write(tmp_path, a_txt="a") / "pipe")
    assert read(tmp_path)[0] == ["a"]


def test_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path, a_txt=b"\xef\xbb\xbfx") / "a.txt")[0] == ["x"]


def test_limit_keeps_the_first_documents(tmp_path):
    texts, reader = read(write(tmp_path, a_txt="", b_txt="b", c_txt="c", d_txt="d"), limit=2)
    assert texts == ["b", "c"]
    assert reader.fraction == 1


def test_jsonl_streams_records_of_the_named_field(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"text": "one", "body": "uno"}, {"text": "", "body": "dos"}, {"text": None, "body": "tres"}]
    path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n" + r'{"text": "\ud800", "body": "x"}' + "\n")
    texts, reader = read(path)
    assert texts == ["one"]
    assert reader.report.skipped == {"empty": 2, "not UTF-8": 1}
    assert read(path, field="body")[0] == ["uno", "dos", "tres", "x"]


def test_jsonl_line_that_is_not_utf8_is_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    texts, reader = read(path)
    assert texts == ["a"]
    assert reader.report.skipped == {"not UTF-8": 1}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "line 2 is not JSON"),
        ('["a"]', "line 2 is an array, not a JSON object"),
        ('{"body": "a", "id": 1}', "line 2 has no key 'text': name another with --field (there are: 'body', 'id')"),
        ('{"text": 3}', "line 2 has a number under 'text', not a string"),
        ('{"text": ' + "[" * 100_000, "line 2 is not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "line 2 is not JSON"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path, line, said):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def parquet(path, column, name="text", row_group_size=None):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra: heteromesh[data]")
    from pyarrow import parquet as files

    files.write_table(arrow.table({name: column, "id": list(range(len(column)))}), path, row_group_size=row_group_size)
    return path


def test_parquet_streams_its_column(tmp_path):
    rows = [f"row {i}" for i in range(1000)]
    path = parquet(tmp_path / "x.parquet", [*rows, None, ""], row_group_size=300)
    texts, reader = read(path)
    assert texts == rows
    assert reader.report.skipped == {"empty": 2}
    assert reader.fraction == pytest.approx(1)


def test_parquet_dictionary_strings_and_broken_utf8(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra: heteromesh[data]")
    path = parquet(tmp_path / "d.parquet", arrow.array(["a", "b", "a"]).dictionary_encode())
    assert read(path)[0] == ["a", "b", "a"]
    broken = arrow.array([b"ok", b"\xff\xfe"], type=arrow.binary()).view(arrow.string())
    texts, reader = read(parquet(tmp_path / "u.parquet", broken))
    assert texts == ["ok"]
    assert reader.report.skipped == {"not UTF-8": 1}


def test_bad_parquet_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no column 'text': name another with --field \(there are: 'body', 'id'\)"):
        read(parquet(tmp_path / "a.parquet", ["x"], name="body"))
    with pytest.raises(UserError, match="column 'id' is int64, not a string"):
        read(tmp_path / "a.parquet", field="id")
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"b\.parquet is not readable Parquet"):
        read(tmp_path / "b.parquet")
    whole = parquet(tmp_path / "c.parquet", [f"words {i}" for i in range(500)]).read_bytes()
    (tmp_path / "c.parquet").write_bytes(bytes(200) + whole[200:])  # the footer is fine, the data are not
    with pytest.raises(UserError, match=r"c\.parquet"):
        read(tmp_path / "c.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"heteromesh\[data\]"):
        read(tmp_path / "x.parquet")


def test_folder_of_shards_is_read_by_record_and_a_mixed_one_by_file(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}1"}}\n{{"text": "{name}2"}}\n')
    assert read(tmp_path)[0] == ["a1", "a2", "b1", "b2"]
    (tmp_path / "README").write_text("shards")
    assert len(read(tmp_path)[0]) == 3


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(UserError, match=f"document limit {limit} is below 1"):
        open_corpus(write(tmp_path, a_txt="a"), limit=limit)


def test_sources_without_documents_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere can't be opened \(No such file or directory\): name a folder"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no files"):
        open_corpus(tmp_path)
    with pytest.raises(UserError, match="/dev/null is neither a file nor a folder"):
        open_corpus("/dev/null")
    write(tmp_path, a_txt=b"\0", b_txt="")
    with pytest.raises(UserError, match=r"gave 0 documents \(0.0 MB\), skipped 2: 1 binary, 1 empty: name a folder"):
        read(tmp_path)


def test_fingerprint_follows_the_files_the_field_and_the_limit(tmp_path):
    write(tmp_path, a_txt="a", b_txt="b")
    seen = {open_corpus(tmp_path).fingerprint}
    assert open_corpus(tmp_path).fingerprint in seen
    seen.add(open_corpus(tmp_path, limit=1).fingerprint)
    seen.add(open_corpus(tmp_path, field="body").fingerprint)
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    seen.add(open_corpus(tmp_path).fingerprint)
    (tmp_path / "b.txt").write_text("bb")
    seen.add(open_corpus(tmp_path).fingerprint)
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    seen.add(open_corpus(tmp_path).fingerprint)
    assert len(seen) == 6


def test_standard_library_is_the_default_source():
    corpus = open_corpus(limit=40)
    assert corpus.name == STDLIB
    paths = [f.path for f in corpus.files]
    assert paths == sorted(paths)
    assert len(paths) > 500
    assert all(p.endswith(".py") for p in paths)
    assert not any({"site-packages", "__pycache__"} & set(Path(p).parts) for p in paths)
    first = list(corpus.read())
    assert len(first) == 40
    assert first == list(corpus.read())
    assert first[0] == next((corpus.root / p).read_text() for p in paths if (corpus.root / p).stat().st_size)
