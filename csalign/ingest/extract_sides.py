"""``csalign extract --side``: columns of a table, each through its encoder, into a feature set."""

import csv
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from csalign.core import atomic, outputs
from csalign.core.config import did_you_mean
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.locks import lock_folder
from csalign.core.paths import is_remote
from csalign.core.progress import Progress
from csalign.core.results import FeaturesResult
from csalign.features import schema
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ExtractConfig, ImportConfig, SplitOptions
from csalign.ingest.import_sides import import_sides
from csalign.sources.arrays.naming import ITEM_IDS, ITEMS, first_of
from csalign.sources.arrays.tables import read_label_table
from csalign.sources.labels import Labels, check_no_null
from csalign.sources.records.files import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

Extract = Callable[[ExtractConfig, Progress], FeaturesResult]

_KINDS = {"timm": Modality.IMAGE, "hf": Modality.TEXT}
_PROBED = 100


def extract_sides(config: ExtractConfig, progress: Progress, extract: Extract) -> FeaturesResult:
    """Extract each side of a table with `extract`, and join them by the rows of the table.

    The sides are extracted into ``OUT.sides``, where the same call resumes, and which is removed at
    the end.

    Raises:
        ConfigError: ``config.out`` is not local.
        DataError: the table has no such column, or too much of it is unusable.
        OutputError: ``config.out`` exists and is not to be replaced.
    """
    source, out, work = (
        Path(config.source),
        config.out,
        config.out.with_name(f"{config.out.name}.sides"),
    )
    if is_remote(out) or "://" in config.source:
        raise ConfigError("--side: needs a local table and --out; copy the set when it is complete")
    inputs = tuple(path for path in (source, config.images) if path is not None)
    outputs.check_output(out, schema.ENTRIES, overwrite=config.overwrite, inputs=inputs)
    outputs.refuse_foreign(work)
    table = read_label_table(source)
    columns = {name: _column(table, name, spec) for name, spec in (config.side or {}).items()}
    specs: dict[str, Path] = {}
    items: list[tuple[str, str, int]] = []
    failures: list[dict[str, Any]] = []
    root: str | None = None
    with atomic.translate_os_errors(out), lock_folder(work):
        for name, (spec, column) in columns.items():
            rows, modality = _write_rows(work / f"{name}.jsonl", table, column, spec)
            logger.info("%s: %s of column %s through %s", name, modality.plural, column, spec)
            result = extract(_side_config(config, work / name, modality, spec), progress)
            features = FeatureSet.open(work / name)
            root = features.manifest.source_root or root
            ids = features.table(modality).strings(schema.ID).to_pylist()
            items += [(name, own, int(own.partition("#")[0])) for own in ids]
            failures += _failures(work / name, table, rows) if result.failures else []
            specs[name] = work / name / modality.plural
        _write_items(work / "items.csv", table, config.split_column, items)
        options = {name: getattr(config, name) for name in SplitOptions.model_fields}
        result = import_sides(
            ImportConfig(
                side=specs, pairs=work / "items.csv", out=out, overwrite=config.overwrite, **options
            ),
            progress,
        )
        with outputs.changing(out):
            atomic.write_text(out / "config.toml", config.to_toml())
            atomic.write_text(
                out / schema.FAILURES, "".join(f"{json.dumps(f)}\n" for f in failures)
            )
            manifest = schema.read_manifest(out)
            counts = manifest.counts.model_copy(update={"failures": len(failures)})
            changes = {"pairing": f"rows of {source}", "counts": counts, "source_root": root}
            schema.write_manifest(out, manifest.model_copy(update=changes))
        outputs.remove_folder(work)
    return replace(result, failures=len(failures), pairing=f"rows of {source}")


def _column(table: Labels, name: str, spec: str) -> tuple[str, str]:
    """Return the encoder of a side, and its column."""
    encoder, _, column = spec.rpartition("@") if "@" in spec else (spec, "", name)
    if column not in table.names:
        listed = ", ".join(table.names)
        raise DataError(
            f"{table.name}: has no column {column!r} (columns: {listed})"
            f"{did_you_mean(column, table.names)}; name it: --side {name}={encoder}@COLUMN"
        )
    return encoder, column


def _write_rows(path: Path, table: Labels, column: str, spec: str) -> tuple[list[int], Modality]:
    """Write the cells of a column with the numbers of their rows; return these, and their kind."""
    cells = table.column(column).to_pylist()
    rows = [row for row, cell in enumerate(cells) if cell is not None and cell.strip()]
    if not rows:
        raise DataError(f"{table.name}: column {column} is empty; choose another")
    some = [PurePath(cells[row]).suffix.lower() for row in rows[:_PROBED]]
    by_cells = Modality.IMAGE if all(own in IMAGE_SUFFIXES for own in some) else Modality.TEXT
    modality = _KINDS.get(spec.partition(":")[0], by_cells)
    key = "image" if modality is Modality.IMAGE else "caption"
    lines = (json.dumps({"id": str(row), key: cells[row]}) for row in rows)
    atomic.write_text(path, "".join(f"{line}\n" for line in lines))
    return rows, modality


def _side_config(config: ExtractConfig, out: Path, side: Modality, spec: str) -> ExtractConfig:
    """Return the configuration that extracts one side."""
    omitted = {"source", "side", "out", "images", "split_column", *SplitOptions.model_fields}
    given: dict[str, Any] = {
        name: getattr(config, name) for name in config.model_fields_set - omitted
    }
    given |= {f"{side}_encoder": spec, f"{side.other}_encoder": "none", "id_column": "id"}
    if side is Modality.IMAGE:
        given["images"] = config.images or Path(config.source).parent
    return ExtractConfig(source=str(out.with_suffix(".jsonl")), out=out, **given)


def _failures(folder: Path, table: Labels, rows: list[int]) -> list[dict[str, Any]]:
    """Return the failures of a side, with the rows of the table."""
    lines = (folder / schema.FAILURES).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    for failure in found:
        if failure["row"] is not None:
            failure["row"] = int(table.where(rows[failure["row"] - 1]).rpartition(" ")[2])
            failure["source"] = table.name
    return found


def _write_items(
    path: Path, table: Labels, split_column: str, rows: list[tuple[str, str, int]]
) -> None:
    """Write the item and split of each row of each side."""
    item, split = first_of((*ITEMS, *ITEM_IDS), table.names), first_of((split_column,), table.names)
    keys = None if item is None else check_no_null(table, item, item).to_pylist()
    splits = None if split is None else table.column(split).to_pylist()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("side", "id", "item", "split"))
        for side, name, row in rows:
            key = row if keys is None else keys[row]
            writer.writerow((side, name, key, "" if splits is None else splits[row]))
