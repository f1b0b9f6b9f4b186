"""``csalign export``: write the adapter of a run for other programs, checked against the run."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from csalign.adapters.checkpoint import DESCRIPTION, WEIGHTS, AdapterInfo
from csalign.adapters.model import Adapter
from csalign.adapters.wrappers import run_onnx, write_onnx
from csalign.core import atomic, outputs
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError
from csalign.core.progress import Progress, silent, track
from csalign.core.records import parse_json, write_record
from csalign.core.results import Result
from csalign.features.reader import FeatureSet
from csalign.runs.config import ExportConfig
from csalign.runs.load import Array, check_features, load_run, public_spec, stream_aligned
from csalign.runs.metadata import LINES, read_lines, read_settings, run_folder

TOLERANCE = 1e-5
RANDOM_ROWS, RANDOM_TOKENS = 257, 3
REAL_ROWS = 1_000
CARD = "README.md"
ENTRIES = frozenset(
    {CARD, DESCRIPTION, WEIGHTS, LINES, "config.toml"}
    | {f"{side}{suffix}" for side in Modality for suffix in (".onnx", ".pt2")}  # .pt2: 0.1.0
)
"""Names in the folder of an export."""
# Settings of a run that are not published: paths, and those that do not influence the weights.
PRIVATE = {
    *("features", "out", "overwrite", "report", "pictures", "umap"),
    *("unpaired", "log_to", "device", "memory"),
}

Forward = Callable[[Modality, Array], Array]


@dataclass(frozen=True)
class Side:
    """One side of an adapter: its kind, the encoder and width of its inputs, its parameters."""

    name: str
    kind: str
    encoder: str
    width: int
    parameters: int


@dataclass(frozen=True)
class Card:
    """Content of a model card."""

    name: str  # of the adapter
    license: str | None  # of the adapter, as hubs name it
    form: str  # "onnx", "torch-export" or "safetensors"
    sides: Sequence[Side]  # of the adapter
    width: int  # of the shared space
    facts: Mapping[str, str]  # of the training, by name
    settings: Mapping[str, Any]  # of the training
    validation: Mapping[str, float]  # results on the validation split during training
    evaluation: Mapping[str, Any] | None  # a document of ``csalign eval --json``, or None
    checks: Mapping[str, float]  # largest difference to the run, by the data compared on


def model_card(card: Card) -> str:
    """Render a card."""
    # Markdown, where autoescaping would show; `line` escapes what a user named.
    templates = Environment(
        loader=PackageLoader("csalign.report"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    # JSON is YAML, so that no name can break the front matter.
    templates.filters |= {
        "json": json.dumps,
        "line": _escape_line,
        "cell": lambda text: _escape_line(text).replace("|", "\\|"),
    }
    front: dict[str, Any] = {
        "library_name": "csalign",
        "pipeline_tag": "feature-extraction",
        "tags": ["csalign", "cross-modal-retrieval", "embeddings", "alignment", "cs-aligner"],
    }
    if card.license is not None:
        front = {"license": card.license} | front
    recalls = []
    if card.evaluation is not None:
        retrieval = card.evaluation["retrieval"]
        recalls = [
            (direction, name, retrieval[direction][name])
            for direction in ("image_to_text", "text_to_image")
            for name in ("R@1", "R@5", "R@10", "mrr")
        ]
        result = {
            "task": {"type": "cross-modal-retrieval"},
            "dataset": {"name": Path(card.evaluation["features"]).name, "type": "features"},
            "metrics": [
                {"type": f"{direction}_{name}", "value": value}
                for direction, name, value in recalls
            ],
        }
        front["model-index"] = [{"name": card.name, "results": [result]}]
    template = templates.get_template("model_card.md")
    return template.render(card=card, front=front, recalls=recalls)


def _escape_line(text: str) -> str:
    """Escape text for one line of Markdown, which may contain HTML."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")


def export(config: ExportConfig, progress: Progress = silent) -> Result:
    """Write the adapter of a run in another form; nothing is kept if it differs from the run.

    Returns:
        "out", "to", "files", and "differences": the largest one, in any component of a unit row,
        on each sample of rows.

    Raises:
        ConfigError: a library is not installed, or the form does not support tokens.
        DataError: no such run or features, or an evaluation of another adapter.
        OutputError: a difference exceeds the tolerance; or ``config.out`` must not be replaced.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> csalign.import_arrays(images, texts, out="features").pairs
    60
    >>> csalign.train("features", "run", steps=2, hidden=8).run.name
    'run'
    >>> csalign.export("run", "exported", to="safetensors")["files"]
    ['README.md', 'adapter.json', 'adapter.safetensors', 'config.toml']
    """
    return write_checked(config, progress, TOLERANCE)


def write_checked(config: ExportConfig, progress: Progress, tolerance: float) -> Result:
    """Export like `export`, with another tolerance of components of unit rows."""
    inputs = tuple(path for path in (config.run, config.features) if path is not None)
    outputs.check_output(config.out, ENTRIES, overwrite=config.overwrite, inputs=inputs)
    adapter, info = load_run(config.run, config.allow_adapter)
    for side in Modality:
        if config.to == "onnx" and adapter.side(side).embeds_with_tokens:
            raise ConfigError(
                f"--to onnx: {config.run} embeds {side.plural} with their tokens, which the graph "
                "does not accept; use --to safetensors or hub-folder"
            )
    evaluation = _read_evaluation(config, info)
    samples = list(_samples(config, adapter))
    with outputs.atomic_folder(config.out) as folder:
        forward = _write(config, folder, adapter, info, progress)
        differences = {}
        for name, side, rows in track(samples, "checking: samples", len(samples)):
            found, expected = forward(side, rows), _embed(adapter, side, rows)
            same_shape = found.shape == expected.shape
            difference = float(np.abs(found - expected).max()) if same_shape else float("inf")
            if not difference <= tolerance:
                raise OutputError(
                    f"{config.to}: the {side} side differs by {difference:.2g} from {config.run} "
                    f"on {name}, more than {tolerance:g}; nothing was written. Use --to safetensors"
                )
            differences[f"{name}, {side}"] = difference
        atomic.write_text(folder / CARD, _card(config, adapter, info, evaluation, differences))
        if config.to != "hub-folder":
            atomic.write_text(folder / "config.toml", config.to_toml())
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        for path in files:
            atomic.fsync_path(path)
    return Result(
        out=str(config.out),
        to=config.to,
        files=[path.name for path in files],
        differences=differences,
    )


