"""``csalign diagnose``: what can be foretold, the conflict within the loss, and the gap's parts."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csalign.adapters.checkpoint import read_info
from csalign.adapters.kinds import is_baseline
from csalign.core.enums import DivergenceName
from csalign.core.outputs import check_page
from csalign.core.progress import Progress, silent, tick, track
from csalign.core.results import Result
from csalign.evaluation.config import DiagnoseConfig
from csalign.evaluation.forecast import forecast
from csalign.evaluation.loading import load_aligned, with_features
from csalign.evaluation.protocols import AlignedRows
from csalign.evaluation.sides.diagnose import diagnose_sides, write_pair
from csalign.evaluation.sides.measure import is_sided
from csalign.features.join import ALL
from csalign.features.reader import FeatureSet
from csalign.features.sides import chosen_sides
from csalign.metrics.gap import centroid_distance, frechet_distance, uniformity
from csalign.objective.divergences import cs_terms
from csalign.objective.pairwise import alignment_uniformity
from csalign.report.diagnosis import write_diagnosis
from csalign.runs.metadata import read_lines, read_settings, run_folder

log = logging.getLogger(__name__)

CLIP_LOGIT_SCALE = 100.0
DEFAULT_WEIGHT = 1.0  # of the divergence
_CS = (DivergenceName.CS, DivergenceName.HOLDER)  # the same for two sides
SCALES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
SAMPLED = 5_000  # rows per side, for the uniformity over all their pairs

Term = Callable[[Tensor, Tensor], Tensor]


def gradient(term: Term, x: Tensor, y: Tensor) -> Tensor:
    """Compute the gradient of a term in both sides, (n + m, d) float64, rows of x first.

    The term maps x (n, d) and y (m, d), detached here, to a () tensor; one that normalises its rows
    has no gradient along them.
    """
    sides = tuple(side.detach().clone().requires_grad_() for side in (x, y))
    with torch.enable_grad():
        value = term(*sides)
    found = torch.autograd.grad(value, sides, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.double() for grad in found])


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine between two gradients, in [-1, 1]; 0 if one of them vanishes."""
    norms = float(a.norm() * b.norm())
    return float((a * b).sum()) / norms if norms else 0.0


class DiagnoseResult(Result):
    """What `diagnose` foretells and measures; the repr starts with the words."""

    def __repr__(self) -> str:
        name, lines = super().__repr__().split("\n", 1)
        return "\n  ".join([name, *self["forecast"]["words"]]) + f"\n{lines}"


def diagnose(config: DiagnoseConfig, progress: Progress = silent) -> Result:
    """Foretell an alignment, and decompose InfoNCE and the full objective on given embeddings.

    The forecast is made of the rows that train learns from (splits train and val if they exist),
    before any adapter; of sides of different widths without an adapter it is all; see `forecast`.

    InfoNCE is alignment, which pulls pairs together, plus uniformity, which pushes everything
    apart, matched pairs included; where the cosine of their gradients is near -1 they cancel, and
    the modalities stay apart. The divergence adds a cross term to the first and an intra-modal
    term to the second (arXiv 2502.17028).

    Returns:
        A document of plain numbers; losses in nats, cosines in [-1, 1], shares in [0, 1].

    Raises:
        DataError, ShapeError, SchemaError, OutputError: as `evaluate`.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> csalign.diagnose(features=(images, texts))["pairs"]
    60
    """
    if config.report is not None:
        check_page(config.report)
    config = with_features(config)
    features = FeatureSet.open(config.feature_set)
    there = features.splits()
    learned = ",".join(name for name in ("train", "val") if name in there)
    split = config.split or (learned if "train" in there else ALL)
    if is_sided(features, config.sides):
        return DiagnoseResult(_diagnose_sides(features, config, split))
    document: dict[str, Any] = {"forecast": forecast(features, split, seed=config.seed)}
    if config.adapter is not None or features.images.width == features.texts.width:
        document = {**_analyse(config), **document}
    else:
        document = {"features": str(features.path), "names": features.manifest.names, **document}
        log.info(
            "%s: the sides are %d and %d wide; the conflict and the gap, which need one width or "
            "--adapter, are left out",
            *(features.path.name, features.images.width, features.texts.width),
        )
    if config.report is not None:
        write_diagnosis(config.report, document)
    return DiagnoseResult(document)


def _diagnose_sides(features: FeatureSet, config: DiagnoseConfig, split: str) -> dict[str, Any]:
    """Diagnose all sides of a set by pairs, or two named ones as images and texts are."""
    if len(chosen_sides(features, config.sides)) > 2:
        return diagnose_sides(features, config, split)
    with tempfile.TemporaryDirectory(prefix="csalign-") as parent:
        folder = Path(parent, features.path.name)
        write_pair(features, config, split, folder)
        pair = {"features": folder, "sides": None, "split": ALL}
        found = diagnose(config.model_copy(update=pair))
    own = {"features": str(features.path), "split": split}
    found["forecast"]["split"] = split
    return {**found, **{key: value for key, value in own.items() if key in found}}


