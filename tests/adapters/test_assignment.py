from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.assignment import Clusters, Stage, Trust, assign
from csalign.adapters.canonical import ClosedForm

NONE = torch.zeros(0, 24), torch.zeros(0, 20)


def clusters(seed: int, n: int = 2_400) -> Tensor:
    """Rows around 40 uneven centres in 8 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, 8, generator=generator) * torch.linspace(1.5, 0.5, 8)
    which = torch.randint(40, (n,), generator=generator)
    return centres[which] + 0.25 * torch.randn(n, 8, generator=generator)


def rotated(latent: Tensor, width: int, seed: int) -> Tensor:
    """Unit rows of a latent in a wider space of its own."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, latent.shape[1], generator=generator)).Q
    return normalize(latent @ basis.T, dim=1)


def found_first(form: ClosedForm, images: Tensor, texts: Tensor) -> float:
    """Return the share of images whose own text is among the first 1 %."""
    x = normalize((images - form.image_mean) @ form.image_weight.T, dim=1)
    y = normalize((texts - form.text_mean) @ form.text_weight.T, dim=1)
    scores = x @ y.T
    better = (scores > scores.diagonal()[:, None]).sum(1)
    return float((better < len(x) // 100).float().mean())


LATENT = clusters(0)
IMAGES, TEXTS = rotated(LATENT, 24, 1), rotated(LATENT, 20, 2)
ORDER = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(3))


def start(texts: Tensor, seed: int = 0) -> tuple[ClosedForm, Trust]:
    """Align with few and small assignments."""
    stages = Stage(30, 6, 100), Stage(45, 3, 16)
    return Clusters(IMAGES, texts, seed, width=8, stages=stages).start(NONE)


def test_two_rotations_of_clusters_are_aligned_without_pairs() -> None:
    form, trust = start(TEXTS[ORDER])
    again, same = start(TEXTS[ORDER])

    assert found_first(form, IMAGES, TEXTS) > 0.9
    assert trust.word == "good"
    torch.testing.assert_close(form.image_weight, again.image_weight)
    assert trust == same


def test_sides_without_relation_are_called_chance() -> None:
    other = rotated(torch.randn(2_400, 8, generator=torch.Generator().manual_seed(4)), 20, 2)
    _, trust = start(other)

    assert trust.word == "chance"


def test_pairs_decide_between_symmetric_matchings() -> None:
    # A square's corners can be matched in eight ways.
    angles = torch.arange(4) * torch.pi / 2
    corners = torch.stack([angles.cos(), angles.sin()], 1)
    square = (corners @ corners.T).fill_diagonal_(0)
    linear = torch.zeros(4, 4)
    linear[0, 2] = linear[1, 1] = 0.5
    orders = torch.tensor(list(permutations(range(4))))

    assert assign(square, square, linear, orders[:1]).tolist()[:2] == [2, 1]


@pytest.mark.parametrize("size", [5, 6])
def test_swaps_find_the_best_permutation(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    a, b, linear = torch.randn(3, size, size, generator=generator)
    a, b = ((side + side.T).fill_diagonal_(0) for side in (a, b))
    every = torch.tensor(list(permutations(range(size))))
    values = (a * b[every[:, :, None], every[:, None, :]]).sum((1, 2)) + linear[
        torch.arange(size), every
    ].sum(1)
    found = assign(a, b, linear, every[torch.randperm(len(every), generator=generator)[:40]])

    assert found.tolist() == every[values.argmax()].tolist()