def _samples(config: ExportConfig, adapter: Adapter) -> Iterator[tuple[str, Modality, Array]]:
    """Draw rows to compare on: random ones, a single one, and real ones if features are given."""
    rng = np.random.default_rng(0)
    for side in Modality:
        width = adapter.side(side).shape.input_width
        yield "random rows", side, rng.normal(size=(RANDOM_ROWS, width)).astype(np.float32)
        yield "one row", side, rng.normal(size=(1, width)).astype(np.float32)
    if config.features is None:
        return
    features = FeatureSet.open(config.features)
    check_features(features, config.run, adapter)
    for side in Modality:
        table = features.table(side)
        if table.info is not None and len(table):
            rows = np.unique(np.linspace(0, len(table) - 1, REAL_ROWS).astype(np.int64))
            parts = stream_aligned(features, side, None, rows, REAL_ROWS)
            yield "rows of the features", side, np.concatenate([p.embeddings for p in parts])


def _embed(adapter: Adapter, side: Modality, rows: Array) -> Array:
    """Align rows, each with the same random tokens if the adapter embeds with tokens."""
    own = adapter.side(side)
    if not own.embeds_with_tokens:
        return adapter.embed(side, rows)
    assert own.shape.token_width is not None
    drawn = np.random.default_rng(1).normal(size=(RANDOM_TOKENS, own.shape.token_width))
    tokens = np.broadcast_to(drawn.astype(np.float32), (len(rows), *drawn.shape))
    return adapter.embed_tokens(side, rows, tokens, np.ones(tokens.shape[:2], np.bool_))[0]


def _write(
    config: ExportConfig, folder: Path, adapter: Adapter, info: AdapterInfo, progress: Progress
) -> Forward:
    """Write the form; return a function that computes with what was written."""
    if config.to == "hub-folder":  # which strangers read
        encoders = {side: public_spec(spec) for side, spec in info.encoders.items()}
        write_record(folder / DESCRIPTION, info.model_copy(update={"encoders": encoders}))
    else:
        shutil.copy(config.run / DESCRIPTION, folder / DESCRIPTION)
    if config.to == "onnx":
        for done, side in enumerate(Modality, start=1):
            write_onnx(adapter.side(side), folder / f"{side}.onnx")
            progress("writing: sides", done, 2)
        return lambda side, rows: run_onnx(folder / f"{side}.onnx", rows)
    shutil.copy(config.run / WEIGHTS, folder / WEIGHTS)
    if config.to == "hub-folder" and (run_folder(config.run) / LINES).is_file():
        shutil.copy(run_folder(config.run) / LINES, folder / LINES)
    again, _ = load_run(folder, config.allow_adapter)
    progress("writing: sides", 2, 2)
    return lambda side, rows: _embed(again, side, rows)


def _read_evaluation(config: ExportConfig, info: AdapterInfo) -> dict[str, Any] | None:
    path = config.evaluation
    if path is None:
        return None
    try:
        document: dict[str, Any] = parse_json(path.read_bytes())
        evaluated = document["fingerprints"]["adapter"]
        _ = document["retrieval"]["image_to_text"]["R@1"], document["gap"]["rmg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not the output of csalign eval --json ({type(error).__name__}: {error})"
        ) from None
    if evaluated != info.weights_sha256:
        raise DataError(f"{path}: evaluates another adapter than {config.run}; evaluate this one")
    return document


def _card(
    config: ExportConfig,
    adapter: Adapter,
    info: AdapterInfo,
    evaluation: Mapping[str, Any] | None,
    differences: Mapping[str, float],
) -> str:
    counts = adapter.parameter_counts()
    sides = [
        Side(
            side.value,
            shape.kind,
            public_spec(info.encoders[side]),
            shape.input_width,
            counts[side.value],
        )
        for side, shape in info.adapters.items()
    ]
    folder = run_folder(config.run)
    settings = {key: value for key, value in read_settings(folder).items() if key not in PRIVATE}
    facts = {
        "data fingerprint (SHA-256)": info.data_fingerprint,
        "weights (SHA-256)": info.weights_sha256,
        "split": info.train_split,
        "start": info.start,
        "optimiser step": str(info.step),
        "logit scale": f"{info.logit_scale:.4g}",
        "kernel bandwidth": str(info.bandwidth),
        "csalign": info.csalign_version,
    }
    return model_card(
        Card(
            name=config.out.name,
            license=config.license,
            form=config.to if config.to == "onnx" else "safetensors",
            sides=sides,
            width=info.adapters[Modality.IMAGE].width,
            facts=facts,
            settings=settings,
            validation=info.validation or _validation(folder, info.step),
            evaluation=evaluation,
            checks=differences,
        )
    )


def _validation(folder: Path, step: int) -> dict[str, float]:
    """Read the validation metrics of a step; {} if the run did not log them."""
    scores = [line.get("validation") for line in read_lines(folder) if line.get("step") == step]
    found = next((score for score in scores if isinstance(score, dict)), {})
    return {name: value for name, value in found.items() if isinstance(value, float)}
