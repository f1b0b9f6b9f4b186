import itertools

import numpy as np
import pytest
import torch

from csalign.metrics.neighbours import Neighbours, largest, unpacked
from csalign.metrics.retrieval import hubness, hubness_of, rank_both_ways


@pytest.mark.parametrize(("rows", "columns"), [(7, 400), (400, 7), (65, 161), (3, 176)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_largest_of_each_row_are_those_of_topk(
    rows: int, columns: int, is_transposed: bool
) -> None:
    torch.manual_seed(0)
    scores = torch.randn(columns, rows).T if is_transposed else torch.randn(rows, columns)

    values, at = unpacked(largest(scores, 10, first=1_000))

    expected = scores.topk(min(10, columns), dim=1).values
    assert torch.equal(values.sort(1, descending=True).values, expected)
    assert torch.equal(scores.gather(1, at - 1_000), values)


def test_neighbours_of_tiles_are_those_of_the_table() -> None:
    torch.manual_seed(0)
    scores, found = torch.randn(60, 500), Neighbours(60)
    for row, column in itertools.product(range(0, 60, 20), range(0, 500, 100)):
        found.add(row, column, scores[row : row + 20, column : column + 100])

    listed = scores.topk(10, dim=1).indices
    counts = torch.bincount(listed.flatten(), minlength=500).double()
    centred = counts - counts.mean()
    expected = float(centred.pow(3).mean() / centred.square().mean() ** 1.5)
    assert found.skewness(500) == pytest.approx(expected)


@pytest.mark.parametrize("tile", [16, 64, None])
def test_hubness_is_the_same_while_ranking(tile: int | None) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(90, 8)).astype(np.float32)
    texts = rng.normal(size=(150, 8)).astype(np.float32)
    owners = np.where(np.arange(150) % 7, np.arange(150) % 80, -1)  # some of both are unpaired

    found = Neighbours(90), Neighbours(150)
    rank_both_ways(images, texts, owners, tile=tile, neighbours=found)

    assert hubness_of(found) == pytest.approx(hubness(images, texts))
    scores = images @ texts.T
    scores[owners[owners >= 0], np.flatnonzero(owners >= 0)] -= 2e-6
    for own, there in zip(found, (scores, scores.T), strict=True):
        listed = own.best(np.arange(len(there)))[1].sort(dim=1).values.numpy()
        assert (listed == np.sort(np.argsort(-there, axis=1)[:, :10], axis=1)).all()
