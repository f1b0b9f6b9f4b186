"""The choice of a closed form on validation, and matches of unpaired rows."""

import logging
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from csalign.core.enums import Modality
from csalign.features.join import PairedRows, Pairs
from csalign.training.closed_forms.initialization import Start, fit_setting, initialize
from csalign.training.closed_forms.settings import Setting
from csalign.training.config import AdapterOptions
from csalign.training.data import Part, TrainingData, Unpaired
from csalign.training.network.sampler import PairSampler
from csalign.training.network.validation import Measured, Score, measure, pool, validate

LATENT, IMAGES, TEXTS = 64, 96, 80  # widths
HELD_OUT = 200


def two_views(n: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one latent under two rotations, with noise of their own."""
    rng = np.random.default_rng(seed)
    scales = np.linspace(1.5, 0.5, LATENT)
    latent = rng.normal(size=(n, LATENT)) * scales
    found = []
    for width in (IMAGES, TEXTS):
        basis = np.linalg.qr(rng.normal(size=(width, width)))[0][:LATENT]
        found.append((latent @ basis + noise * rng.normal(size=(n, width))).astype(np.float32))
    return found[0], found[1]


def data_of(
    images: np.ndarray,
    texts: np.ndarray,
    pairs: int,
    unpaired: int,
    *,
    folds: int = 1,
) -> TrainingData:
    """The first rows as pairs, some as validation rows, and the rest as unpaired rows."""
    rows = Pairs(
        name="rows", images=images[:pairs], texts=texts[:pairs], text_image=np.arange(pairs)
    )
    ids = pa.array(np.arange(HELD_OUT).astype(str))
    held_out = slice(pairs, pairs + HELD_OUT)
    val = PairedRows(
        name="val",
        images=images[held_out],
        texts=texts[held_out],
        text_image=np.arange(HELD_OUT),
        image_ids=ids,
        text_ids=ids,
        captions=ids,
    )
    masks = []
    for number in range(folds if folds > 1 else 0):
        masks.append(np.random.default_rng(number).random(pairs) < 0.25)
    start = pairs + HELD_OUT
    rest = np.arange(start, start + unpaired)
    parts = {
        Modality.IMAGE: [Part(images, rest)],
        Modality.TEXT: [Part(texts, np.random.default_rng(9).permutation(rest))],
    }
    return TrainingData(None, "train", rows, val, Unpaired(parts), tuple(masks))  # type: ignore[arg-type]


def sampler_of(data: TrainingData, leave_out: np.ndarray | None = None) -> PairSampler:
    return PairSampler(data.rows, "first", other_weight=0.0, once=False, leave_out=leave_out)


LINEAR = AdapterOptions(adapter="linear")


def start_of(data: TrainingData, **options: bool) -> Start:
    return initialize(LINEAR, data, partial(sampler_of, data), {}, 0, **options)


def maps(adapter: object) -> dict[str, torch.Tensor]:
    assert hasattr(adapter, "state_dict")
    state: dict[str, torch.Tensor] = adapter.state_dict()
    return state


def test_matches_of_unpaired_rows_multiply_the_recall_of_few_pairs() -> None:
    data = data_of(*two_views(50 + HELD_OUT + 2_000, 0.9), 50, 2_000)
    assert data.val is not None
    alone = validate(start_of(data, unpaired_matches=False).adapter, data.val).mean_recall
    start = start_of(data)

    assert validate(start.adapter, data.val).mean_recall > 1.5 * alone
    assert start.setting.rounds > 1
    assert "matches of unpaired rows, share" in start.summary
    assert "from the pairs alone" in start.summary
    assert start.matches is not None
    assert start.matches.share == start.setting.share > 0
    assert start.matches.images.shape == (len(start.matches.texts), IMAGES)
    # Row i of both sides comes from the same latent more often than not.
    x = {row.tobytes(): n for n, row in enumerate(data.unpaired.parts[Modality.IMAGE][0].values)}
    y = {row.tobytes(): n for n, row in enumerate(data.unpaired.parts[Modality.TEXT][0].values)}
    same = [
        x[image.tobytes()] == y[text.tobytes()]
        for image, text in zip(start.matches.images, start.matches.texts, strict=True)
    ]
    assert np.mean(same) > 0.3


def test_matches_of_unrelated_rows_are_not_used() -> None:
    images, texts = two_views(100 + HELD_OUT + 1_000, 0.3)
    rng = np.random.default_rng(1)
    images[300:], texts[300:] = (rng.normal(size=own[300:].shape) for own in (images, texts))
    start = start_of(data_of(images, texts, 100, 1_000))

    assert (start.setting.rounds, start.setting.share, start.matches) == (0, 0.0, None)
    assert start.summary.startswith("closed form: ")
    assert "unpaired" not in start.summary


@pytest.mark.parametrize("unpaired", [0, 1_000])
def test_a_setting_fitted_on_the_same_pairs_is_the_start(unpaired: int) -> None:
    data = data_of(*two_views(60 + HELD_OUT + unpaired, 0.9), 60, unpaired)
    start = start_of(data)
    again = Setting.model_validate_json(start.setting.model_dump_json())
    adapter, matches = fit_setting(again, LINEAR, data, sampler_of(data), {}, 0)

    assert (again.rounds > 0) == (matches is not None) == (unpaired > 0)
    for name, values in maps(start.adapter).items():
        torch.testing.assert_close(maps(adapter)[name], values, atol=1e-5, rtol=0)


def test_a_ridge_at_an_end_of_the_grid_extends_it() -> None:
    images, texts = two_views(60 + HELD_OUT, 2.5)
    start = start_of(data_of(images, texts, 60, 0))

    assert start.setting.ridge > 3


def test_a_ridge_at_the_last_end_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40 + HELD_OUT, IMAGES)).astype(np.float32)
    texts = images[:, :TEXTS] + 3 * rng.normal(size=(40 + HELD_OUT, TEXTS)).astype(np.float32)
    with caplog.at_level(logging.WARNING, "csalign"):
        start = start_of(data_of(images, texts, 40, 0))

    assert (start.setting.ridge == 1_000) == any("ridge 1000" in line for line in caplog.messages)


def test_few_pairs_do_not_replace_a_space_that_is_shared() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(60 + HELD_OUT, 32)).astype(np.float32)
    texts = images + 1.2 * rng.normal(size=images.shape).astype(np.float32)
    start = start_of(data_of(images, texts, 60, 0))

    assert start.name == "centred features"


def test_a_gain_within_the_noise_does_not_replace_a_simpler_form() -> None:
    recalls = np.linspace(0, 1, 100)
    score = Score(0.5, 0.5, 0.1)
    simple = Measured(score, recalls)
    noisy = recalls + np.tile([0.5, -0.49], 50)
    steady = recalls + np.tile([0.02, 0.01], 50)

    assert not Measured(score, noisy).beats(simple)
    assert Measured(score, steady).beats(simple)
    assert not simple.beats(simple)


def test_recalls_by_image_average_to_the_mean_recall() -> None:
    rng = np.random.default_rng(0)
    owners = np.array([0, 0, 0, 1, 3, 3, -1, 4, 5])
    images, texts = (rng.normal(size=(n, 4)).astype(np.float32) for n in (6, len(owners)))
    own = measure(images, texts, owners)
    both = pool([own, own])

    assert own.recalls.shape == (5,)
    assert own.score.mean_recall == pytest.approx(own.recalls.mean())
    assert both.score == pytest.approx(own.score)
    assert both.recalls.shape == (10,)


def test_several_folds_choose_together_and_the_first_is_left_out() -> None:
    data = data_of(*two_views(80 + HELD_OUT, 0.5), 80, 0, folds=3)
    start = start_of(data)
    adapter, _ = fit_setting(start.setting, LINEAR, data, sampler_of(data, data.folds[0]), {}, 0)

    for name, values in maps(start.adapter).items():
        torch.testing.assert_close(maps(adapter)[name], values, atol=1e-5, rtol=0)


def test_random_adapters_have_a_setting_too() -> None:
    data = data_of(*two_views(60 + HELD_OUT, 0.3), 60, 0)
    options = AdapterOptions(adapter="linear", init="random")
    start = initialize(options, data, partial(sampler_of, data), {}, 0)
    adapter, matches = fit_setting(start.setting, options, data, sampler_of(data), {}, 0)

    assert (start.name, matches) == ("random", None)
    for name, values in maps(start.adapter).items():
        torch.testing.assert_close(maps(adapter)[name], values)
