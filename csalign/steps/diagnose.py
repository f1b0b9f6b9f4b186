"""``csalign diagnose``: does the objective work against itself on these embeddings, and how."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from csalign.adapters.checkpoint import read_info
from csalign.config import DiagnoseConfig, EvalConfig
from csalign.metrics.gap import centroid_distance, frechet_distance, uniformity
from csalign.objective.conflict import gradient_cosine
from csalign.objective.divergence import cs_terms
from csalign.objective.infonce import alignment_uniformity, infonce
from csalign.progress import Progress, silent
from csalign.steps.evaluate import Measured, measure

CLIP_LOGIT_SCALE = 100.0


def diagnose(config: DiagnoseConfig, progress: Progress = silent) -> dict[str, Any]:
    """Take InfoNCE and the full objective apart, on the embeddings as they are.

    InfoNCE is alignment, which pulls pairs together, plus uniformity, which pushes everything
    apart, the matched pairs included; where the cosine of their gradients is near -1 they undo
    each other, and the modalities stay apart. The divergence adds a cross term to the first and an
    intra-modal term to the second (arXiv 2502.17028).

    Args:
        config: what to look at.
        progress: told how far it is.

    Returns:
        A document of plain numbers; losses in nats, cosines in [-1, 1], shares in [0, 1].

    Raises:
        DataError, ShapeError, SchemaError: as `evaluate`.
    """
    progress("diagnosis stages", 0, 2)
    measured = measure(
        EvalConfig(
            features=config.features,
            adapter=config.adapter,
            allow_adapter=config.allow_adapter,
            split=config.split,
            seed=config.seed,
            device=config.device,
        )
    )
    progress("diagnosis stages", 1, 2)
    scale = config.logit_scale
    if scale is None:
        scale = read_info(config.adapter).logit_scale if config.adapter else CLIP_LOGIT_SCALE
    x, y = _pairs(measured, config)
    document = {
        "features": str(config.features),
        "adapter": None if config.adapter is None else str(config.adapter),
        "split": measured.split,
        "pairs": len(x),
        "logit_scale": scale,
        "cs_weight": config.cs_weight,
        "bandwidth": config.bandwidth,
        "infonce": _infonce(x, y, scale),
        "objective": _objective(x, y, scale, config),
        "gap": _gap(measured),
    }
    progress("diagnosis stages", 2, 2)
    return document


def _pairs(measured: Measured, config: DiagnoseConfig) -> tuple[Tensor, Tensor]:
    """One pair an image, at most as many as asked for, in float64."""
    owned = np.flatnonzero(measured.text_image >= 0)
    _, first = np.unique(measured.text_image[owned], return_index=True)
    texts = owned[first]
    if len(texts) > config.pairs:
        rng = np.random.default_rng(config.seed)
        texts = np.sort(rng.choice(texts, config.pairs, replace=False))
    images = measured.images[measured.text_image[texts]]
    return torch.from_numpy(images).double(), torch.from_numpy(measured.texts[texts]).double()


def _infonce(x: Tensor, y: Tensor, scale: float) -> dict[str, float]:
    terms = alignment_uniformity(x, y, logit_scale=scale)
    cosine = gradient_cosine(
        lambda a, b: alignment_uniformity(a, b, logit_scale=scale).alignment,
        lambda a, b: alignment_uniformity(a, b, logit_scale=scale).uniformity,
        x,
        y,
    )
    return {
        "loss": float(terms.alignment + terms.uniformity),
        "alignment": float(terms.alignment),
        "uniformity": float(terms.uniformity),
        "gradient_cosine": cosine.overall,
    }


def _objective(x: Tensor, y: Tensor, scale: float, config: DiagnoseConfig) -> dict[str, float]:
    weight, sigma = config.cs_weight, config.bandwidth

    def together(a: Tensor, b: Tensor) -> Tensor:
        cross = cs_terms(a, b, sigma=sigma).cross
        return alignment_uniformity(a, b, logit_scale=scale).alignment + weight * cross

    def apart(a: Tensor, b: Tensor) -> Tensor:
        intra = cs_terms(a, b, sigma=sigma).intra
        return alignment_uniformity(a, b, logit_scale=scale).uniformity + weight * intra

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return sum(cs_terms(a, b, sigma=sigma), start=torch.zeros((), dtype=a.dtype))

    terms = cs_terms(x, y, sigma=sigma)
    return {
        "loss": float(together(x, y) + apart(x, y)),
        "alignment": float(together(x, y)),
        "uniformity": float(apart(x, y)),
        "gradient_cosine": gradient_cosine(together, apart, x, y).overall,
        "cs_divergence": float(terms.cross + terms.intra),
        "cs_cross": float(terms.cross),
        "cs_intra": float(terms.intra),
        "infonce_cs_gradient_cosine": gradient_cosine(
            lambda a, b: infonce(a, b, logit_scale=scale), divergence, x, y
        ).overall,
    }


def _gap(measured: Measured) -> dict[str, float]:
    """How much of the Frechet distance is an offset of the centroids, and how much is shape."""
    images, texts = torch.from_numpy(measured.images), torch.from_numpy(measured.texts)
    offset, whole = centroid_distance(images, texts) ** 2, frechet_distance(images, texts)
    share = min(1.0, offset / whole) if whole else 0.0
    return {
        "frechet": whole,
        "centroid_share": share,
        "shape_share": 1 - share if whole else 0.0,
        "uniformity_image": uniformity(images.double()[:_FEW]),
        "uniformity_text": uniformity(texts.double()[:_FEW]),
    }


_FEW = 5_000  # rows of which all pairs are looked at
