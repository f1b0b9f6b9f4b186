"""``csalign export``: write the adapter of a run for other programs, checked against the run."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from csalign.adapters.checkpoint import DESCRIPTION, WEIGHTS, AdapterInfo
from csalign.adapters.model import Adapter
from csalign.adapters.wrappers import run_onnx, write_onnx
from csalign.core import atomic, outputs
from csalign.core.arrays import Array
from csalign.core.enums import AnySide, Modality
from csalign.core.errors import ConfigError, DataError, OutputError
from csalign.core.figures import percent
from csalign.core.progress import Progress, silent, tick, track
from csalign.core.records import parse_json, write_record
from csalign.core.results import Result
from csalign.features.reader import FeatureSet
from csalign.runs.config import ExportConfig
from csalign.runs.load import check_encoders, check_features, load_run, public_spec, stream_aligned
from csalign.runs.metadata import LINES, find_refit, read_lines, read_settings, run_folder

TOLERANCE = 1e-5
RANDOM_ROWS, RANDOM_TOKENS = 257, 3
REAL_ROWS = 1_000
CARD = "README.md"
ENTRIES = frozenset(
    {CARD, DESCRIPTION, WEIGHTS, LINES, "config.toml"}
    | {f"{side}{suffix}" for side in Modality for suffix in (".onnx", ".pt2")}  # .pt2: 0.1.0
)
"""Names in the folder of an export, beside the graphs of further sides."""
# Settings of a run that are not published: paths, and those that do not influence the weights.
PRIVATE = {
    *("features", "out", "overwrite", "report", "pictures", "umap"),
    *("unpaired", "any_encoder", "log_to", "device", "memory"),
}

Forward = Callable[[AnySide, Array], Array]


def _escape_line(text: str) -> str:
    """Escape text for one line of Markdown, which may contain HTML."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")


