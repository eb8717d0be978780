import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from heteromesh.errors import UserError
from heteromesh.planner.model.lengths import open_lengths

WIKIPEDIA = Path(__file__).parents[3] / "examples" / "lengths" / "wikipedia.json"


def text(tmp_path, content):
    path = tmp_path / "lengths.txt"
    path.write_text(content)
    return str(path)


def npy(tmp_path, values):
    path = tmp_path / "lengths.npy"
    np.save(path, np.asarray(values))
    return str(path)


def table(tmp_path, **content):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    return str(path)


def first(source, count):
    return list(itertools.chain(*source.batches(1, sequences=count)))


def test_a_text_file_is_taken_in_order_and_ends(tmp_path):
    source = open_lengths(text(tmp_path, "5\n3\n\n 9 \n1\n7"))
    assert list(source.batches(10, sequences=2)) == [(5, 3), (9, 1), (7,)]
    assert list(source.batches(2, sequences=2)) == [(5, 3), (9, 1)]
    assert not source.sampled


def test_batches_by_tokens_hold_at_least_one_sequence(tmp_path):
    source = open_lengths(text(tmp_path, "5\n5\n11\n1\n9\n10"))
    assert list(source.batches(10, tokens=10)) == [(5, 5), (11,), (1, 9), (10,)]


def test_an_npy_file_equals_a_text_file(tmp_path):
    for values in ([5, 3, 9], [5.0, 3.0, 9.0], np.array([5, 3, 9], dtype=np.uint16)):
        assert first(open_lengths(npy(tmp_path, values)), 3) == [5, 3, 9]


def test_longer_sequences_are_dropped_and_counted(tmp_path):
    source = open_lengths(text(tmp_path, "5\n30\n9\n31\n7"), max_length=9)
    assert list(source.batches(5, sequences=2)) == [(5, 9), (7,)]
    assert source.dropped == 2


@pytest.mark.parametrize("word", ["0", "-3", "nan", "2.5", "5.0", "inf", "many", "1_000", "0x10"])
def test_a_bad_line_is_named(tmp_path, word):
    with pytest.raises(UserError) as error:
        open_lengths(text(tmp_path, f"5\n{word}\n7\n"))
    assert f"lengths.txt line 2 is '{word}': a length is a whole number of tokens, at least 1" in str(error.value)


@pytest.mark.parametrize(("value", "shown"), [(0, "0.0"), (-3, "-3.0"), (np.nan, "nan"), (2.5, "2.5"), (np.inf, "inf")])
def test_a_bad_index_is_named(tmp_path, value, shown):
    with pytest.raises(UserError) as error:
        open_lengths(npy(tmp_path, [5.0, value, 7.0]))
    assert f"lengths.npy index 1 is {shown}: a length is a whole number" in str(error.value)


def test_files_that_are_not_lengths(tmp_path):
    with pytest.raises(UserError, match="holds no length"):
        open_lengths(text(tmp_path, "\n\n"))
    with pytest.raises(UserError, match="does not exist"):
        open_lengths(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="does not exist"):
        open_lengths(str(tmp_path / "none.npy"))
    with pytest.raises(UserError, match="2-dimensional array"):
        open_lengths(npy(tmp_path, [[1, 2]]))
    with pytest.raises(UserError, match="array of bool"):
        open_lengths(npy(tmp_path, [True]))
    with pytest.raises(UserError, match=r"is not a \.npy array"):
        open_lengths(npy(tmp_path, np.array([{}], dtype=object)))
    (tmp_path / "lengths.npy").write_text("5\n")
    with pytest.raises(UserError, match=r"is not a \.npy array"):
        open_lengths(str(tmp_path / "lengths.npy"))
    with pytest.raises(UserError, match=r"max_length=4 drops every length of .*raise it to at least the shortest, 5"):
        open_lengths(text(tmp_path, "5\n6"), max_length=4)


def test_quantile_table_reproduces_its_percentiles():
    drawn = np.array(first(open_lengths(str(WIKIPEDIA), seed=3), 50_000))
    # percentiles of the full data (research notes, section 5)
    for percentile, length in ((50, 347), (75, 862), (90, 2112), (95, 3720), (99, 10_919)):
        assert np.percentile(drawn, percentile) == pytest.approx(length, rel=0.08)
    assert drawn.min() >= 1


def test_sampling_depends_on_the_seed_and_not_on_the_batches():
    def draw(seed, size):
        return list(itertools.chain(*open_lengths(str(WIKIPEDIA), seed=seed).batches(6000 // size, sequences=size)))

    assert draw(1, 6000) == draw(1, 10)
    assert draw(1, 6000) != draw(2, 6000)


def test_lognormal_redraws_what_is_longer():
    source = open_lengths("lognormal:7.2,1.5,8000", seed=0)
    drawn = np.array(first(source, 20_000))
    assert source.sampled
    assert source.dropped == 0
    assert drawn.min() >= 1
    assert drawn.max() <= 8000
    # the median of a lognormal cut at quantile F(8000) = 0.8835
    assert np.median(drawn) == pytest.approx(np.exp(7.2 + 1.5 * -0.1468), rel=0.03)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lognormal:7,1", "is not lognormal:MU,SIGMA,MAX"),
        ("lognormal:7,one,9", "give three numbers"),
        ("lognormal:7,0,9000", "SIGMA must be above 0"),
        ("lognormal:nan,1,9000", "SIGMA must be above 0 and MAX"),
        ("lognormal:7,1,0", "MAX a whole number of tokens"),
        ("lognormal:7,1,9.5", "MAX a whole number of tokens"),
        ("lognormal:9,1,10", "raise MAX or lower MU"),
    ],
)
def test_bad_lognormals(spec, words):
    with pytest.raises(UserError) as error:
        open_lengths(spec)
    assert words in str(error.value)


def test_bad_quantile_tables(tmp_path):
    good = {"percentile": [0.0, 50.0, 100.0], "length": [1, 10, 100]}
    assert max(first(open_lengths(table(tmp_path, **good, n=5, mean=3.0)), 100)) <= 100
    for change, words in (
        ({"length": [1, 10]}, "equally long lists"),
        ({"length": [1, 100, 10]}, "both rising"),
        ({"percentile": [0.0, 50.0, 101.0]}, "within 0 and 100"),
        ({"percentile": [5.0], "length": [1]}, "two points or more"),
        ({"length": [0, 10, 100]}, r"length\[0\] is 0: it must be above zero"),
        ({"length": [1.5, 10, 100]}, r"length\[0\] is 1.5: it must be a whole number"),
        ({"sizes": []}, "unknown key 'sizes'"),
    ):
        with pytest.raises(UserError, match=words):
            open_lengths(table(tmp_path, **{**good, **change}))
    (tmp_path / "table.json").write_text('{\n"length": [1,\n}')
    with pytest.raises(UserError, match="line 3 is not JSON"):
        open_lengths(str(tmp_path / "table.json"))


def test_a_max_length_below_the_distribution_ends_in_a_sentence(tmp_path):
    source = open_lengths(table(tmp_path, percentile=[0, 100], length=[50, 100]), max_length=20)
    with pytest.raises(UserError, match=r"max_length=20 drops nearly every length of table\.json"):
        list(source.batches(1, sequences=2))
