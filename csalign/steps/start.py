"""Where training starts: the best closed form on validation, or random weights."""

import logging
from collections.abc import Iterator

import torch

from csalign.adapters.canonical import ClosedForm, PairMoments, is_non_negative
from csalign.adapters.model import Adapter, SideShape
from csalign.config import TrainConfig
from csalign.enums import Modality
from csalign.errors import ConfigError
from csalign.steps.batches import PairSampler
from csalign.steps.validation import Score, validate
from csalign.store.join import PairedRows

log = logging.getLogger(__name__)

MAX_WIDTH = 256
RIDGES = (0.3, 1.0, 3.0, 10.0)
POWERS = (0.5, 1.0)
# Without a validation set there is nothing to choose by; these did well on every corpus tried.
SAFE_RIDGE, SAFE_POWER = 1.0, 1.0


def closed_form_start(
    rows: PairedRows, sampler: PairSampler, val: PairedRows | None, config: TrainConfig
) -> tuple[Adapter, str]:
    """Build adapters at the closed form that does best on validation.

    Candidates are CCA over a grid of ridges and powers and, where the encoders share a width
    already, the centred features themselves: aligned encoders such as CLIP's can only lose by a
    map fitted on few pairs.

    Args:
        rows: training rows.
        sampler: gives their pairs and weights.
        val: held-out rows, or None.
        config: adapter kind and widths.

    Returns:
        The adapters and the winner's name.
    """
    if val is None:
        form, roots = next(_candidates(rows, sampler, config, (SAFE_RIDGE,), (SAFE_POWER,)))
        return _adapter_at(form, config, roots), form.name
    best: tuple[Adapter, str] | None = None
    best_score: Score | None = None
    for form, roots in _candidates(rows, sampler, config, RIDGES, POWERS):
        adapter = _adapter_at(form, config, roots)
        score = validate(adapter, val)
        log.debug("start %s: validation mean recall %.4f", form.name, score.mean_recall)
        if score.better_than(best_score):
            best, best_score = (adapter, form.name), score
    assert best is not None
    return best


def random_start(rows: PairedRows, config: TrainConfig) -> tuple[Adapter, str]:
    """Build adapters with random weights, seeded."""
    widths = rows.images.shape[1], rows.texts.shape[1]
    width = config.width or min(MAX_WIDTH, *widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Adapter(_shapes(config, widths, width, (False, False))), "random"


def _candidates(
    rows: PairedRows,
    sampler: PairSampler,
    config: TrainConfig,
    ridges: tuple[float, ...],
    powers: tuple[float, ...],
) -> Iterator[tuple[ClosedForm, tuple[bool, bool]]]:
    """Closed forms, the safest first, and whether the square root is taken of images and texts."""
    widths = rows.images.shape[1], rows.texts.shape[1]
    pairs, weights = sampler.weighted_pairs()
    roots = (is_non_negative(rows.images), is_non_negative(rows.texts))
    moments = PairMoments.of(rows.images, rows.texts, pairs, weights, roots)
    if widths[0] == widths[1] and config.width in (None, widths[0]):
        plain = (False, False)
        if roots == plain:
            yield moments.centred(), plain
        else:
            yield PairMoments.of(rows.images, rows.texts, pairs, weights, plain).centred(), plain
    width = config.width or min(MAX_WIDTH, *widths)
    if width > min(widths):
        raise ConfigError(
            f"width: {width} is more than the narrower encoder's {min(widths)}, which the closed "
            "form cannot give; lower it, or use --init random"
        )
    for ridge in ridges:
        for form in moments.cca(ridge=ridge, powers=powers, width=width):
            yield form, roots


def _adapter_at(form: ClosedForm, config: TrainConfig, roots: tuple[bool, bool]) -> Adapter:
    width, image_width = form.image_weight.shape
    shapes = _shapes(config, (image_width, form.text_weight.shape[1]), width, roots)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapter = Adapter(shapes)
    adapter.image.start_from(form.image_mean, form.image_weight)
    adapter.text.start_from(form.text_mean, form.text_weight)
    return adapter


def _shapes(
    config: TrainConfig, widths: tuple[int, int], width: int, roots: tuple[bool, bool]
) -> dict[Modality, SideShape]:
    return {
        side: SideShape(
            kind=config.adapter,
            input_width=input_width,
            width=width,
            hidden=config.hidden,
            dropout=config.dropout,
            signed_sqrt=root,
        )
        for side, input_width, root in zip(Modality, widths, roots, strict=True)
    }
