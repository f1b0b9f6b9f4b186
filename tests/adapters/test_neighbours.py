import numpy as np
import torch
from torch.nn.functional import normalize

from csalign.adapters.neighbours import nearest_mean


def test_a_value_is_the_mean_over_the_nearest() -> None:
    known = normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), dim=1)
    values = torch.tensor([1.0, 3.0, 50.0])

    np.testing.assert_allclose(nearest_mean(known, values, known[:1], k=2), [2.0])
    np.testing.assert_allclose(nearest_mean(known, values, known[2:], k=9), [18.0])
    assert nearest_mean(known, values, known[:0]).shape == (0,)
