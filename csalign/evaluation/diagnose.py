"""``csalign diagnose``: does the objective work against itself on these embeddings, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csalign.adapters.checkpoint import read_info
from csalign.core.progress import Progress, silent
from csalign.evaluation.config import DiagnoseConfig, EvalConfig
from csalign.evaluation.evaluate import Measured, measure
from csalign.metrics.gap import centroid_distance, frechet_distance, uniformity
from csalign.objective.conflict import cosine, gradient
from csalign.objective.divergences import cs_terms
from csalign.objective.pairwise import InfonceTerms, alignment_uniformity
from csalign.report.diagnosis import write_diagnosis
from csalign.report.page import check_page

CLIP_LOGIT_SCALE = 100.0
SCALES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


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
        OutputError: the page cannot be written where it is wanted.
    """
    if config.plot is not None:
        check_page(config.plot)
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
    by_scale = _by_scale(x, y, sorted({*SCALES, scale}), config.bandwidth)
    document = {
        "features": str(config.features),
        "adapter": None if config.adapter is None else str(config.adapter),
        "split": measured.split,
        **({} if measured.names is None else {"names": dict(measured.names)}),
        "pairs": len(x),
        "logit_scale": scale,
        "cs_weight": config.cs_weight,
        "bandwidth": config.bandwidth,
        **_losses(x, y, scale, by_scale[scale], config),
        "gap": _gap(measured),
        "by_scale": [
            _conflict(at, gradients, config.cs_weight) for at, gradients in by_scale.items()
        ],
    }
    if config.plot is not None:
        write_diagnosis(config.plot, document)
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


def _by_scale(
    x: Tensor, y: Tensor, scales: Sequence[float], sigma: float
) -> dict[float, "_Gradients"]:
    cross = gradient(lambda a, b: cs_terms(a, b, sigma=sigma).cross, x, y)
    intra = gradient(lambda a, b: cs_terms(a, b, sigma=sigma).intra, x, y)

    def at(scale: float) -> _Gradients:
        alignment = gradient(lambda a, b: _terms(a, b, scale).alignment, x, y)
        uniformity = gradient(lambda a, b: _terms(a, b, scale).uniformity, x, y)
        return _Gradients(alignment, uniformity, cross, intra)

    return {scale: at(scale) for scale in scales}


@dataclass(frozen=True)
class _Gradients:
    """Gradients in the embeddings of the four terms that the objective is made of."""

    alignment: Tensor
    uniformity: Tensor
    cross: Tensor
    intra: Tensor

    def conflict(self, weight: float) -> float:
        """Cosine between what pulls and what pushes, with so much of the divergence."""
        return cosine(self.alignment + weight * self.cross, self.uniformity + weight * self.intra)


def _terms(x: Tensor, y: Tensor, scale: float) -> InfonceTerms:
    return alignment_uniformity(x, y, logit_scale=scale)


def _losses(
    x: Tensor, y: Tensor, scale: float, gradients: _Gradients, config: DiagnoseConfig
) -> dict[str, dict[str, float]]:
    """InfoNCE and the full objective, taken apart."""
    weight = config.cs_weight
    infonce, parts = _terms(x, y, scale), cs_terms(x, y, sigma=config.bandwidth)
    alignment, uniformity = float(infonce.alignment), float(infonce.uniformity)
    cross, intra = float(parts.cross), float(parts.intra)
    return {
        "infonce": {
            "loss": alignment + uniformity,
            "alignment": alignment,
            "uniformity": uniformity,
            "gradient_cosine": gradients.conflict(0.0),
        },
        "objective": {
            "loss": alignment + uniformity + weight * (cross + intra),
            "alignment": alignment + weight * cross,
            "uniformity": uniformity + weight * intra,
            "gradient_cosine": gradients.conflict(weight),
            "cs_divergence": cross + intra,
            "cs_cross": cross,
            "cs_intra": intra,
            "infonce_cs_gradient_cosine": cosine(
                gradients.alignment + gradients.uniformity, gradients.cross + gradients.intra
            ),
        },
    }


def _conflict(scale: float, gradients: _Gradients, weight: float) -> dict[str, float]:
    """The conflict of both objectives at a scale."""
    return {
        "logit_scale": scale,
        "infonce": gradients.conflict(0.0),
        "objective": gradients.conflict(weight),
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
