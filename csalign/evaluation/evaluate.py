"""``csalign eval``: retrieval and modality gap, zero-shot classification, or two image sets."""

import json
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from csalign.core import distributed
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.outputs import check_page
from csalign.core.paths import parse_location
from csalign.core.progress import Progress, silent
from csalign.core.results import EvalResult
from csalign.evaluation import protocols
from csalign.evaluation.config import EvalConfig, MeasureOptions
from csalign.evaluation.extra_metrics import Extras, prepare_extras
from csalign.evaluation.loading import (
    Loaded,
    align,
    embed,
    load,
    load_adapter,
    load_aligned,
    warn_of_trained,
    with_features,
)
from csalign.evaluation.page import EvaluationReport, check_umap, write_report
from csalign.evaluation.protocols import AlignedRows
from csalign.features import join
from csalign.features.checks import check_directions, warn_of_queries
from csalign.features.reader import FeatureSet
from csalign.features.schema import FAILURES, MANIFEST
from csalign.ingest.config import ExtractConfig
from csalign.ingest.extract import SKIP, extract
from csalign.metrics.approximate import JUDGED_BY, LISTED, rank_both_ways_by_index
from csalign.metrics.bootstrap import Resamples, resample
from csalign.metrics.explain import explain
from csalign.metrics.gap import gap_suite, image_distances
from csalign.metrics.retrieval import DirectionRanks, hubness

