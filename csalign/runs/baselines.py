"""Free baselines: what centring, standardising and CCA alone do, as adapters fitted on the spot."""

import logging

import numpy as np
import torch

from csalign.adapters.canonical import ClosedForm, PairMoments, is_non_negative
from csalign.adapters.checkpoint import AdapterInfo, unknown_info, weights_of
from csalign.adapters.model import DEFAULT_WIDTH, Adapter
from csalign.adapters.side import SideShape, UnitRows, loud_scale
from csalign.core.arrays import Mask
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.core.progress import reported_to, silent, tick
from csalign.features.checks import check_directions
from csalign.features.join import ALL, Pairs, first_alike, join_ids, split_names
from csalign.features.reader import FeatureSet
from csalign.metrics.retrieval import mean_recall, rank_both_ways

MOST_IMAGES = 100_000  # to fit on; more change no direction
HELD_OUT, MOST_HELD_OUT = 5, 1_000  # a fifth of the images, at most so many, choose the ridge
FEWEST_HELD_OUT = 10  # of fewer nothing is chosen
POWERS = (1.0, 0.5)
OTHERS = 0.3  # weight of an image's captions after the first, as in training
STEPS = (-4, -2, 0, 2, 4)  # ridges 10^(step/2); then those beside the best
CONSTANT = 1e-6  # of the largest deviation; a dimension below varies by rounding alone

log = logging.getLogger(__name__)

Units = tuple[UnitRows, UnitRows]


def load_baseline(
    name: str, features: FeatureSet, measured: str | None = None
) -> tuple[Adapter, AdapterInfo]:
    """Fit a baseline on rows of a feature set; see `choose_split` and `fit_baseline`."""
    split = choose_split(name, features, measured)
    rows = read_rows(features, split)
    adapter, start = fit_baseline(name, rows)
    encoders = {side: features.table(side).encoder for side in Modality}
    adapter.info = unknown_info(adapter.shapes).model_copy(
        update={
            "encoders": {side: own.spec for side, own in encoders.items()},
            "encoder_fingerprints": {side: own.weights for side, own in encoders.items()},
            "encoder_settings": {side: own.settings for side, own in encoders.items()},
            "start": start,
            "data_fingerprint": features.manifest.fingerprint(),
            "train_split": split,
            "weights_sha256": weights_of(adapter)[1],
        }
    )
    if split != measured:  # that is warned of
        log.info("%s: fitted on %s%s", name, rows.name, f" ({start})" * (name == "closed-form"))
    return adapter, adapter.info


def choose_split(
    name: str, features: FeatureSet, measured: str | None, trained: str | None = None
) -> str:
    """Choose the split(s) to fit a baseline on, comma-separated, or "all".

    That is the one of the run beside it; else train; else all but the measured ones; else the
    measured ones, except for closed-form. Where nothing is measured, it is "all" unless there is a
    train split.

    Raises:
        DataError: closed-form would be fitted on the pairs that are measured.
    """
    there = set(features.splits())
    for split in (trained, "train"):
        if split is not None and split_names(split, there) <= there:
            return split
    others = there - split_names(measured or ALL, there) - {None}
    if others:
        return ",".join(sorted(map(str, others)))
    if measured is not None and name == "closed-form":
        raise DataError(
            f"{features.path}: has no pairs but those that are measured "
            f"(split {measured}), and {name} is fitted on others; hold some out with csalign split "
            f"{features.path} --test 0.2"
        )
    return measured or ALL


def read_rows(features: FeatureSet, split: str) -> Pairs:
    """Read rows of some splits, at most 100,000 images, drawn at random, with their texts."""
    joined = join_ids(features, split)
    if joined.n_images > MOST_IMAGES:
        kept = some_of(np.ones(joined.n_images, bool))
        has_pairs = bool(joined.caption_counts.any())
        joined = joined.take_images(kept, unpaired_texts=not has_pairs)
    values = (features.table(side).take(joined.side(side)[0]) for side in Modality)
    rows = joined.with_embeddings(features, *values)
    for side, ids in zip(Modality, (rows.image_ids, rows.text_ids), strict=True):
        check_directions(rows.embeddings(side), ids, f"{rows.name}: {side.plural}")
    return rows


def some_of(mask: Mask) -> Mask:
    """Keep at most 100,000 of the images of a mask (n,), drawn at random."""
    kept = np.zeros_like(mask)
    kept[np.random.default_rng(0).permutation(np.flatnonzero(mask))[:MOST_IMAGES]] = True
    return kept


