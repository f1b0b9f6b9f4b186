"""``csalign inspect``: summarise and verify an artifact."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from csalign.adapters.hub import local_path
from csalign.core.errors import DataError, OutputError, SchemaError
from csalign.core.outputs import JOB, partial_path
from csalign.core.paths import is_remote
from csalign.core.progress import Progress, silent
from csalign.core.records import parse_json, read_job, read_object
from csalign.core.results import Result
from csalign.evaluation.config import InspectConfig
from csalign.features.checks import LEAST_PAIRS, examine
from csalign.features.join import ALL, join_ids
from csalign.features.reader import FeatureSet
from csalign.features.schema import MANIFEST
from csalign.features.sides import describe_sides
from csalign.ingest.job import Job, WorkShard
from csalign.ingest.locks import merge_parts
from csalign.ingest.partial_set import PartialSet
from csalign.runs import metadata

NO_SPLIT = "no split"
STUDY, JOURNAL = "study.json", "journal.log"  # as in `training.tuning.tune`
INDEX = "index.json"  # as in `indexing.manifest`, which takes seconds to import
CARD = "README.md"  # as in `runs.export`
DOCUMENTS = {  # of --json, by a key that the others lack
    "retrieval": "evaluation",
    "zero_shot": "evaluation",
    "distribution": "evaluation",
    "evaluations": "comparison",
    "forecast": "diagnosis",
    "versions": "comparison of models",
    "by_scale": "diagnosis",
    "queries": "search result",
}
PARTIAL = ".partial"
INPUTS = {".npy", ".npz", ".npt", ".parquet", ".h5", ".pt"}
PAGE_START = 4096  # bytes of a page that have its title


def inspect(config: InspectConfig, progress: Progress = silent) -> Result:
    """Verify a feature set, a run, an index or another artifact, and summarise it.

    The path is the folder, or a file in it. With `merge` the feature set is first built from the
    parts in ``PATH.partial``.

    Returns:
        Plain JSON values; "kind" is "features", "run", "index", "export", "study", "unfinished
        features", "unfinished run", "evaluation", "comparison", "comparison of models",
        "diagnosis", "search result" or "page".

    Raises:
        DataError: no such artifact, or parts of it are missing.
        SchemaError: it is damaged; the file is named.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> csalign.import_arrays(images, texts, out="features").pairs
    60
    >>> csalign.inspect("features")["counts"]
    {'images': 60, 'texts': 60, 'pairs': 60, 'failures': 0}
    """
    path = local_path(config.path)
    if config.merge:
        merge_parts(path)
    return Result(_inspect(path))


def _inspect(path: Path) -> dict[str, Any]:
    if not path.exists():
        partial = partial_path(path)
        if not partial.exists():
            raise DataError(f"{path}: no such file or folder; check the path")
        path = partial
    folder = path.parent if path.is_file() else path
    if folder.suffix == PARTIAL and (folder / JOB).is_file():
        return _inspect_unfinished(folder)
    if (folder / MANIFEST).is_file():
        return _inspect_features(folder)
    if not is_remote(folder):
        if path.is_file() and (found := _inspect_file(path)) is not None:
            return found
        if (folder / STUDY).is_file():
            return _inspect_study(folder)
        if (folder / metadata.ADAPTER).is_file():
            is_export = (folder / CARD).is_file()
            return _inspect_export(folder) if is_export else _inspect_run(folder)
        if (folder / INDEX).is_file():
            from csalign.indexing.manifest import describe_index, read_index_manifest

            return describe_index(folder, read_index_manifest(folder, whole=True))
    if path.suffix.lower() in INPUTS:
        raise DataError(f"{path}: contains arrays; make a feature set of them with csalign import")
    raise DataError(
        f"{path}: is not an artifact of csalign: it contains no {MANIFEST} (feature set), "
        f"{metadata.ADAPTER} (run or export), {INDEX} (index) or {STUDY} (study); photos and "
        "tables are read by csalign extract, arrays by csalign import"
    )


def summarise_features(features: FeatureSet) -> dict[str, Any]:
    """Summarise a feature set from its manifest and its split columns, without verifying it."""
    manifest, sides = features.manifest, features.manifest.sides
    shards = [*manifest.shards.images, *manifest.shards.texts]
    shards += [shard for side in sides.values() for shard in side.shards]
    splits = features.splits()
    described = describe_sides(features) if features.is_sided else None
    return {
        "kind": "features",
        "path": str(features.path),
        "format_version": manifest.format_version,
        **({} if manifest.names is None else {"names": dict(manifest.names)}),
        "dtype": manifest.dtype,
        **({"sides": described[0]} if described else {}),
        "encoders": {
            **manifest.encoders.model_dump(mode="json"),
            **{str(side): own.encoder.model_dump(mode="json") for side, own in sides.items()},
        },
        "counts": manifest.counts.model_dump() | (described[1] if described else {}),
        **({} if manifest.pairing is None else {"pairing": manifest.pairing}),
        **({} if manifest.joined is None else {"joined": manifest.joined}),
        "splits": {name or NO_SPLIT: counts for name, counts in splits.items()},
        "bytes": sum(shard.bytes for shard in shards),
        "shards": len(shards),
        "fingerprint": manifest.fingerprint(),
    }


def _inspect_features(folder: Path) -> dict[str, Any]:
    features = FeatureSet.open(folder)
    features.verify()
    joined = join_ids(features, ALL)  # finds repeated ids and texts without their image
    health, findings = examine(features)
    if np.count_nonzero(joined.caption_counts) >= LEAST_PAIRS:  # which needs no torch till here
        from csalign.evaluation.agreement import COMPARED, measure_agreement, read_sample

        with suppress(DataError):  # of rows without a direction, which are among the findings
            agreement = measure_agreement(read_sample(features, joined, COMPARED, 0, windows=True))
            findings += [] if agreement is None else agreement.findings()
    return summarise_features(features) | {"health": health, "findings": findings}


def _inspect_unfinished(folder: Path) -> dict[str, Any]:
    """Summarise the folder that a stopped command left, or one that is still running."""
    out = str(folder).removesuffix(PARTIAL)
    try:
        document = read_object(folder / JOB, "start again with --overwrite")
    except SchemaError:
        document = {}
    kind = document.get("format")
    found = {"path": str(folder), "out": out, "config": str(folder / metadata.CONFIG)}
    if kind == Job.FORMAT:
        job = read_job(folder / JOB, Job)
        assert job is not None
        partial = PartialSet(folder, Path(out), job, WorkShard(0, 1))
        return {"kind": "unfinished features", **found, **partial.describe()}
    if kind == "csalign-training":
        lines = list(_complete_lines(folder / metadata.LINES))
        steps = document["options"].get("steps")
        return {"kind": "unfinished run", **found, "step": _last_step(lines), "steps": steps}
    raise OutputError(f"{folder}: was left by an unfinished command; rerun it to resume")


def _complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log that may still be written."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.splitlines():
        try:
            found = parse_json(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _last_step(lines: Sequence[Mapping[str, Any]]) -> int:
    steps = (line.get("step") for line in lines)
    return max((step for step in steps if isinstance(step, int)), default=0)


def _inspect_run(folder: Path) -> dict[str, Any]:
    from csalign.runs.load import load_run

    adapter, info = load_run(folder)
    run = metadata.run_folder(folder)
    settings, environment = metadata.read_settings(run), metadata.read_environment(run)
    lines = metadata.read_lines(run)
    scores = [line for line in lines if "validation" in line]
    typed = settings.get("features")  # bind takes several, or none
    features = typed if isinstance(typed, str) else environment.get(metadata.FEATURES)
    return {
        "kind": "run",
        "path": str(folder),
        "written_by": info.csalign_version,
        **info.model_dump(mode="json", exclude={"format", "csalign_version", "validation"}),
        "kinds": {side: shape.title for side, shape in info.adapters.items()},
        "shares": adapter.shares,
        "parameters": adapter.parameter_counts(),
        "features": features,
        "steps": _last_step(lines),
        "seconds": environment.get("seconds"),
        "bytes": _bytes(folder),
        "validation": scores,
        "figures": info.validation,
        "refit": metadata.find_refit(lines),
    }


def _inspect_export(folder: Path) -> dict[str, Any]:
    """Summarise an export; of weights, after verifying them."""
    from csalign.adapters.checkpoint import WEIGHTS, read_info
    from csalign.runs.load import load_run

    has_weights = (folder / WEIGHTS).is_file()
    info = load_run(folder)[1] if has_weights else read_info(folder)
    graphs = sorted(path.name for path in folder.glob("*.onnx"))
    if not (has_weights or graphs):
        raise SchemaError(f"{folder}: contains no weights; export the run again")
    return {
        "kind": "export",
        "path": str(folder),
        "form": "safetensors" if has_weights else "onnx",
        "files": graphs or [WEIGHTS],
        "written_by": info.csalign_version,
        **info.model_dump(mode="json", exclude={"format", "csalign_version"}),
        "kinds": {side: shape.title for side, shape in info.adapters.items()},
        "bytes": _bytes(folder),
    }


def _inspect_study(folder: Path) -> dict[str, Any]:
    """Summarise a study of tune by its description and the records in its journal."""
    study = read_object(folder / STUDY, "tune again")
    attributes = (entry.get("user_attr") for entry in _complete_lines(folder / JOURNAL))
    trials = [own["record"] for own in attributes if isinstance(own, dict) and "record" in own]
    scored = [trial for trial in trials if trial.get("state") == "complete"]
    best = max(scored, key=lambda trial: trial["mean_recall"], default=None)
    return {
        "kind": "study",
        "path": str(folder),
        "config": str(folder / metadata.CONFIG),
        "search": study.get("search", []),
        "trials": len(trials),
        "best": best,
    }


def _inspect_file(path: Path) -> dict[str, Any] | None:
    """Summarise a document of --json or a page; None if the file is neither."""
    if path.suffix.lower() in (".html", ".htm"):
        with path.open("rb") as file:
            start = file.read(PAGE_START).decode("utf-8", "replace")
        title = re.search(r"<title>(.*?)</title>", start, re.S)
        return {"kind": "page", "path": str(path), "title": title and " ".join(title[1].split())}
    if path.suffix.lower() != ".json":
        return None
    try:
        document = parse_json(path.read_bytes())
    except ValueError:
        return None
    keys = document.keys() if isinstance(document, dict) else ()
    kind = next((kind for key, kind in DOCUMENTS.items() if key in keys), None)
    if kind is None:
        return None
    about = ("features", "adapter", "split", "counts")
    # Under other names, as a document has keys of its own call.
    origin = {"csalign_version": "written_by", "date": "written_on", "command": "written_with"}
    found = {origin.get(key, key): document[key] for key in (*about, *origin) if key in document}
    recall = document.get("retrieval", {}).get("mean_recall") if kind == "evaluation" else None
    return {"kind": kind, "path": str(path), **found} | (
        {} if recall is None else {"mean_recall": recall}
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
