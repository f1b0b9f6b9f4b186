from itertools import pairwise

import numpy as np
import pytest
import torch

from csalign.adapters.canonical import PairMoments
from csalign.adapters.generalised import GeneralForm, SideInput, SideMoments, add_side, consensus
from csalign.adapters.side import UnitRows
from csalign.core.arrays import Array, Floats
from csalign.core.errors import DataError

RNG = np.random.default_rng(0)
UNIT = UnitRows()
WIDTHS = {"audio": 9, "image": 12, "text": 7}
# A direction of a space of 5 is heard, seen and read with different noise.
LATENT = RNG.normal(size=(600, 5))
MIXES = {name: RNG.normal(size=(5, width)) for name, width in WIDTHS.items()}


def views(items: Array, seed: int = 0, noise: float = 0.5) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    return {
        name: (LATENT[items] @ mix + noise * rng.normal(size=(len(items), mix.shape[1]))).astype(
            np.float32
        )
        for name, mix in MIXES.items()
    }


ROWS = views(np.arange(600))
TRAIN = np.arange(400)
TEST = np.arange(400, 600)


def inputs(kept: dict[str, Array]) -> dict[str, SideInput]:
    return {name: SideInput(ROWS[name][own], own) for name, own in kept.items()}


def fitted(
    sides: dict[str, SideInput], ridge: float = 0.1, power: float = 1.0, width: int = 5
) -> GeneralForm:
    (form,) = SideMoments.of(sides).gcca(ridge=ridge, powers=(power,), width=width)
    return form


def outputs(form: GeneralForm, items: Array) -> dict[str, torch.Tensor]:
    return {
        name: own.outputs(UNIT(ROWS[name][items]))
        for name, own in form.sides.items()
        if name in ROWS
    }


def recall(form: GeneralForm, a: str, b: str) -> float:
    found = outputs(form, TEST)
    return float(((found[a] @ found[b].T).argmax(1) == torch.arange(len(TEST))).float().mean())


def some_missing() -> dict[str, SideInput]:
    rng = np.random.default_rng(1)
    return inputs({name: TRAIN[rng.random(len(TRAIN)) < 0.6] for name in WIDTHS})


