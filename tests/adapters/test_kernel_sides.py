import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from csalign.adapters.generalised import GeneralForm, SideInput, SideMoments, add_side, consensus
from csalign.adapters.kernel_sides import SidesSetting, add_kernel_side, kernel_candidates
from csalign.adapters.side import UnitRows
from csalign.core.arrays import Floats

RNG = np.random.default_rng(0)
UNIT = UnitRows()
ANGLES = RNG.uniform(-1, 1, size=(500, 2))
COUNT = 400  # items to fit on
NAMES = ("audio", "image", "text")
MIXES = {name: RNG.normal(size=(4, 8)) for name in NAMES}


def curved(name: str, frequency: float) -> Floats:
    """Make rows that turn with the latent angles, faster on one side than on another."""
    waves = np.concatenate([np.sin(frequency * ANGLES), np.cos(frequency * ANGLES)], 1)
    noise = 0.05 * RNG.normal(size=(500, 8))
    return (waves @ MIXES[name] + noise).astype(np.float32)


ROWS = {name: curved(name, step) for name, step in zip(NAMES, (1.0, 1.7, 2.4), strict=True)}
SIDES = {name: SideInput(rows[:COUNT], np.arange(COUNT)) for name, rows in ROWS.items()}


def form_of(sides: dict[str, SideInput]) -> GeneralForm:
    (form,) = SideMoments.of(sides).gcca(ridge=0.03, powers=(0.5,), width=6)
    return form


FORM = form_of(SIDES)


def recall(outputs: dict[str, torch.Tensor]) -> float:
    """Return the mean R@1 of all ordered pairs of sides."""
    found = [
        ((outputs[a] @ outputs[b].T).argmax(1) == torch.arange(len(outputs[a]))).float().mean()
        for a in outputs
        for b in outputs
        if a != b
    ]
    return float(torch.stack(found).mean())


def test_kernels_find_more_than_linear_maps_where_sides_are_curved() -> None:
    linear = {n: own.outputs(UNIT(ROWS[n][COUNT:])) for n, own in FORM.sides.items()}
    candidates = dict(kernel_candidates(SIDES, FORM.functions(SIDES), 1.0, (0.01, 0.1), seed=0))
    assert [*candidates] == [SidesSetting(gamma=1.0, ridge=ridge) for ridge in (0.01, 0.1)]
    sides = candidates[SidesSetting(gamma=1.0, ridge=0.01)]
    test = {n: torch.from_numpy(ROWS[n][COUNT:]) for n in NAMES}
    kernel = {n: normalize(side(test[n]), dim=1).detach() for n, side in sides.items()}

    assert {side.shape.width for side in sides.values()} == {6}
    assert recall(kernel) > recall(linear) + 0.1


def test_predictions_are_those_of_kernel_ridge_regression_to_the_other_sides() -> None:
    small = {name: SideInput(rows[:80], np.arange(80)) for name, rows in ROWS.items()}
    ((_, sides),) = kernel_candidates(small, FORM.functions(small), 0.7, (0.2,), seed=0)
    units = {name: UNIT(rows[:80]) for name, rows in ROWS.items()}
    others = [FORM.sides[name].outputs(units[name]) for name in ("image", "text")]
    target = ((others[0] + others[1]) / 2).double().numpy()
    rows = normalize(units["audio"] - units["audio"].mean(0), dim=1).double().numpy()
    centre = np.eye(80) - 1 / 80
    kernel = centre @ np.exp(-0.7 * np.square(rows[:, None] - rows).sum(-1)) @ centre
    hat = kernel @ np.linalg.inv(kernel + 0.2 * np.trace(kernel) / 80 * np.eye(80))
    expected = target.mean(0) + hat @ (target - target.mean(0))

    found = sides["audio"](torch.from_numpy(ROWS["audio"][:80])).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("limit", [100, 1_000])
def test_landmarks_are_rows_whose_item_has_another_side(limit: int) -> None:
    items = {"audio": np.arange(COUNT), "image": np.arange(300), "text": np.arange(100, 300)}
    sides = {name: SideInput(ROWS[name][own], own) for name, own in items.items()}
    functions = FORM.functions(sides)
    ((_, found),) = kernel_candidates(sides, functions, 1.0, (0.1,), seed=0, limit=limit)

    counts = {name: side.shape.landmarks for name, side in found.items()}
    expected = {"audio": 300, "image": 300, "text": 200}
    assert counts == {name: min(own, limit) for name, own in expected.items()}


def test_a_kernel_adds_a_side_to_the_space_of_the_others() -> None:
    pair = {name: SIDES[name] for name in ("audio", "image")}
    form = form_of(pair)
    targets, counts = consensus(pair, form.functions(pair), np.arange(COUNT))
    assert bool((counts == 2).all())
    new = SIDES["text"]
    (kernel,) = add_kernel_side(new, targets.numpy(), 1.0, (0.01,), seed=0)
    linear = add_side(new, targets.numpy(), ridge=0.03)
    test = {name: UNIT(ROWS[name][COUNT:]) for name in NAMES}
    others = {name: form.sides[name].outputs(test[name]) for name in pair}
    predicted = normalize(kernel(torch.from_numpy(ROWS["text"][COUNT:])), dim=1).detach()

    assert recall(others | {"text": predicted}) > recall(
        others | {"text": linear.outputs(test["text"])}
    )
