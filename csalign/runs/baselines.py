"""Free baselines: what centring, standardising and CCA alone do, as adapters fitted on the spot."""

import logging
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from csalign.adapters.canonical import ClosedForm, PairMoments, is_non_negative
from csalign.adapters.checkpoint import AdapterInfo, weights_digest
from csalign.adapters.kinds import CLOSED_FORM, MEAN_SHIFT, SHIFTS, STANDARDISED
from csalign.adapters.model import DEFAULT_WIDTH, Adapter
from csalign.adapters.side import CHUNK_ROWS, Rows, SideShape, UnitRows, loud_scale
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.core.progress import tick
from csalign.features import schema
from csalign.features.checks import check_directions
from csalign.features.join import ALL, Pairs, join_ids, split_names
from csalign.features.reader import FeatureSet, batch_vectors
from csalign.metrics.retrieval import mean_recall, rank_both_ways

MOST_IMAGES = 100_000  # to fit on; more change no direction
HELD_OUT, MOST_HELD_OUT = 5, 1_000  # a fifth of the images, at most so many, choose the ridge
FEWEST_HELD_OUT = 10  # of fewer nothing is chosen
POWERS = (1.0, 0.5)
STEPS = range(-8, 7)  # ridges 10^(step/2)
FIRST_STEPS = (0, -2, 2)  # then those beside the best
CONSTANT = 1e-6  # of the largest deviation; a dimension below varies by rounding alone

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Units = tuple[UnitRows, UnitRows]
PLAIN: Units = (UnitRows(), UnitRows())


def fit_baseline(name: str, rows: Pairs, *, seed: int = 0) -> tuple[Adapter, str]:
    """Fit a baseline: "mean-shift" or "standardised", see `fit_shift`, or "closed-form".

    That is CCA, see `fit_cca`, after the square root of sides without negative values and with
    loud dimensions scaled down, as in the closed form that training starts from.

    Args:
        name: one of `csalign.adapters.kinds.BASELINES`.
        rows: to fit on. A shift uses the rows with a partner, or all where none has one.
        seed: of the images that choose ridge and power.

    Returns:
        The adapter in evaluation mode, and the name of its closed form.

    Raises:
        DataError: CCA without pairs, or a side without rows.
        ShapeError: a shift of sides of different widths.
    """
    if name == CLOSED_FORM:
        units = _units_of(rows)
        form = fit_cca(rows, seed=seed, units=units)
        return _build(form, units), form.name
    texts = rows.texts_by_image
    images = np.unique(rows.text_image[texts])
    if not len(texts):
        images, texts = np.arange(len(rows.images)), np.arange(len(rows.texts))
    form = fit_shift(name, (rows.images, images), (rows.texts, texts), rows.name)
    return _build(form, PLAIN), form.name


def fit_shift(
    name: str, images: tuple[Rows, Ints], texts: tuple[Rows, Ints], source: str
) -> ClosedForm:
    """Subtract the mean of each side's unit rows, or also divide by the deviation per dimension.

    z = u - mean(u) is "mean-shift" (GR-CLIP, arXiv 2507.19054), z = (u - mean(u)) / std(u)
    "standardised" (I0T, arXiv 2412.14384); outputs are normalised again. Dimensions that do not
    vary become 0.

    Args:
        name: which of the two.
        images: embeddings (n, d), and the rows of them to fit on.
        texts: embeddings (m, d), likewise.
        source: of the rows, for messages.

    Raises:
        DataError: a side has no rows.
        ShapeError: the widths differ.
    """
    widths = images[0].shape[1], texts[0].shape[1]
    if widths[0] != widths[1]:
        raise ShapeError(
            f"{source}: images are {widths[0]} wide and texts {widths[1]}, but {name} needs one "
            "width; use closed-form, or train an adapter such as linear or glu"
        )
    if not min(len(images[1]), len(texts[1])):
        raise DataError(f"{source}: {name} needs images and texts to fit on; name another split")
    (x, spread_x), (y, spread_y) = _moments_of(*images), _moments_of(*texts)
    if name == MEAN_SHIFT:
        return ClosedForm("mean shift", x, torch.eye(widths[0]), y, torch.eye(widths[0]))
    weights = [_inverse(spread).diag() for spread in (spread_x, spread_y)]
    return ClosedForm(STANDARDISED, x, weights[0], y, weights[1])