def _analyse(config: DiagnoseConfig) -> dict[str, Any]:
    """Measure the conflict and the parts of the gap."""
    aligned = load_aligned(config)
    run = None if is_baseline(config.adapter) else config.adapter
    scale = config.logit_scale or (read_info(run).logit_scale if run else CLIP_LOGIT_SCALE)
    x, y = _sample_pairs(aligned, config.pairs, config.seed)
    sigma = config.bandwidth
    weight = config.cs_weight
    if weight is None:
        weight = _trained_weight(run) if run else DEFAULT_WEIGHT
    cross = gradient(lambda a, b: cs_terms(a, b, sigma=sigma).cross, x, y)
    intra = gradient(lambda a, b: cs_terms(a, b, sigma=sigma).intra, x, y)

    def infonce_gradients(at: float) -> tuple[Tensor, Tensor]:
        return (
            gradient(lambda a, b: alignment_uniformity(a, b, logit_scale=at).alignment, x, y),
            gradient(lambda a, b: alignment_uniformity(a, b, logit_scale=at).uniformity, x, y),
        )

    scales = sorted({*SCALES, scale})
    gradients = {at: infonce_gradients(at) for at in track(scales, "gradients", len(scales))}
    tick("gap")

    def conflict(at: float, cs_weight: float) -> float:
        pull, push = gradients[at]
        return cosine(pull + cs_weight * cross, push + cs_weight * intra)

    infonce, divergence = alignment_uniformity(x, y, logit_scale=scale), cs_terms(x, y, sigma=sigma)
    alignment, uniform = float(infonce.alignment), float(infonce.uniformity)
    cs_cross, cs_intra = float(divergence.cross), float(divergence.intra)
    return {
        **aligned.describe(),
        "pairs": len(x),
        "logit_scale": scale,
        "cs_weight": weight,
        "bandwidth": sigma,
        "infonce": {
            "loss": alignment + uniform,
            "alignment": alignment,
            "uniformity": uniform,
            "gradient_cosine": conflict(scale, 0.0),
        },
        "objective": {
            "loss": alignment + uniform + weight * (cs_cross + cs_intra),
            "alignment": alignment + weight * cs_cross,
            "uniformity": uniform + weight * cs_intra,
            "gradient_cosine": conflict(scale, weight),
            "cs_divergence": cs_cross + cs_intra,
            "cs_cross": cs_cross,
            "cs_intra": cs_intra,
            "infonce_cs_gradient_cosine": cosine(
                torch.stack(gradients[scale]).sum(0), cross + intra
            ),
        },
        "gap": _decompose_gap(aligned, config.seed),
        "by_scale": [
            {"logit_scale": at, "infonce": conflict(at, 0.0), "objective": conflict(at, weight)}
            for at in gradients
        ],
    }


def _trained_weight(adapter: Path) -> float:
    """Return the weight that a run gave to the CS divergence, the last one if it varied."""
    run = run_folder(adapter)
    settings = read_settings(run)
    if settings.get("divergence", DivergenceName.CS) not in _CS:
        log.warning("%s: was trained without the CS divergence; its weight is set to 1", adapter)
        return DEFAULT_WEIGHT
    weights = [line["cs_weight"] for line in read_lines(run) if "cs_weight" in line]
    found = settings.get("cs_weight")
    if not isinstance(found, float | int):  # "auto", or no record
        found = weights[-1] if weights else DEFAULT_WEIGHT
    return float(found)


def _sample_pairs(aligned: AlignedRows, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sample images with their first texts, in float64."""
    owners = aligned.rows.text_image
    paired = np.flatnonzero(owners >= 0)
    _, first = np.unique(owners[paired], return_index=True)
    texts = paired[first]
    if len(texts) > most:
        texts = np.sort(np.random.default_rng(seed).choice(texts, most, replace=False))
    images = aligned.images[owners[texts]]
    return torch.from_numpy(images).double(), torch.from_numpy(aligned.texts[texts]).double()


def _decompose_gap(aligned: AlignedRows, seed: int) -> dict[str, float]:
    """Split the Frechet distance into the offset of the centroids and the rest."""
    images, texts = torch.from_numpy(aligned.images), torch.from_numpy(aligned.texts)
    offset, whole = centroid_distance(images, texts) ** 2, frechet_distance(images, texts)
    share = min(1.0, offset / whole) if whole else 0.0
    return {
        "frechet": whole,
        "centroid_share": share,
        "shape_share": 1 - share if whole else 0.0,
        "uniformity_image": uniformity(images.double(), max_rows=SAMPLED, seed=seed),
        "uniformity_text": uniformity(texts.double(), max_rows=SAMPLED, seed=seed),
    }
