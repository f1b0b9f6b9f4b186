from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from csalign.adapters.draws import Dropout, drawing, normal_like


def drawn(layer: nn.Module, x: Tensor, first: int, seed: tuple[int, ...] = (1, 2)) -> Tensor:
    with drawing(seed, first):
        noise = normal_like(x)
        found: Tensor = layer(torch.ones_like(x))
        return torch.cat([noise, found, layer(torch.ones_like(x))], dim=-1)


@pytest.mark.parametrize("shape", [(200, 5), (200, 1, 3)])
def test_a_row_gets_the_same_numbers_whatever_rows_are_beside_it(shape: tuple[int, ...]) -> None:
    x, layer = torch.zeros(shape), Dropout(0.4)
    whole = drawn(layer, x, 0)
    for cuts in ([0, 200], [0, 1, 64, 200], [0, 31, 33, 100, 101, 200]):
        parts = [drawn(layer, x[a:b], a) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(drawn(layer, x, 0, (1, 3)), whole)


def test_layers_and_rows_draw_apart() -> None:
    found = drawn(Dropout(0.5), torch.zeros(64, 1000), 0)
    _, first, second = (part != 0 for part in torch.split(found, 1000, dim=1))

    assert 0.45 < (first == second).double().mean() < 0.55
    assert 0.45 < (first[:32] == first[32:]).double().mean() < 0.55


@pytest.mark.parametrize("p", [1e-7, 0.1, 0.3, 0.9])
def test_dropout_keeps_the_mean_and_drops_its_share(p: float) -> None:
    layer, x = Dropout(p), torch.ones(1000, 300)
    with drawing((0,), 7):
        found = layer(x)

    assert float((found == 0).double().mean()) == pytest.approx(p, abs=0.005)
    assert float(found.double().mean()) == pytest.approx(1, abs=0.01)
    assert len(found.unique()) <= 2


def test_noise_is_standard_normal() -> None:
    with drawing((0,), 0):
        found = normal_like(torch.empty(1000, 100)).double()

    assert float(found.mean()) == pytest.approx(0, abs=0.01)
    assert float(found.std()) == pytest.approx(1, abs=0.01)
    assert float((found**4).mean()) == pytest.approx(3, abs=0.1)


def test_evaluation_and_calls_outside_of_training_are_torchs_own() -> None:
    x = torch.ones(40, 8)
    layer = Dropout(0.5)
    torch.manual_seed(3)
    found = layer(x), normal_like(x)
    torch.manual_seed(3)
    expected = nn.Dropout(0.5)(x), torch.randn_like(x)

    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with drawing((0,), 0):
        assert torch.equal(layer.eval()(x), x)
