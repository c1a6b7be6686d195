"""A micro-batch in pieces: every row once, no padding, what rows share once, no piece larger than it may be."""

import pytest
import torch

from lora_recipes.model.compare import IGNORED
from lora_recipes.model.pieces import largest_piece, pieces, rows_of


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    """Padded on the right as a collator does; each token tells its row and place."""
    wide = max(lengths)
    ids, labels, mask = (torch.full((len(lengths), wide), value) for value in (0, IGNORED, 0))
    for row, length in enumerate(lengths):
        ids[row, :length] = 1 + row * 10_000 + torch.arange(length)
        labels[row, length // 3 : length] = ids[row, length // 3 : length]
        mask[row, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def packed(*lengths: int) -> dict[str, torch.Tensor]:
    one = batch(*lengths)
    rows = [slice(0, length) for length in lengths]
    joined = {
        key: torch.cat([one[key][n, part] for n, part in enumerate(rows)])[None] for key in ("input_ids", "labels")
    }
    return joined | {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


LENGTHS = [(7,), (50, 50, 50, 50), (500, 20, 30, 25), (800, 790, 3), tuple(range(1, 130, 9)), (512, 256, 256, 1)]


@pytest.mark.parametrize("together", [512, 1024, 0], ids=["512", "1024", "alone"])
@pytest.mark.parametrize("made", [batch, packed], ids=["padded", "packed"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_pieces_hold_every_row_once_and_are_never_larger_than_planned(
    made, lengths: tuple[int, ...], together: int
):
    cut = pieces(made(*lengths), together)
    whole = batch(*lengths)
    expected = [
        (whole["input_ids"][n, :length].tolist(), whole["labels"][n, :length].tolist())
        for n, length in enumerate(lengths)
        if length > 1  # one token has nothing to predict
    ]
    assert sorted(told(cut)) == sorted(expected)
    assert max(piece["input_ids"].numel() for piece in cut) <= largest_piece(len(lengths), max(lengths), together)
    assert sum(piece["tokens"] for piece in cut) == sum(len(ids) for ids, _ in expected)
    assert together or all("rows" not in piece for piece in cut)


def told(cut: list[dict]) -> list[tuple[list[int], list[int]]]:
    """A row's first label is of a token that nothing predicts."""
    return [(ids.tolist(), labels.tolist()) for piece in cut for ids, labels in rows_of(piece)]


def test_padding_at_the_end_of_a_packed_row_is_not_computed():
    one = packed(30, 20)
    padded = {key: torch.cat([rows, torch.zeros((1, 14), dtype=torch.long)], dim=1) for key, rows in one.items()}
    assert told(pieces(padded, 512)) == told(pieces(one, 512))
    assert len(pieces(packed(1), 512)) == 1


def test_rows_lie_end_to_end_and_fill_a_piece_before_the_next_one_is_begun():
    assert [piece["rows"].ends for piece in pieces(batch(20, 400, 300, 25), 512)] == [(300,), (400, 425, 445)]


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([[1, 2, 3, 4, 5], [1, 2, 3, 6]], 3),
        ([[1, 2, 3], [1, 2, 3]], 2),  # a last token of the prompt predicts the first of an answer, which is trained
        ([[1, 2, 3, 4], [1]], 0),  # of the second row nothing but the first token is untrained
        ([[1, 2], [3, 2]], 0),
        ([[], []], 0),
        ([[1, 2, 3, 4]], 0),  # nobody to share with
    ],
    ids=str,
)
def test_the_beginning_that_all_rows_share_and_none_is_trained_behind_is_there_once(
    prompts: list[list[int]], shared: int
):
    answer = [7, 7, 7]
    rows = [(prompt + answer, [IGNORED] * len(prompt) + answer) for prompt in prompts]
    wide = max(len(ids) for ids, _ in rows)
    padded = {
        "input_ids": torch.tensor([ids + [0] * (wide - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (wide - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (wide - len(ids)) for ids, _ in rows]),
    }
    (piece,) = pieces(padded, 512)
    assert piece["rows"].shared == shared
    assert piece["input_ids"].numel() == sum(len(ids) for ids, _ in rows) - shared * (len(rows) - 1)
    found = {tuple(ids): labels for ids, labels in told([piece])}
    for ids, labels in rows:  # what predicts a trained token predicts it still
        assert found[tuple(ids)][1:] == labels[1:]
    places = piece["position_ids"][0].tolist()
    assert places == [
        *range(shared),
        *(at for ids, _ in sorted(rows, key=lambda row: -len(row[0])) for at in range(shared, len(ids))),
    ]
