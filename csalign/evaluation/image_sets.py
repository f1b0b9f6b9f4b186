"""``csalign eval --images --generated``: how far generated images lie from real ones."""

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.paths import parse_location
from csalign.core.progress import Progress
from csalign.evaluation.config import EvalConfig
from csalign.features.join import ALL, check_directions, load_side
from csalign.features.manifest import FAILURES, MANIFEST, EncoderInfo
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ExtractConfig
from csalign.ingest.extract import SKIP, extract
from csalign.metrics.explain import explain
from csalign.metrics.image_sets import image_distances

log = logging.getLogger(__name__)

FEWEST = 2  # a covariance needs them
_TAKEN = {"images", "generated", "encoder", "split", "explain", "device"}


@dataclass(frozen=True)
class _Set:
    """Embeddings of one set of images.

    Attributes:
        embeddings: (n, d) as the encoder gives them.
        encoder: what made them.
        fingerprint: of their content.
    """

    embeddings: npt.NDArray[Any]
    encoder: EncoderInfo
    fingerprint: str


def compare_images(config: EvalConfig, progress: Progress) -> dict[str, Any]:
    """Frechet distance and CMMD between two sets of images, on one encoder's embeddings.

    Args:
        config: `images` and `generated` name them; `encoder` embeds those that are no feature set.
        progress: told how far it is.

    Returns:
        The document that ``csalign eval --json`` prints.

    Raises:
        ConfigError: one of them is missing, or options that are not for images.
        DataError: a set cannot be used, or the two are of different encoders.
        EncoderError: the encoder cannot be had or run.
    """
    if config.images is None or config.generated is None:
        raise ConfigError("images, generated: are compared with each other; give both")
    others = sorted(config.model_fields_set - _TAKEN)
    if others:
        names = ", ".join(name.replace("_", "-") for name in others)
        raise ConfigError(f"{names}: not for a comparison of --images and --generated; leave out")
    real, made = (_load(name, config, progress) for name in (config.images, config.generated))
    _check_same_encoder(config, real.encoder, made.encoder)
    for name, found in ((config.images, real), (config.generated, made)):
        if len(found.embeddings) < FEWEST:
            raise DataError(f"{name}: holds {len(found.embeddings)} images, at least {FEWEST} are "
                            "needed")  # fmt: skip
    fewest, width = min(len(real.embeddings), len(made.embeddings)), real.encoder.width
    if fewest <= width:
        log.warning(
            "%d images are too few for the Frechet distance of embeddings of width %d, which grows "
            "as images get fewer; CMMD does so less",
            *(fewest, width),
        )
    x, y = (torch.from_numpy(found.embeddings.astype(np.float32)) for found in (real, made))
    document = {
        "images": config.images,
        "generated": config.generated,
        "encoder": real.encoder.spec,
        "fingerprints": {"images": real.fingerprint, "generated": made.fingerprint},
        "counts": {"images": len(x), "generated": len(y)},
        "distribution": image_distances(x, y),
    }
    return document | ({"explanations": explain(document)} if config.explain else {})


def _load(name: str, config: EvalConfig, progress: Progress) -> _Set:
    """A feature set as it is, or anything that holds images embedded."""
    place = None if "::" in name else parse_location(name)
    if place is not None and (place / MANIFEST).is_file():
        return _read(name, FeatureSet.open(place), config.split or ALL)
    if config.encoder is None:
        raise ConfigError(f"encoder: is required, to embed the images of {name}")
    if config.split is not None:
        raise ConfigError(f"split: is for feature sets, which {name} is not")
    with tempfile.TemporaryDirectory(prefix="csalign-") as folder:
        out = Path(folder, "features")
        result = extract(
            ExtractConfig(
                source=name,
                image_encoder=config.encoder,
                text_encoder=SKIP,
                out=out,
                dtype="float32",
                device=config.device,
                max_failures=1.0,
            ),
            progress,
        )
        if result.failures:
            first = json.loads((out / FAILURES).read_text(encoding="utf-8").partition("\n")[0])
            log.warning(
                "%s: %d inputs could not be used and are left out: %s %s",
                *(name, result.failures, first["source"], first["reason"]),
            )
        return _read(name, FeatureSet.open(out), ALL)


def _read(name: str, features: FeatureSet, split: str) -> _Set:
    rows = load_side(features, split, Modality.IMAGE)
    check_directions(rows.images, rows.image_ids, f"{name}: images")
    return _Set(rows.images, features.images.encoder, features.manifest.fingerprint())


def _check_same_encoder(config: EvalConfig, real: EncoderInfo, made: EncoderInfo) -> None:
    same = real.spec == made.spec
    if real.fingerprint is not None and made.fingerprint is not None:
        same = real.fingerprint == made.fingerprint
    if not same or real.width != made.width:
        raise DataError(
            f"{config.images} is embedded by {real.spec} (width {real.width}), {config.generated} "
            f"by {made.spec} (width {made.width}); embed both by one encoder"
        )
