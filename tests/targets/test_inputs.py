"""Inputs: text in rows of positions, padded on the right, with what only the prompt's pass reads."""

import torch

from vsd.targets.inputs import Inputs, Padded


def test_text_has_the_positions_of_its_tokens() -> None:
    batch = Padded.of([Inputs([5, 6, 7]), Inputs([8])])
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.lengths.tolist() == [3, 1]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.extras == ()


def test_several_rows_of_positions_go_on_behind_the_largest() -> None:
    """An image's tokens share positions: text behind it goes on above all of them, in every row."""
    image = Inputs([1, 2, 3], torch.tensor([[0, 1, 1], [0, 1, 2], [0, 1, 1]]))
    longer = image.followed_by([4, 5])
    assert longer.ids == [1, 2, 3, 4, 5]
    assert longer.positions is not None
    assert longer.positions.tolist() == [[0, 1, 1, 3, 4], [0, 1, 2, 3, 4], [0, 1, 1, 3, 4]]
    batch = Padded.of([longer, Inputs([9])])
    assert batch.positions.shape == (3, 2, 5)
    assert batch.positions[:, 1].tolist() == [[0, 1, 2, 3, 4]] * 3


def test_extras_of_a_batch_are_concatenated() -> None:
    rows = [Inputs([1], extras={"pixel_values": torch.full((n, 2), float(n))}) for n in (2, 1)]
    batch = Padded.of([rows[0], Inputs([7]), rows[1]])
    assert batch.merged["pixel_values"][:, 0].tolist() == [2.0, 2.0, 1.0]
