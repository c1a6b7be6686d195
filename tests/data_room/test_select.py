"""Laws of selection: shares, weights and orders that depend on the rows and the seed, and on nothing else."""

import numpy
import pytest

from lora_recipes.data.files import sources
from lora_recipes.data.select import duplicates, held_out, repeated, rows_in_slice, seeded, shuffled
from lora_recipes.errors import DataError
from lora_recipes.recipe import load_recipe


def hashes(count: int, start: int = 0) -> numpy.ndarray:
    """Hashes that are all different and spread like a content's."""
    return seeded(numpy.arange(start, start + count, dtype=numpy.uint64), 12345)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.333, 0.5, 0.99])
@pytest.mark.parametrize("count", [1, 3, 10, 997, 20_000])
def test_the_held_out_share_is_the_share_and_at_least_one_row(count: int, share: float):
    assert held_out(hashes(count), share, 42).sum() == max(1, round(share * count))


def test_what_is_held_out_does_not_depend_on_the_order_of_the_rows():
    rows = hashes(1000)
    order = shuffled(1000, 7)
    assert (held_out(rows, 0.1, 42)[order] == held_out(rows[order], 0.1, 42)).all()


def test_another_seed_holds_out_other_rows_as_far_as_chance_goes():
    first, second = held_out(hashes(10_000), 0.1, 1), held_out(hashes(10_000), 0.1, 2)
    assert (first == held_out(hashes(10_000), 0.1, 1)).all()
    assert 50 < (first & second).sum() < 160  # 100 expected, standard deviation 9


def test_a_row_once_held_out_stays_out_when_rows_are_added():
    """Most of them: the share's bound moves a little."""
    before = held_out(hashes(1000), 0.1, 42)
    after = held_out(hashes(1100), 0.1, 42)[:1000]
    assert (before & after).sum() >= 85


def test_rows_with_the_same_content_fall_on_one_side():
    rows = numpy.concatenate([hashes(500), hashes(500), hashes(100)])
    out = held_out(rows, 0.1, 42)
    assert not set(rows[out]) & set(rows[~out])
    assert out.sum() >= 110


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**63])
def test_seeding_is_one_to_one(seed: int):
    assert len(numpy.unique(seeded(hashes(50_000), seed))) == 50_000


@pytest.mark.parametrize(
    ("weight", "size"), [(1, 100), (2, 200), (0.5, 50), (1.5, 150), (0.001, 1), (3.25, 325), (1.1, 110)]
)
def test_a_weight_says_how_often_rows_are_seen(weight: float, size: int):
    again = repeated(hashes(100), weight, 42)
    assert len(again) == size
    times = numpy.bincount(again, minlength=100)
    assert times.min() == int(weight) and times.max() <= int(weight) + 1


def test_the_part_of_a_weight_that_is_no_whole_number_is_a_seeded_choice_of_rows():
    rows = hashes(1000)
    half = repeated(rows, 0.5, 42)
    assert (half == repeated(rows, 0.5, 42)).all() and (half == numpy.sort(half)).all()
    assert 200 < len(numpy.intersect1d(half, repeated(rows, 0.5, 43))) < 300  # 250 expected
    order = shuffled(1000, 7)
    assert set(rows[order][repeated(rows[order], 0.5, 42)]) == set(rows[half])
    assert (repeated(rows, 1.5, 42) == numpy.concatenate([numpy.arange(1000), half])).all()
    assert set(repeated(rows, 0.2, 42)) < set(half)


def test_no_rows_stay_no_rows():
    none = numpy.zeros(0, numpy.uint64)
    for weight in (1, 0.5, 2.5):
        assert len(repeated(none, weight, 42)) == 0
    assert len(duplicates(none)) == 0 and len(shuffled(0, 1)) == 0


def test_a_shuffle_is_the_same_everywhere_and_another_with_another_seed():
    assert shuffled(10, 42).tolist() == [8, 1, 5, 0, 7, 2, 9, 4, 3, 6]
    assert sorted(shuffled(100, 3)) == list(range(100))
    assert (shuffled(100, 3) == shuffled(100, 3 + 2**32)).all()
    assert (shuffled(100, 3) != shuffled(100, 4)).any()


def test_a_row_repeats_only_what_came_before_it():
    rows = numpy.array([5, 7, 5, 9, 7, 5, 2**64 - 1], dtype=numpy.uint64)
    assert duplicates(rows).tolist() == [False, False, True, False, True, True, False]
    assert not duplicates(hashes(1000)).any()


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:10%]", (0, 10)),
        ("train[2:5]", (2, 5)),
        ("train[90%:]", (90, 100)),
        ("train[-3:]", (97, 100)),
        ("train[:]", (0, 100)),
        ("train[50:500]", (50, 100)),
    ],
)
def test_a_slice_is_read_as_datasets_reads_it(write_recipe, split: str, expected: tuple[int, int]):
    (source,) = sources(load_recipe(write_recipe()))
    assert rows_in_slice(source, split, 100) == expected


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train[:10%][:5]", "train[::2]"])
def test_a_slice_that_is_none_is_named(write_recipe, split: str):
    (source,) = sources(load_recipe(write_recipe()))
    with pytest.raises(DataError, match=r"tiny\.yaml:\d+: '.*' is no split with a slice"):
        rows_in_slice(source, split, 100)