# Markdown, where autoescaping would show; `line` escapes what a user named.
_TEMPLATES = Environment(
    loader=PackageLoader("csalign.report"),
    trim_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
# JSON is YAML, so that no name can break the front matter.
_TEMPLATES.filters |= {
    "json": json.dumps,
    "line": _escape_line,
    "cell": lambda text: _escape_line(text).replace("|", "\\|"),
}


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
    >>> run = csalign.train((images, texts), "run", steps=2, hidden=8).run
    >>> csalign.export(run, "exported", to="safetensors")["files"]
    ['README.md', 'adapter.json', 'adapter.safetensors', 'config.toml']
    """
    return write_checked(config, TOLERANCE)


def write_checked(config: ExportConfig, tolerance: float) -> Result:
    """Export like `export`, with another tolerance of components of unit rows."""
    inputs = tuple(path for path in (config.run, config.features) if path is not None)
    adapter, info = load_run(config.run, config.allow_adapter)
    entries = ENTRIES | {f"{side}.onnx" for side in adapter.names}
    outputs.check_output(config.out, entries, overwrite=config.overwrite, inputs=inputs)
    for side in adapter.names:
        if config.to == "onnx" and adapter.side(side).embeds_with_tokens:
            raise ConfigError(
                f"--to onnx: {config.run} embeds {side.plural} with their tokens, which the graph "
                "does not accept; use --to safetensors or hub-folder"
            )
    evaluation = _read_evaluation(config, info)
    samples = list(_samples(config, adapter, info))
    with outputs.atomic_folder(config.out) as folder:
        forward = _write(config, folder, adapter, info)
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


def _samples(
    config: ExportConfig, adapter: Adapter, info: AdapterInfo
) -> Iterator[tuple[str, AnySide, Array]]:
    """Draw rows to compare on: random ones, a single one, and real ones if features are given."""
    rng = np.random.default_rng(0)
    for side in adapter.names:
        width = adapter.side(side).shape.input_width
        yield "random rows", side, rng.normal(size=(RANDOM_ROWS, width)).astype(np.float32)
        yield "one row", side, rng.normal(size=(1, width)).astype(np.float32)
    if config.features is None:
        return
    features = FeatureSet.open(config.features)
    sides = [side for side in features.sides if side in adapter.names]
    check_encoders(features, config.run, info, any_encoder=config.any_encoder, sides=sides)
    check_features(features, config.run, adapter, sides=sides)
    for side in sides:
        table = features.table(side)
        if len(table):
            rows = np.unique(np.linspace(0, len(table) - 1, REAL_ROWS).astype(np.int64))
            parts = stream_aligned(features, side, None, rows, REAL_ROWS)
            yield "rows of the features", side, np.concatenate([p.embeddings for p in parts])


def _embed(adapter: Adapter, side: AnySide, rows: Array) -> Array:
    """Align rows, each with the same random tokens if the adapter embeds with tokens."""
    own = adapter.side(side)
    if not own.embeds_with_tokens:
        return adapter.embed(side, rows)
    assert own.shape.token_width is not None
    drawn = np.random.default_rng(1).normal(size=(RANDOM_TOKENS, own.shape.token_width))
    tokens = np.broadcast_to(drawn.astype(np.float32), (len(rows), *drawn.shape))
    return adapter.embed_tokens(side, rows, tokens, np.ones(tokens.shape[:2], np.bool_))[0]


def _write(config: ExportConfig, folder: Path, adapter: Adapter, info: AdapterInfo) -> Forward:
    """Write the form; return a function that computes with what was written."""
    if config.to == "hub-folder":  # which strangers read
        encoders = {side: public_spec(spec) for side, spec in info.encoders.items()}
        write_record(folder / DESCRIPTION, info.model_copy(update={"encoders": encoders}))
    else:
        shutil.copy(config.run / DESCRIPTION, folder / DESCRIPTION)
    if config.to == "onnx":
        for side in track(adapter.names, "writing: sides", len(adapter.names)):
            write_onnx(adapter.side(side), folder / f"{side}.onnx")
        return lambda side, rows: run_onnx(folder / f"{side}.onnx", rows)
    tick("writing")
    shutil.copy(config.run / WEIGHTS, folder / WEIGHTS)
    if config.to == "hub-folder" and (run_folder(config.run) / LINES).is_file():
        shutil.copy(run_folder(config.run) / LINES, folder / LINES)
    again, _ = load_run(folder, config.allow_adapter)
    return lambda side, rows: _embed(again, side, rows)


def _read_evaluation(config: ExportConfig, info: AdapterInfo) -> dict[str, Any] | None:
    path = config.evaluation
    if path is None:
        return None
    try:
        document: dict[str, Any] = parse_json(path.read_bytes())
        evaluated = document["fingerprints"]["adapter"]
        _ = _recalls(document), _gap(document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not the output of csalign eval --json ({type(error).__name__}: {error})"
        ) from None
    if evaluated != info.weights_sha256:
        raise DataError(f"{path}: evaluates another adapter than {config.run}; evaluate this one")
    return document


def _recalls(evaluation: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """List the direction, name and value of the recalls of an evaluation."""
    directions: Mapping[str, Any] = evaluation.get("retrieval") or {
        f"{one}_to_{other}": own
        for one, row in evaluation["matrix"].items()
        for other, own in row.items()
    }
    return [
        (direction, name, found[name])
        for direction, found in directions.items()
        if isinstance(found, Mapping)
        for name in ("R@1", "R@5", "R@10", "mrr")
    ]


def _gap(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """List the figures of the gap."""
    gap, names = evaluation["gap"], ("centroid_distance", "rmg", "cs_divergence", "frechet")
    if "matrix" not in evaluation:
        return {name.replace("_", " "): gap[name] for name in names}
    return {
        f"{one} and {other}: {name}".replace("_", " "): own[name]
        for one, row in gap.items()
        for other, own in row.items()
        for name in names[:2]
        if own.get(name) is not None
    }


def _card(
    config: ExportConfig,
    adapter: Adapter,
    info: AdapterInfo,
    evaluation: Mapping[str, Any] | None,
    differences: Mapping[str, float],
) -> str:
    """Write the model card: what the adapter is, its training and results, and the checks."""
    front: dict[str, Any] = {
        **({} if config.license is None else {"license": config.license}),
        "library_name": "csalign",
        "pipeline_tag": "feature-extraction",
        "tags": ["csalign", "cross-modal-retrieval", "embeddings", "alignment", "cs-aligner"],
    }
    recalls = []
    if evaluation is not None:
        recalls = _recalls(evaluation)
        result = {
            "task": {"type": "cross-modal-retrieval"},
            "dataset": {"name": Path(evaluation["features"]).name, "type": "features"},
            "metrics": [
                {"type": f"{direction}_{name}", "value": value}
                for direction, name, value in recalls
            ],
        }
        front["model-index"] = [{"name": config.out.name, "results": [result]}]
    rows = evaluation["counts"] if evaluation else {}
    counts, folder = adapter.parameter_counts(), run_folder(config.run)
    sides = [
        {
            "name": str(side),
            "kind": shape.title,
            "encoder": public_spec(info.encoders[side]),
            "width": shape.input_width,
            "parameters": counts[str(side)],
        }
        for side, shape in info.adapters.items()
    ]
    lines = read_lines(folder)
    shares, refit = adapter.shares, find_refit(lines)
    noun = "pairs" if {*adapter.names} <= {*Modality} else "items"
    facts = {
        "data fingerprint (SHA-256)": info.data_fingerprint,
        "weights (SHA-256)": info.weights_sha256,
        "split": info.train_split,
        **(
            {"shares of the parts": " + ".join(percent(own, 0) for own in shares)}
            if shares[1:]
            else {}
        ),
        "start": info.start,
        "optimiser step": str(info.step),
        "logit scale": f"{info.logit_scale:.4g}",
        "kernel bandwidth": str(info.bandwidth),
        **({"refit": f"on all {refit['pairs']:,} {noun}"} if refit else {}),
        "csalign": info.csalign_version,
    }
    card = {
        "name": config.out.name,
        "license": config.license,
        "form": config.to,
        "sides": sides,
        "width": adapter.side(adapter.names[0]).shape.width,
        "facts": facts,
        "settings": {k: v for k, v in read_settings(folder).items() if k not in PRIVATE},
        "validation": info.validation or _validation(lines, info.step),
        "refit": refit,
        "evaluation": evaluation,
        "evaluated": ", ".join(
            f"{rows[noun]:,} {noun}" for noun in ("images", "texts", "items") if noun in rows
        ),
        "gap": _gap(evaluation) if evaluation else {},
        "wraps": {*Modality} <= {*adapter.names},
        "checks": differences,
    }
    template = _TEMPLATES.get_template("model_card.md")
    return template.render(card=card, front=front, recalls=recalls)


def _validation(lines: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Return the validation metrics of a step; {} if the run did not log them."""
    scores = [line.get("validation") for line in lines if line.get("step") == step]
    found = next((score for score in scores if isinstance(score, dict)), {})
    return {name: value for name, value in found.items() if isinstance(value, float)}
