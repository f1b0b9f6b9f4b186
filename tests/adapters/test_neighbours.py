import numpy as np
import torch
from torch.nn.functional import normalize

from csalign.adapters.neighbours import mutual_neighbours, nearest_mean

RNG = torch.Generator().manual_seed(0)


def unit(*shape: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=RNG), dim=1)


def test_rows_find_their_own_copies_and_rows_without_one_may_stay_alone() -> None:
    x = unit(50, 16)
    order = torch.randperm(50, generator=RNG)
    rows, partners = mutual_neighbours(x, torch.cat([x[order], unit(20, 16)]))

    assert (order[partners[partners < 50]] == rows[partners < 50]).all()
    assert set(range(50)) <= set(rows.tolist())
    assert len(set(partners.tolist())) == len(partners)


def test_partners_are_those_of_the_whole_table_by_csls() -> None:
    x, y = unit(3_000, 8), unit(40, 8)
    scores = x @ y.T
    csls = (
        2 * scores - scores.topk(10, 1).values.mean(1)[:, None] - scores.topk(10, 0).values.mean(0)
    )
    best_y, best_x = csls.argmax(1), csls.argmax(0)
    expected = [(i, int(best_y[i])) for i in range(3_000) if best_x[best_y[i]] == i]

    rows, partners = mutual_neighbours(x, y)

    assert list(zip(rows.tolist(), partners.tolist(), strict=True)) == expected


def test_a_hub_does_not_take_everybodys_partner() -> None:
    own = torch.eye(12)[:10]
    near_all = normalize(torch.ones(1, 12) - 0.5 * torch.eye(12)[10:11], dim=1)
    x = normalize(own + 1.3 * near_all, dim=1)
    rows, partners = mutual_neighbours(x, torch.cat([own, near_all]), k=10)

    assert (x @ near_all.T).squeeze().min() > (x * own).sum(1).max()
    assert rows.tolist() == partners.tolist() == list(range(10))


def test_a_value_is_the_mean_over_the_nearest() -> None:
    known = normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), dim=1)
    values = torch.tensor([1.0, 3.0, 50.0])

    np.testing.assert_allclose(nearest_mean(known, values, known[:1], k=2), [2.0])
    np.testing.assert_allclose(nearest_mean(known, values, known[2:], k=9), [18.0])
    assert nearest_mean(known, values, known[:0]).shape == (0,)