COLLAPSED_RANK = 1.5  # effective dimensions
FEWEST_IMAGES = 2  # for a covariance

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """Ranked rows: the galleries that are searched separately, one without folds, and their ranks.

    `index` is a block of the document, and `extras` computes the extra metrics.
    """

    aligned: AlignedRows
    options: MeasureOptions
    folds: tuple[protocols.Gallery, ...]
    fold_ranks: tuple[protocols.Ranks, ...]
    index: dict[str, Any]
    extras: Extras | None

    @property
    def ranks(self) -> protocols.Ranks:
        """Image to text, and text to image, over all folds."""
        forth, back = zip(*self.fold_ranks, strict=True)
        return DirectionRanks.joined(forth), DirectionRanks.joined(back)

    def resample(self) -> Resamples:
        """Compute the metrics on bootstrap resamples.

        Folds have one size, so that a mean over queries is the mean over folds; a median is not,
        and has no interval if there are several folds.
        """
        aligned, options = self.aligned, self.options
        rows = aligned.images, aligned.texts, aligned.rows.text_image
        found = resample(self.ranks, *rows, resamples=options.resamples, seed=options.seed)
        if len(self.folds) == 1:
            return found
        kept = {place: f for place, f in found.figures.items() if place[-1] != "median_rank"}
        return replace(found, figures=kept)


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
        OutputError: the page cannot be written.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> csalign.evaluate(images, images)["retrieval"]["mean_recall"]
    1.0
    >>> print(csalign.evaluate(images, texts, intervals=False))
    EvalResult
      features               arrays
      adapter                none
      split                  all
      counts                 60 images, 60 texts, 60 pairs
      image to text R@1 % ↑  0.00
      text to image R@1 % ↑  1.67
      mean recall % ↑        10.28
      centroid distance ↓    0.1740
    """
    config.check()
    if config.images is not None and config.generated is not None:
        document = _compare_image_sets(config, config.images, config.generated, progress)
    else:
        with distributed.process_group():
            document = _evaluate_features(with_features(config))
    return EvalResult(document | ({"explanations": explain(document)} if config.explain else {}))


def _evaluate_features(config: EvalConfig) -> dict[str, Any]:
    if config.report is not None:
        check_page(config.report)
        check_umap(wanted=config.umap)
    if config.zero_shot is not None and FeatureSet.open(config.feature_set).texts.info is None:
        return distributed.broadcast(lambda: _classify_images(config))
    if distributed.is_main_process() or config.index == "exact":
        evaluation = measure(config)

    def finish() -> dict[str, Any]:
        report = describe(evaluation)
        if config.report is not None:
            report = with_before(report, config, device=config.device)
            features, run = (place and place.name for place in (config.features, config.adapter))
            what = f"{run} on {features}" if run else f"{features} without an adapter"
            write_report(
                config.report,
                f"Evaluation of {what}, split {evaluation.aligned.split}",
                report,
                config.adapter,
                config.seed,
                pictures=config.pictures,
                umap=config.umap,
            )
        return report.document

    return distributed.broadcast(finish)


def with_before(
    report: EvaluationReport, options: MeasureOptions, *, device: str = "auto"
) -> EvaluationReport:
    """Add "before", the retrieval and gap of the rows without the adapter, if widths allow."""
    aligned, rows = report.aligned, report.aligned.rows
    if aligned.adapter is None or rows.images.shape[1] != rows.texts.shape[1]:
        return report
    images, texts = (embed(None, aligned.features, rows, side) for side in Modality)
    plain = replace(aligned, images=images, texts=texts, adapter=None)
    before = _figures(measure_rows(plain, options, device=device))
    return replace(report, document={**report.document, "before": before})


def measure(config: EvalConfig) -> Evaluation:
    """Embed and rank the rows of a split; arguments and errors are those of `evaluate`.

    In a process group all processes have to call it.
    """
    loaded = load(config, config.protocol)
    warn_of_queries(loaded.rows, loaded.rows.name)
    evaluation = measure_loaded(config, loaded)
    warn_of_trained([evaluation.aligned])
    return evaluation


def measure_loaded(config: EvalConfig, loaded: Loaded) -> Evaluation:
    """Embed and rank loaded rows; see `measure`."""
    aligned = align(config, loaded)
    divided = distributed.world().size > 1
    extras = _prepare_extras(config, aligned)
    return measure_rows(aligned, config, extras, device=config.device, divided=divided)


def measure_rows(
    aligned: AlignedRows,
    options: MeasureOptions,
    extras: Extras | None = None,
    *,
    device: str = "auto",
    divided: bool = False,
) -> Evaluation:
    """Rank rows that are embedded already.

    Args:
        aligned: the rows, those of the protocol.
        options: of the measurement.
        extras: computes the extra metrics.
        device: of the exact ranking, if it is CUDA.
        divided: whether all processes of the group call this, and share the ranking.
    """
    whole = protocols.Gallery(aligned.images, aligned.texts, aligned.rows.text_image)
    folds = protocols.split_folds(options.protocol, whole)
    if options.index == "exact":
        chosen = pick_device(device)
        chosen = chosen if chosen.type == "cuda" else torch.device("cpu")
        index: dict[str, Any] = {"kind": "exact", "device": chosen.type}
        ranks = tuple(fold.rank(chosen, divided=divided) for fold in folds)
    else:
        found = [
            rank_both_ways_by_index(fold.images, fold.texts, fold.text_image, options.index)
            for fold in folds
        ]
        ranks = tuple(own for own, _ in found)
        recalls = np.mean([recall for _, recall in found], axis=0).tolist()
        index = {
            "kind": options.index,
            "listed": LISTED,
            f"recall@{JUDGED_BY}": dict(zip(protocols.DIRECTIONS, recalls, strict=True)),
        }
    return Evaluation(aligned, options, folds, ranks, index, extras)


def describe(evaluation: Evaluation) -> EvaluationReport:
    """Compute all metrics, with their intervals if the options want them."""
    aligned, options = evaluation.aligned, evaluation.options
    images, texts, figures = aligned.images, aligned.texts, _figures(evaluation)
    for side, rank in figures["gap"]["effective_rank"].items():
        if rank < COLLAPSED_RANK:
            log.warning(
                "all %s embeddings are nearly the same, so a small gap means nothing here", side
            )
    ranks = evaluation.ranks
    resamples = evaluation.resample() if options.intervals else None
    extras, folds = evaluation.extras, evaluation.folds
    extra, extra_intervals = extras(images, folds, ranks, options) if extras else ({}, {})
    document = {
        **aligned.describe(),
        "fingerprints": aligned.fingerprints(),
        "parameters": aligned.parameters,
        "bandwidth": options.bandwidth,
        "counts": {"images": len(images), "texts": len(texts), "pairs": aligned.rows.pairs},
        "index": evaluation.index,
        "protocol": protocols.protocol_block(options.protocol, aligned.split, aligned.rows),
        **figures,
        "hubness": protocols.mean_of([hubness(fold.images, fold.texts) for fold in folds]),
        **extra,
        "intervals": resamples.intervals() | extra_intervals if resamples else {},
    }
    return EvaluationReport(aligned, ranks, resamples, document)


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    """Compute the blocks "retrieval" and "gap" of a document."""
    aligned, options = evaluation.aligned, evaluation.options
    rows = aligned.images, aligned.texts, aligned.rows.text_image
    return {
        "retrieval": protocols.retrieval_block(evaluation.fold_ranks),
        "gap": gap_suite(*rows, sigma=options.bandwidth, seed=options.seed),
    }


def _classify_images(config: EvalConfig) -> dict[str, Any]:
    """Classify the images of a feature set without texts."""
    if config.relevance or config.by or config.correct or config.report or config.protocol != "all":
        raise DataError(
            f"{config.features}: contains no texts, so there is no retrieval; omit --relevance, "
            "--by, --correct, --report and --protocol"
        )
    aligned = load_aligned(config, images_only=True)
    extra, intervals = _prepare_extras(config, aligned)(aligned.images, (), None, config)
    return {
        **aligned.describe(),
        "fingerprints": aligned.fingerprints(),
        "counts": {"images": len(aligned.images), "texts": 0, "pairs": 0},
        **extra,
        "intervals": intervals,
    }


def _prepare_extras(config: EvalConfig, aligned: AlignedRows) -> Extras:
    def embed_texts(features: FeatureSet, rows: join.PairedRows) -> Floats:
        loaded = load_adapter(config, features)  # again, which checks these features' widths
        return embed(loaded and loaded[0], features, rows, Modality.TEXT)

    ids, width = aligned.rows.image_ids.to_pylist(), aligned.images.shape[1]
    return prepare_extras(config, aligned.features, ids, width, embed_texts)


def _compare_image_sets(
    config: EvalConfig, images: str, generated: str, progress: Progress
) -> dict[str, Any]:
    """Compute Frechet distance and CMMD between two sets of images, by one encoder."""
    real_set, real = _load_images(images, config, progress)
    made_set, made = _load_images(generated, config, progress)
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
            fewest,
            own.width,
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


def _load_images(name: str, config: EvalConfig, progress: Progress) -> tuple[FeatureSet, Floats]:
    """Load the embeddings of images, (n, d), from a feature set or by encoding a source."""
    place, split = None if "::" in name else parse_location(name), config.split or join.ALL
    with tempfile.TemporaryDirectory(prefix="csalign-") as folder:
        if place is None or not (place / MANIFEST).is_file():
            if config.encoder is None:
                raise ConfigError(f"--encoder: is required, to encode the images of {name}")
            if config.split is not None:
                raise ConfigError(f"--split: is for feature sets, which {name} is not")
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
            if count := extract(options, progress).failures:
                first = json.loads((place / FAILURES).read_text("utf-8").partition("\n")[0])
                reason = f"{first['source']} {first['reason']}"
                log.warning("%s: skipped %d unusable inputs, such as %s", name, count, reason)
        features = FeatureSet.open(place)
        rows = join.load_side(features, split, Modality.IMAGE)
        check_directions(rows.images, rows.image_ids, f"{name}: images")
        return features, rows.images.astype(np.float32)
