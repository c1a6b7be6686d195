"""Which rows of a split are taken: slices, held-out shares and weights, the same on every machine."""

from typing import Any

import numpy

from lora_recipes.data.files import Source
from lora_recipes.errors import DataError

Indices = Any  # one-dimensional array of int64


def rows_in_slice(source: Source, split: str, rows: int) -> tuple[int, int]:
    """[first, last) rows of a split such as `train[:10%]`.

    Raises:
        DataError: the slice is not written as `datasets` wants it.
    """
    import datasets

    base = split.split("[")[0]
    try:
        (found,) = datasets.ReadInstruction.from_spec(split).to_absolute({base: rows})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{source.where('split')}: {split!r} is no split with a slice, such as train[:10%]: {error}"
        ) from None
    return found.from_ or 0, rows if found.to is None else found.to


def held_out(hashes: Any, share: float, seed: int) -> Any:
    """True for the rows that are held out: the share of them with the lowest seeded hash.

    A row's place in the file does not matter, and rows with the same content fall on the same side.

    Args:
        hashes: content hashes, uint64.
    """
    order = seeded(hashes, seed)
    count = max(1, round(share * len(order)))
    return order <= numpy.partition(order, count - 1)[count - 1]


def repeated(hashes: Any, weight: float, seed: int) -> Indices:
    """Indices of rows that are seen `weight` times in an epoch: all of them, then the share with the lowest seeded hash."""
    whole, share = int(weight), weight - int(weight)
    indices = [numpy.arange(len(hashes))] * whole
    if share:
        count = max(1, round(share * len(hashes)))
        indices.append(numpy.sort(numpy.argsort(seeded(hashes, seed), kind="stable")[:count]))
    return numpy.concatenate(indices)


def shuffled(count: int, seed: int) -> Indices:
    """A seeded order of `count` rows. RandomState's stream is frozen: the same in every version of numpy."""
    return numpy.random.RandomState(seed % 2**32).permutation(count)


def seeded(hashes: Any, seed: int) -> Any:
    """The hashes mixed with a seed: splitmix64's finalizer (Steele, Lea and Flood 2014), which is a bijection."""
    mixed = hashes + numpy.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> numpy.uint64(shift))) * numpy.uint64(factor)
    return mixed ^ (mixed >> numpy.uint64(31))


def duplicates(hashes: Any) -> Any:
    """True for each row that repeats an earlier one."""
    _, first = numpy.unique(hashes, return_index=True)
    repeats = numpy.ones(len(hashes), dtype=bool)
    repeats[first] = False
    return repeats
