"""``csalign eval``: retrieval and modality gap, zero-shot classification, or two image sets."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from csalign.core import distributed
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError
from csalign.core.paths import parse_location
from csalign.core.progress import Progress, current_progress, silent
from csalign.core.results import EvalResult
from csalign.evaluation.baselines import measure_baselines
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.loading import load_aligned, with_features
from csalign.evaluation.measure import describe, extras_of, measure
from csalign.evaluation.sides.measure import SidesResult, evaluate_sides, is_sided
from csalign.features import join
from csalign.features.checks import check_directions
from csalign.features.reader import FeatureSet
from csalign.features.schema import FAILURES, MANIFEST
from csalign.ingest.config import ExtractConfig
from csalign.metrics.explain import explain
from csalign.metrics.gap import image_distances

FEWEST_IMAGES = 2  # for a covariance

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


def evaluate(config: EvalConfig, progress: Progress = silent) -> EvalResult:
    """Measure retrieval and modality gap, classify images, or compare two sets of images.

    Under torchrun the processes share the exact ranking, and each returns the document.

    Returns:
        The document that ``csalign eval --json`` prints: plain numbers, recalls in [0, 1];
        "intervals" are nested as "retrieval" is, with those of the gap beside them. Images
        without texts are only classified: everything about texts is then absent.

    Raises:
        ConfigError: options are missing or do not go together.
        DataError: no such feature set, split or pairs; rows that do not fit the protocol or the
            tables; a row without a direction; image sets of different encoders.
        EncoderError: the encoder of image sets cannot be loaded or run.
        ShapeError: the widths of the sides, or of the adapter, do not match.
        SchemaError: the features or the adapter are damaged.
        OutputError: the page cannot be written; its `result` is the evaluation.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> csalign.evaluate(images, images)["retrieval"]["mean_recall"]
    1.0
    >>> print(csalign.evaluate(images, texts, intervals=False))
    EvalResult
      features                 arrays
      adapter                  none
      split                    all
      counts                   60 images, 60 texts, 60 pairs
      image to text R@1 % ↑    0.00
      text to image R@1 % ↑    1.67
      mean recall % ↑          10.28
      centroid distance ↓      0.1740
      mixed NDCG@10 % ↑        5.40
      mixed same-side share %  48.58
    """
    config.check()
    unwritten: list[OutputError] = []
    if config.images is not None and config.generated is not None:
        document = _compare_image_sets(config, config.images, config.generated)
    else:
        with distributed.process_group():
            document = _evaluate_features(with_features(config), unwritten)
    kind = SidesResult if "matrix" in document else EvalResult
    result = kind(document | ({"explanations": explain(document)} if config.explain else {}))
    for error in unwritten:
        error.result = result
        raise error
    return result


def _evaluate_features(config: EvalConfig, unwritten: list[OutputError]) -> dict[str, Any]:
    """Measure features; append to `unwritten` why the page could not be written."""
    if config.report is not None or config.umap:
        # Plotly takes a third of a second to load.
        from csalign.evaluation.page import check_report, write_report

        check_report(config)
    features = FeatureSet.open(config.feature_set)
    if is_sided(features, config.sides):
        return distributed.broadcast(lambda: evaluate_sides(config, unwritten))
    if config.zero_shot is not None and features.texts.info is None:
        return distributed.broadcast(lambda: _classify_images(config))
    if distributed.is_main_process() or config.index == "exact":
        evaluation = measure(config)

    def finish() -> dict[str, Any]:
        document = describe(evaluation, with_before=config.report is not None)
        if config.baselines or config.report is not None:
            wanted = config.baselines and config.intervals
            document["baselines"] = measure_baselines(evaluation, intervals=wanted)
        if config.report is not None:
            features, run = (place and place.name for place in (config.features, config.adapter))
            what = f"{run} on {features}" if run else f"{features} without an adapter"
            title = f"Evaluation of {what}, split {evaluation.aligned.split}"
            try:
                write_report(config, title, evaluation, document, config.adapter)
            except OutputError as error:
                unwritten.append(error)
        return document

    return distributed.broadcast(finish)


def _classify_images(config: EvalConfig) -> dict[str, Any]:
    """Classify the images of a feature set without texts."""
    retrieval = config.relevance, config.by, config.correct, config.report, config.baselines
    if any(retrieval) or config.protocol != "all":
        raise DataError(
            f"{config.features}: contains no texts, so there is no retrieval; omit --relevance, "
            "--by, --correct, --report, --baselines and --protocol"
        )
    aligned = load_aligned(config, images_only=True)
    extra, intervals = extras_of(config, aligned).compute(aligned.images, (), None, config)
    return {
        **aligned.describe(),
        "fingerprints": aligned.fingerprints(),
        "counts": {"images": len(aligned.images), "texts": 0, "pairs": 0},
        **extra,
        "intervals": intervals,
    }


def _compare_image_sets(config: EvalConfig, images: str, generated: str) -> dict[str, Any]:
    """Compute Frechet distance and CMMD between two sets of images, by one encoder."""
    real_set, real = _load_images(images, config)
    made_set, made = _load_images(generated, config)
    own, other = real_set.images.encoder, made_set.images.encoder
    known = own.fingerprint is not None and other.fingerprint is not None
    same = own.fingerprint == other.fingerprint if known else own.spec == other.spec
    if not same or own.width != other.width:
        raise DataError(
            f"{images} is encoded by {own.spec} (width {own.width}), {generated} by {other.spec} "
            f"(width {other.width}); encode both by one encoder"
        )
    fewest = min(len(real), len(made))
    if fewest < FEWEST_IMAGES:
        name = images if fewest == len(real) else generated
        raise DataError(f"{name}: contains {fewest} images, at least {FEWEST_IMAGES} are needed")
    if fewest <= own.width:
        log.warning(
            "%d images are too few for the Fréchet distance of embeddings of width %d, which is "
            "biased upwards on small samples; CMMD much less",
            *(fewest, own.width),
        )
    fingerprints = real_set.manifest.fingerprint(), made_set.manifest.fingerprint()
    return {
        "images": images,
        "generated": generated,
        "encoder": own.spec,
        "fingerprints": dict(zip(("images", "generated"), fingerprints, strict=True)),
        "counts": {"images": len(real), "generated": len(made)},
        "distribution": image_distances(torch.from_numpy(real), torch.from_numpy(made)),
    }


def _load_images(name: str, config: EvalConfig) -> tuple[FeatureSet, Floats]:
    """Load the embeddings of images, (n, d), from a feature set or by encoding a source."""
    place, split = None if "::" in name else parse_location(name), config.split or join.ALL
    with tempfile.TemporaryDirectory(prefix="csalign-") as folder:
        if place is None or not (place / MANIFEST).is_file():
            if config.encoder is None:
                raise ConfigError(f"--encoder is required, to encode the images of {name}")
            if config.split is not None:
                raise ConfigError(f"--split: is for feature sets, which {name} is not")
            # With all that reads sources.
            from csalign.ingest.extract import SKIP, extract

            place = Path(folder, "features")
            options = ExtractConfig(
                source=name,
                image_encoder=config.encoder,
                text_encoder=SKIP,
                out=place,
                dtype="float32",
                device=config.device,
                max_failures=1.0,
            )
            if count := extract(options, current_progress()).failures:
                first = json.loads((place / FAILURES).read_text("utf-8").partition("\n")[0])
                reason = f"{first['source']} {first['reason']}"
                log.warning("%s: skipped %d unusable inputs, such as %s", name, count, reason)
        features = FeatureSet.open(place)
        rows = join.load_side(features, split, Modality.IMAGE)
        check_directions(rows.images, rows.image_ids, f"{name}: images")
        return features, rows.images.astype(np.float32)