def fit_baseline(name: str, rows: Pairs) -> tuple[Adapter, str]:
    """Fit a baseline on rows.

    Of the unit rows u of each side, "mean-shift" is z = u - mean(u) (GR-CLIP, arXiv 2507.19054),
    and "standardised" z = (u - mean(u)) / std(u) per dimension (I0T, arXiv 2412.14384), where
    dimensions that do not vary become 0; both use the rows with a partner, or all where none has
    one. "closed-form" is CCA of unit rows as training makes them, 256 wide at most, with the ridge
    and power that do best on held-out images. Outputs are normalised again.

    Returns:
        The adapter in evaluation mode, and the name of its closed form.

    Raises:
        DataError: closed-form without pairs, or a side without rows.
        ShapeError: another one of sides of different widths.
    """
    if name == "closed-form":
        roots = {side: is_non_negative(rows.embeddings(side)) for side in Modality}
        x, y = (
            UnitRows(root, loud_scale(rows.embeddings(side), signed_sqrt=root))
            for side, root in roots.items()
        )
        form = _fit_cca(rows, (x, y))
    else:
        x = y = UnitRows()
        form = _fit_shift(name, rows)
    weights = form.image_weight, form.text_weight
    shapes = {
        side: SideShape(
            kind="linear",
            input_width=weight.shape[1],
            width=len(weight),
            signed_sqrt=own.signed_sqrt,
            scaled=own.scale is not None,
        )
        for side, weight, own in zip(Modality, weights, (x, y), strict=True)
    }
    with torch.random.fork_rng(devices=[]):
        adapter = Adapter(shapes)
    for side, own in zip(Modality, (x, y), strict=True):
        if own.scale is not None:
            adapter.side(side).set_scale(own.scale)
    adapter.start_from(form)
    return adapter.eval(), form.name


def _fit_shift(name: str, rows: Pairs) -> ClosedForm:
    width, other = rows.images.shape[1], rows.texts.shape[1]
    if width != other:
        raise ShapeError(
            f"{rows.name}: images are {width} wide and texts {other}, but {name} needs one width; "
            "use closed-form, or train an adapter such as linear or glu"
        )
    sides, texts = [rows.images, rows.texts], rows.texts_by_image
    if len(texts):
        sides = [rows.images[np.unique(rows.text_image[texts])], rows.texts[texts]]
    if not min(map(len, sides)):
        raise DataError(f"{rows.name}: {name} needs images and texts to fit on; add some")
    maps = []
    for values in sides:
        std, mean = torch.std_mean(UnitRows()(values), dim=0, correction=0)
        scale = torch.where(std > CONSTANT * std.max(), 1 / std, 0)
        maps += [mean, torch.eye(width) if name == "mean-shift" else scale.diag()]
    return ClosedForm(name, *maps)


def _fit_cca(rows: Pairs, units: Units) -> ClosedForm:
    """Choose ridge and power, 1 with fewer than 50 images, then fit on all.

    An image weighs 1 in all, and a caption that several share counts once.
    """
    texts = rows.texts_by_image.astype(np.int64)
    images, keys = rows.text_image[texts], rows.caption_keys[texts]
    if not len(texts):
        raise DataError(
            f"{rows.name}: has no pairs, which closed-form is fitted on; use mean-shift, or import "
            "the rows again with --pairs"
        )
    first = np.diff(images, prepend=-1) > 0
    weights = np.where(first, 1.0, OTHERS) / np.bincount(keys)[keys]

    def moments(kept: Mask) -> PairMoments:
        pairs = images[kept], texts[kept]
        return PairMoments.of(rows.images, rows.texts, pairs, weights[kept], units)

    # One image per caption, which no other pair shares: what is learned by heart would be chosen.
    order = np.random.default_rng(0).permutation(np.flatnonzero(first))
    captioned = images[order[np.sort(np.unique(first_alike(keys[order])))]]
    chosen = captioned[: min(len(captioned) // HELD_OUT, MOST_HELD_OUT)]
    width = min(DEFAULT_WIDTH, rows.images.shape[1], rows.texts.shape[1])
    ridge = power = 1.0
    if len(chosen) >= FEWEST_HELD_OUT:
        held_out = np.isin(np.arange(len(rows.images)), chosen)
        kept = ~np.isin(keys, keys[held_out[images]])
        if kept.any():
            ridge, power = _choose(moments(kept), rows.take(held_out), width, units)
    (form,) = moments(images >= 0).cca(ridge=ridge, powers=(power,), width=width)
    return form


def _choose(fitted: PairMoments, rows: Pairs, width: int, units: Units) -> tuple[float, float]:
    """Return the ridge and the power of the highest mean recall on held-out rows."""
    x, y = units[0](rows.images), units[1](rows.texts)
    recalls: dict[tuple[int, float], float] = {}
    wanted: tuple[int, ...] = STEPS
    for _ in range(2):
        for step in wanted:
            tick("closed form: settings", len(recalls))
            forms = fitted.cca(ridge=10 ** (step / 2), powers=POWERS, width=width)
            for power, form in zip(POWERS, forms, strict=True):
                images, texts = (own.numpy() for own in form.outputs(x, y))
                with reported_to(silent):  # a phase for all
                    ranks = rank_both_ways(images, texts, rows.text_image)
                recalls[step, power] = mean_recall(*(way.summary() for way in ranks))
        best, power = max(recalls, key=lambda tried: recalls[tried])
        wanted = (best - 1, best + 1)
    return float(f"{10 ** (best / 2):.0e}"), power
