"""``csalign export``: a run's adapter for other programs, checked against the run."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.adapters.checkpoint import DESCRIPTION, WEIGHTS, AdapterInfo, load_adapter_with_info
from csalign.adapters.graphs import run_onnx, run_program, write_onnx, write_program
from csalign.adapters.model import Adapter
from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError, SchemaError
from csalign.core.progress import Progress, silent
from csalign.core.records import parse_json
from csalign.features import schema
from csalign.features.reader import FeatureSet, batch_vectors
from csalign.report.model_card import Card, Side, model_card
from csalign.runs.config import ExportConfig
from csalign.runs.load import load_adapter_for
from csalign.runs.metadata import LINES, read_lines, read_settings

TOLERANCE = 1e-5
ROWS = 257  # random ones; and a single one, as other programs ask
REAL_ROWS = 1_000
CARD = "README.md"
GRAPHS = {"onnx": "onnx", "torch-export": "pt2"}
# Of a run's configuration; where things lay is nobody's business, and what decides no weight.
PRIVATE = {"features", "out", "overwrite", "report", "unpaired", "log_to", "device", "memory"}

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Forward = Callable[[Modality, Array], Array]


def export(config: ExportConfig, progress: Progress = silent) -> dict[str, Any]:
    """Write a run's adapter in another form; nothing is kept that differs from the run.

    Args:
        config: which run, and in which form.
        progress: told how many sides are done.

    Returns:
        "out", "to", "files", and "differences": the largest one by what was compared.

    Raises:
        ConfigError: a library is not installed, or the form has no room for tokens.
        DataError: no such run or features, or an evaluation of something else.
        OutputError: the form does not compute the same to 1e-5; or ``config.out`` exists and is
            not to be replaced.
        SchemaError: what is read is damaged.
        ShapeError: the features are not of the width that the adapter takes.
    """
    inputs = tuple(path for path in (config.run, config.features) if path is not None)
    atomic.check_output(config.out, overwrite=config.overwrite, inputs=inputs)
    allow = () if config.allow_adapter is None else (config.allow_adapter,)
    adapter, info = load_adapter_with_info(config.run, allow=allow)
    if config.to in GRAPHS:
        _refuse_tokens(config, adapter)
    evaluation = _read_evaluation(config, info)
    inputs_by_name = dict(_inputs(config, adapter))
    with atomic.atomic_folder(config.out) as folder:
        forward = _write(config, folder, adapter, allow, progress)
        differences = {
            f"{name}, {side}": _difference(config, adapter, forward, side, rows)
            for (name, side), rows in inputs_by_name.items()
        }
        card = _card(config, adapter, info, evaluation, differences)
        atomic.write_text(folder / CARD, card)
        if config.to != "hub-folder":
            atomic.write_text(folder / "config.toml", config.to_toml())
        for path in sorted(folder.iterdir()):
            if not path.name.startswith("."):
                atomic.fsync_path(path)
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return {
        "out": str(config.out),
        "to": config.to,
        "files": names,
        "differences": differences,
    }


def _refuse_tokens(config: ExportConfig, adapter: Adapter) -> None:
    for side in Modality:
        if adapter.side(side).embeds_with_tokens:
            raise ConfigError(
                f"--to {config.to}: {config.run} embeds {side.plural} with their tokens, which "
                "such a graph does not take; use --to safetensors or hub-folder"
            )


def _inputs(config: ExportConfig, adapter: Adapter) -> Iterator[tuple[tuple[str, Modality], Array]]:
    """Rows to compare on: random ones, one alone, and real ones if there are features."""
    rng = np.random.default_rng(0)
    for side in Modality:
        width = adapter.side(side).shape.input_width
        yield ("random rows", side), rng.normal(size=(ROWS, width)).astype(np.float32)
        yield ("one row", side), rng.normal(size=(1, width)).astype(np.float32)
    if config.features is None:
        return
    features = FeatureSet.open(config.features)
    load_adapter_for(features, config.run, "cpu", config.allow_adapter)
    for side in Modality:
        table = features.table(side)
        if table.made_by is not None and len(table):
            rows = np.unique(np.linspace(0, len(table) - 1, REAL_ROWS).astype(np.int64))
            parts = [
                batch_vectors(batch, schema.EMBEDDING)[local].astype(np.float32)
                for _, local, batch in table.parts([schema.EMBEDDING], rows)
            ]
            yield ("rows of the features", side), np.concatenate(parts)


def _write(
    config: ExportConfig,
    folder: Path,
    adapter: Adapter,
    allow: tuple[str, ...],
    progress: Progress,
) -> Forward:
    """Write the form; gives what computes by what was written."""
    shutil.copy(config.run / DESCRIPTION, folder / DESCRIPTION)
    if config.to not in GRAPHS:
        shutil.copy(config.run / WEIGHTS, folder / WEIGHTS)
        if config.to == "hub-folder" and (_run_folder(config.run) / LINES).is_file():
            shutil.copy(_run_folder(config.run) / LINES, folder / LINES)
        again, _ = load_adapter_with_info(folder, allow=allow)
        progress("sides", 2, 2)
        return again.embed
    write, run = (write_onnx, run_onnx) if config.to == "onnx" else (write_program, run_program)
    for done, side in enumerate(Modality, start=1):
        write(adapter.side(side), folder / f"{side}.{GRAPHS[config.to]}")
        progress("sides", done, 2)
    return lambda side, rows: run(folder / f"{side}.{GRAPHS[config.to]}", rows)


def _difference(
    config: ExportConfig, adapter: Adapter, forward: Forward, side: Modality, rows: Array
) -> float:
    """The largest difference between what was written and the run.

    Raises:
        OutputError: it is more than rounding.
    """
    if adapter.side(side).embeds_with_tokens:
        return 0.0  # the weights' checksum was compared when they were loaded again
    found, expected = forward(side, rows), adapter.embed(side, rows)
    if found.shape != expected.shape:
        raise OutputError(f"{config.to}: gives shape {found.shape}, not {expected.shape}")
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE:
        raise OutputError(
            f"{config.to}: the {side} side differs by {difference:.2g} from {config.run}, more "
            f"than {TOLERANCE:g}; nothing was written. Use --to safetensors"
        )
    return difference


def _read_evaluation(config: ExportConfig, info: AdapterInfo) -> dict[str, Any] | None:
    path = config.evaluation
    if path is None:
        return None
    try:
        document: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        of = document["fingerprints"]["adapter"]
        _ = document["retrieval"]["image_to_text"]["R@1"], document["gap"]["rmg"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not what csalign eval --json prints ({type(error).__name__}: {error})"
        ) from None
    if of != info.weights_sha256:
        raise DataError(f"{path}: evaluates another adapter than {config.run}; evaluate this one")
    return document


def _card(
    config: ExportConfig,
    adapter: Adapter,
    info: AdapterInfo,
    evaluation: Mapping[str, Any] | None,
    differences: Mapping[str, float],
) -> str:
    counts = {side: sum(p.numel() for p in adapter.side(side).parameters()) for side in Modality}
    sides = [
        Side(
            side.value,
            info.adapters[side].kind,
            info.encoders[side],
            info.adapters[side].input_width,
            counts[side],
        )
        for side in Modality
    ]
    settings, validation = _record(config.run, info.step)
    validation = info.validation or validation
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
            form=config.to if config.to in GRAPHS else "safetensors",
            sides=sides,
            width=info.adapters[Modality.IMAGE].width,
            facts=facts,
            settings=settings,
            validation=validation,
            evaluation=evaluation,
            checks=differences,
        )
    )


def _record(run: Path, step: int) -> tuple[dict[str, Any], dict[str, float]]:
    """How a run was set, and the validation figures of its weights; {} where it does not say."""
    folder = _run_folder(run)
    settings = read_settings(folder)
    validation: dict[str, float] = {}
    try:
        for entry in read_lines(folder):
            if "validation" in entry and entry["step"] == step:
                validation = {k: v for k, v in entry["validation"].items() if v is not None}
    except (KeyError, TypeError, AttributeError) as error:
        raise SchemaError(f"{folder}: its record is damaged ({error}); train again") from None
    return {key: value for key, value in settings.items() if key not in PRIVATE}, validation


def _run_folder(run: Path) -> Path:
    return run.parent.parent if run.parent.name == "checkpoints" else run