def fit_cca(
    rows: Pairs, *, seed: int, width: int | None = None, units: Units = PLAIN
) -> ClosedForm:
    """Fit CCA on pairs, with the ridge and the power that do best on held-out ones.

    They are chosen by mean recall on a fifth of the images, at most 1,000, and then fitted on all;
    with fewer than 50 images both are 1. An image weighs 1 in all, and a caption that several
    share counts once.

    Args:
        rows: to fit on.
        seed: of the images that choose.
        width: of the outputs (default: 256, or the narrower side's if that is less).
        units: make the unit rows of images and of texts that the form maps.

    Raises:
        DataError: there are no pairs.
    """
    texts = rows.texts_by_image.astype(np.int64)
    images = rows.text_image[texts]
    if not len(texts):
        raise DataError(f"{rows.name}: has no pairs, which closed-form is fitted on")
    width = width or min(DEFAULT_WIDTH, rows.images.shape[1], rows.texts.shape[1])
    weights = 1 / rows.caption_counts[images]
    keys = rows.caption_keys[texts]
    weights = weights / np.bincount(keys)[keys]

    def moments(kept: npt.NDArray[np.bool_]) -> PairMoments:
        pairs = images[kept], texts[kept]
        return PairMoments.of(rows.images, rows.texts, pairs, weights[kept], units)

    captioned = np.random.default_rng(seed).permutation(np.unique(images))
    chosen = captioned[: min(len(captioned) // HELD_OUT, MOST_HELD_OUT)]
    ridge = power = 1.0
    if len(chosen) >= FEWEST_HELD_OUT:
        held_out = np.isin(np.arange(len(rows.images)), chosen)
        ridge, power = _choose(moments(~held_out[images]), rows.take(held_out), width, units)
    (form,) = moments(images >= 0).cca(ridge=ridge, powers=(power,), width=width)
    return form


def _choose(fitted: PairMoments, rows: Pairs, width: int, units: Units) -> tuple[float, float]:
    """Return the ridge and the power of the highest mean recall on held-out rows."""
    x, y = units[0](rows.images), units[1](rows.texts)
    recalls: dict[tuple[int, float], float] = {}
    wanted = [*FIRST_STEPS]
    while wanted:
        for step in wanted:
            tick("closed form", len(recalls))
            forms = fitted.cca(ridge=10 ** (step / 2), powers=POWERS, width=width)
            for power, form in zip(POWERS, forms, strict=True):
                images, texts = (own.numpy() for own in form.outputs(x, y))
                ranks = rank_both_ways(images, texts, rows.text_image)
                recalls[step, power] = mean_recall(*(way.summary() for way in ranks))
        best, power = max(recalls, key=lambda tried: recalls[tried])
        near = (best - 1, best + 1)
        wanted = [step for step in near if step in STEPS and (step, power) not in recalls]
    return float(f"{10 ** (best / 2):.0e}"), power


def _build(form: ClosedForm, units: Units) -> Adapter:
    weights = form.image_weight, form.text_weight
    shapes = {
        side: SideShape(
            kind="linear",
            input_width=weight.shape[1],
            width=len(weight),
            signed_sqrt=own.signed_sqrt,
            scaled=own.scale is not None,
        )
        for side, weight, own in zip(Modality, weights, units, strict=True)
    }
    with torch.random.fork_rng(devices=[]):
        adapter = Adapter(shapes)
    for side, own in zip(Modality, units, strict=True):
        if own.scale is not None:
            adapter.side(side).set_scale(own.scale)
    adapter.start_from(form)
    return adapter.eval()


def load_baseline(
    name: str, features: FeatureSet, *, measured: str | None = None, trained: str | None = None
) -> tuple[Adapter, AdapterInfo]:
    """Fit a baseline on rows of a feature set; see `choose_split` and `fit_baseline`."""
    split = choose_split(name, features, measured, trained)
    adapter, start = fit_baseline(name, read_rows(features, split))
    encoders = {side: features.table(side).encoder for side in Modality}
    info = adapter.info = AdapterInfo(
        adapters=adapter.shapes,
        encoders={side: own.spec for side, own in encoders.items()},
        encoder_fingerprints={side: own.weights for side, own in encoders.items()},
        encoder_settings={side: own.settings for side, own in encoders.items()},
        start=start,
        step=0,
        logit_scale=1.0,
        bandwidth=None,
        data_fingerprint=features.manifest.fingerprint(),
        train_split=split,
        weights_sha256=weights_digest(adapter),
    )
    log.info("%s: fitted on %s of %s (%s)", name, _words(split), features.path, info.start)
    return adapter, info


def choose_split(
    name: str, features: FeatureSet, measured: str | None, trained: str | None = None
) -> str:
    """Choose the split(s) to fit a baseline on, comma-separated, or "all".

    That is the one of the run beside it; else train; else all but the measured ones; else, of a
    shift, the measured rows themselves. Where nothing is measured, all rows come last.

    Args:
        name: of the baseline.
        features: the feature set.
        measured: split(s) that are measured, if any.
        trained: split(s) that the run was trained on, if there is one.

    Raises:
        DataError: closed-form would be fitted on the pairs that are measured.
    """
    there = features.splits()
    for split in (trained, "train"):
        if split is not None and split_names(split, there) <= set(there):
            return split
    if measured is None:
        return ALL
    others = set(there) - split_names(measured, there) - {None}
    if others:
        return ",".join(sorted(map(str, others)))
    if name not in SHIFTS:
        raise DataError(
            f"{features.path}: has no pairs but those that are measured ({_words(measured)}), so "
            f"that {name} cannot be fitted; hold some out with csalign split {features.path} "
            "--test 0.2"
        )
    return measured


def read_rows(features: FeatureSet, split: str) -> Pairs:
    """Read rows of some splits, at most 100,000 images, drawn at random, with their texts."""
    joined = join_ids(features, split)
    if joined.n_images > MOST_IMAGES:
        joined = joined.take_images(some_of(np.ones(joined.n_images, bool)))
    values = []
    for side in Modality:
        table, parts = features.table(side), []
        for _, local, batch in table.parts([schema.ID, schema.EMBEDDING], joined.side(side)[0]):
            parts.append(batch_vectors(batch, schema.EMBEDDING)[local])
            ids = batch.column(schema.ID).take(local)
            check_directions(parts[-1], ids, f"{joined.name}: {side.plural}")
        values.append(np.concatenate(parts or [np.empty((0, table.width), np.float32)]))
    return joined.with_embeddings(features, *values)


def some_of(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Keep at most `MOST_IMAGES` of the images of a mask (n,), drawn at random."""
    kept = np.zeros_like(mask)
    kept[np.random.default_rng(0).permutation(np.flatnonzero(mask))[:MOST_IMAGES]] = True
    return kept


def _words(split: str) -> str:
    return "all rows" if split == ALL else f"split {split}"


def _units_of(rows: Pairs) -> Units:
    roots = [is_non_negative(rows.embeddings(side)) for side in Modality]
    x, y = (
        UnitRows(root, loud_scale(rows.embeddings(side), signed_sqrt=root))
        for side, root in zip(Modality, roots, strict=True)
    )
    return x, y


def _moments_of(values: Rows, rows: Ints) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and the standard deviation (d,) of unit rows, float32."""
    mean = sum((part.sum(0) for part in _parts(values, rows)), torch.zeros(())) / len(rows)
    # In a second pass: a difference of squares would round small deviations away.
    squares = ((part - mean).square().sum(0) for part in _parts(values, rows))
    return mean.float(), (sum(squares, torch.zeros(())) / len(rows)).sqrt().float()


def _parts(values: Rows, rows: Ints) -> Iterator[Tensor]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield UnitRows()(values[rows[start : start + CHUNK_ROWS]]).double()


def _inverse(deviations: Tensor) -> Tensor:
    varies = deviations > CONSTANT * deviations.max()
    return torch.where(varies, 1 / deviations, torch.zeros_like(deviations))