def same(one: GeneralForm, other: GeneralForm) -> None:
    """Assert equal inner products of all sides, since the sign of a direction is free."""
    for a in one.sides:
        for b in one.sides:
            found, expected = (
                (form.sides[a].weight.T @ form.sides[b].weight).numpy() for form in (one, other)
            )
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_of_two_sides_with_all_pairs_it_is_the_cca_of_pairs(power: float) -> None:
    form = fitted(inputs({"image": TRAIN, "text": TRAIN}), 0.3, power)
    moments = PairMoments.of(ROWS["image"], ROWS["text"], (TRAIN, TRAIN), np.ones(len(TRAIN)))
    (expected,) = moments.cca(ridge=0.3, powers=(power,), width=5)

    image, text = form.sides["image"], form.sides["text"]
    signs = torch.sign((image.weight * expected.image_weight).sum(1))[:, None]
    torch.testing.assert_close(signs * image.weight, expected.image_weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(signs * text.weight, expected.text_weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image.mean, expected.image_mean, rtol=1e-5, atol=1e-6)
    x, y = expected.outputs(UNIT(ROWS["image"][TEST]), UNIT(ROWS["text"][TEST]))
    found = outputs(form, TEST)
    assert torch.equal((found["image"] @ found["text"].T).argmax(1), (x @ y.T).argmax(1))


def test_an_item_with_two_texts_is_as_in_the_cca_of_pairs() -> None:
    extra = views(np.arange(600), seed=5)["text"]
    texts, items = np.concatenate([ROWS["text"][TRAIN], extra[:100]]), np.r_[TRAIN, :100]
    form = fitted(
        {
            "image": SideInput(ROWS["image"], np.where(np.arange(600) < 400, np.arange(600), -1)),
            "text": SideInput(texts, items),
        }
    )
    weights = 1 / np.bincount(items)[items]
    moments = PairMoments.of(ROWS["image"], texts, (items, np.arange(500)), weights)
    (expected,) = moments.cca(ridge=0.1, powers=(1.0,), width=5)

    np.testing.assert_allclose(
        (form.sides["image"].weight.T @ form.sides["text"].weight).numpy(),
        (expected.image_weight.T @ expected.text_weight).numpy(),
        atol=1e-4,
    )


def test_without_ridge_and_missing_sides_the_directions_are_those_of_the_eigenproblem() -> None:
    form = fitted(inputs(dict.fromkeys(WIDTHS, TRAIN)), 1e-9, 0.0, 3)
    units = [UNIT(ROWS[name][TRAIN]).double().numpy() for name in WIDTHS]
    joint = np.cov(np.concatenate(units, 1).T, bias=True)
    ends = np.cumsum([0, *WIDTHS.values()])
    whiten = np.zeros_like(joint)
    for start, stop in pairwise(ends):
        own = slice(start, stop)
        values, vectors = np.linalg.eigh(joint[own, own])
        whiten[own, own] = vectors / np.sqrt(values) @ vectors.T
    expected = np.linalg.eigvalsh(whiten @ joint @ whiten)[::-1][:3] - 1
    z = [
        (torch.from_numpy(own).float() - form.sides[name].mean) @ form.sides[name].weight.T
        for name, own in zip(WIDTHS, units, strict=True)
    ]
    # Sum of covariances of all pairs by the sum of variances: the eigenvalue of the direction.
    joint_z = torch.stack(z)
    total, alone = joint_z.sum(0).square().mean(0), joint_z.square().mean(1).sum(0)
    assert (total / alone - 1).numpy() == pytest.approx(expected, abs=1e-3)


def test_items_without_all_sides_improve_the_map_of_a_pair() -> None:
    few = TRAIN[:10]
    pair = fitted(inputs({"audio": few, "text": few}))
    through = fitted(
        inputs({"audio": TRAIN[:200], "text": np.r_[few, TRAIN[200:]], "image": TRAIN})
    )

    assert recall(through, "audio", "text") > recall(pair, "audio", "text") + 0.1


def test_the_order_of_sides_items_and_rows_does_not_matter() -> None:
    sides = some_missing()
    expected = fitted(sides)
    rng = np.random.default_rng(2)
    names = rng.permutation(400)  # of the items
    moved = {}
    for name in ("text", "audio", "image"):
        order = rng.permutation(len(sides[name].items))
        moved[name] = SideInput(sides[name].rows[order], names[sides[name].items][order])

    same(fitted(moved), expected)


def test_rows_below_item_0_are_left_out() -> None:
    sides = some_missing()
    hidden = {
        name: SideInput(
            ROWS[name], np.where(np.isin(np.arange(600), own.items), np.arange(600), -1)
        )
        for name, own in sides.items()
    }
    same(fitted(hidden), fitted(sides))


def test_rows_without_partner_count_for_their_own_mean() -> None:
    sides = inputs({"audio": TRAIN, "image": TRAIN[:300], "text": TRAIN[:300]})
    form = fitted(sides)

    torch.testing.assert_close(form.sides["audio"].mean, UNIT(ROWS["audio"][TRAIN]).mean(0))
    counts = SideMoments.of(sides).counts
    assert counts.tolist() == [[0, 300, 300], [300, 0, 300], [300, 300, 0]]


def test_a_side_that_shares_no_direction_does_not_disturb_the_others() -> None:
    noise = np.random.default_rng(7).normal(size=(400, 6)).astype(np.float32)
    form = fitted(inputs({"image": TRAIN, "text": TRAIN}) | {"noise": SideInput(noise, TRAIN)})
    pair = fitted(inputs({"image": TRAIN, "text": TRAIN}))

    assert recall(form, "image", "text") > recall(pair, "image", "text") - 0.03


def test_sides_that_nothing_relates_are_refused() -> None:
    apart = inputs({"audio": TRAIN[:100], "image": TRAIN[100:], "text": TRAIN[200:]})
    with pytest.raises(DataError, match="sides audio share no item with image, text, so that"):
        SideMoments.of(apart)


def test_consensus_is_the_mean_over_the_sides_that_an_item_has() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32)
    sides = {
        "audio": SideInput(rows, np.array([7, 7, 3])),
        "text": SideInput(rows, np.array([-1, 7, 5])),
    }
    means, counts = consensus(sides, dict.fromkeys(sides, UNIT), np.array([7, 9, 3]))

    np.testing.assert_allclose(means, [[0.25, 0.75], [0.0, 0.0], [0.6, 0.8]], atol=1e-6)
    assert counts.tolist() == [2, 0, 1]


def test_a_new_side_comes_near_the_outputs_of_the_others() -> None:
    form = fitted(inputs({"audio": TRAIN, "image": TRAIN}))
    found = outputs(form, TRAIN)
    targets = ((found["audio"] + found["image"]) / 2).numpy()
    added = add_side(SideInput(ROWS["text"][TRAIN], TRAIN), targets, ridge=0.1)
    joined = GeneralForm("", {**form.sides, "text": added})
    all_at_once = fitted(inputs(dict.fromkeys(WIDTHS, TRAIN)))

    assert recall(joined, "text", "audio") > recall(all_at_once, "text", "audio") - 0.05
    some = np.where(TRAIN < 300, TRAIN, -1)
    targets[300:] = np.nan
    part = add_side(SideInput(ROWS["text"][TRAIN], some), targets, ridge=0.1)
    fewer = add_side(SideInput(ROWS["text"][:300], TRAIN[:300]), targets[:300], ridge=0.1)
    torch.testing.assert_close(part.weight, fewer.weight, rtol=1e-4, atol=1e-5)
