"""Tables of artifacts: what extract, import and apply wrote, and what inspect finds."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.filesize import decimal

from csalign.cli.next_steps import FAILURES, MANIFEST, NO_SPLIT, Step, after_features, first_free
from csalign.cli.render import print_closing, print_line, print_rows, print_wrote
from csalign.cli.tables import CENTROID, RECALL, best_words, index_words, search_step
from csalign.core import results
from csalign.core.config import Config
from csalign.core.enums import renamed
from csalign.core.figures import counted, percent
from csalign.evaluation.config import InspectConfig
from csalign.runs.config import ApplyConfig

FAILURES_SHOWN = 3
SHARDS_SHOWN = 5


def features_table(result: results.FeaturesResult, settings: Config) -> None:
    """Print the counts, splits and size of a feature set, and what was skipped."""
    from csalign.evaluation.inspect import inspect, summarise_features
    from csalign.features.reader import FeatureSet

    folder = result.features
    counts = {"image": result.images, "text": result.texts, "pair": result.pairs}
    listed = ", ".join(counted(number, noun) for noun, number in counts.items())
    line = f"{folder}: {renamed(listed, result.names)}"
    if not result.complete:
        print_line(f"{line} by this process")
        _inspected(inspect(InspectConfig(path=folder)), settings)
        return
    is_set = (folder / MANIFEST).is_file()  # else apply wrote another format
    summary = summarise_features(FeatureSet.open(folder)) if is_set else None
    print_wrote(line + (f", {decimal(summary['bytes'])}" if summary else ""))
    if summary is None:
        print_closing(settings)
        return
    print_line(f"  splits: {_splits(summary)}")
    if "pairing" in summary:
        print_line(f"  pairs: {summary['pairing']}")
    for text in _failures(result):
        print_line(f"  {text}")
    aligned = isinstance(settings, ApplyConfig)
    after = (
        [("index", folder, "--out", first_free("index"))] if aligned else after_features(summary)
    )
    print_closing(settings, *after)


def split_table(result: results.SplitResult, settings: Config) -> None:
    """Print how many images each split has."""
    from csalign.evaluation.inspect import summarise_features
    from csalign.features.reader import FeatureSet

    print_wrote(f"{result.features}: {result}")
    print_closing(settings, *after_features(summarise_features(FeatureSet.open(result.features))))


def _splits(summary: Mapping[str, Any]) -> str:
    """Word the splits of a feature set, with the rows of each side."""
    splits = summary["splits"]
    if set(splits) <= {NO_SPLIT}:
        return "none"
    counts = [f"{name} {own['images']:,} + {own['texts']:,}" for name, own in splits.items()]
    return f"{', '.join(counts)} ({renamed('images + texts', summary.get('names'))})"


def _failures(result: results.FeaturesResult) -> Iterator[str]:
    """Yield how many inputs were skipped, with the reasons of the first."""
    if not result.failures:
        return
    path = result.features / FAILURES
    yield f"{counted(result.failures, 'input')} skipped, listed in {path}:"
    for line in path.read_text(encoding="utf-8").splitlines()[:FAILURES_SHOWN]:
        failure = json.loads(line)
        row = "" if failure["row"] is None else f", row {failure['row']}"
        yield f"  {failure['source']}{row}: {failure['reason']}"
    if result.failures > FAILURES_SHOWN:
        yield f"  and {result.failures - FAILURES_SHOWN:,} more"


def inspect_table(document: Mapping[str, Any], settings: InspectConfig) -> None:
    """Print what an artifact is, the values that matter, and what to do with it."""
    _inspected(document, settings)


def _inspected(document: Mapping[str, Any], settings: Config) -> None:
    kind, path = document["kind"], document["path"]
    title, rows, following = INSPECTED[kind](document)
    print_rows(f"{path}: {title}", rows)
    print_closing(settings, *following)


Inspected = tuple[str, list[tuple[str, str]], list[Step]]


def _inspected_features(document: Mapping[str, Any]) -> Inspected:
    counts, names = document["counts"], document.get("names")
    encoders = {side: own for side, own in document["encoders"].items() if own}
    listed = ", ".join(counted(counts[f"{noun}s"], noun) for noun in ("image", "text", "pair"))
    failures = counts["failures"]
    rows = [
        ("rows", renamed(listed, names)),
        ("splits", _splits(document)),
        *([("pairs", str(document["pairing"]))] if "pairing" in document else []),
        *((renamed(f"{side} encoder", names), _encoder(own)) for side, own in encoders.items()),
        ("skipped inputs", f"{failures:,}" + (f" ({FAILURES})" if failures else "")),
        (
            "size",
            f"{decimal(document['bytes'])} in {counted(document['shards'], 'file')}, "
            f"{document['dtype']}",
        ),
        ("fingerprint", document["fingerprint"]),
    ]
    return "feature set, valid", rows, list(after_features(document))


def _encoder(encoder: Mapping[str, Any]) -> str:
    tokens = encoder.get("token_width")
    also = f", tokens {tokens} wide ({encoder['token_space']})" if tokens else ""
    return f"{encoder['spec']}, {encoder['width']} wide{also}"


def _inspected_run(document: Mapping[str, Any]) -> Inspected:
    features = document["features"]
    lines = document["validation"]
    ends = [line["validation"] for line in lines[:1]]
    ends += [best] if (best := _best_validation(document)) else []
    took = "" if document["seconds"] is None else f" in {document['seconds']:,.1f} s"
    rows = [
        ("trained on", f"{features or 'unknown features'}, split {document['train_split']}"),
        *_adapter_rows(document),
        ("parameters", _sides(document["parameters"])),
        ("closed form", "none" if document["start"] == "random" else document["start"]),
        (
            "steps",
            f"{document['steps']:,}{took}; best: {best_words(document['step'], document['start'])}",
        ),
    ]
    for name, figure in (("mean_recall", RECALL), ("centroid_distance", CENTROID)):
        if values := [figure.show(end[name]) for end in ends if name in end]:
            rows.append((figure.heading, f"{values[-1]} on validation (start {values[0]})"))
    rows.append(("size", decimal(document["bytes"])))
    following: list[Step] = []
    if features is not None:
        following.append(("eval", features, "--adapter", document["path"]))
    return "run, valid", rows, following


def _best_validation(document: Mapping[str, Any]) -> Mapping[str, float] | None:
    """Return the validation metrics of the saved weights of a run."""
    at_best = [
        line["validation"]
        for line in document["validation"]
        if line.get("step") == document["step"]
    ]
    return at_best[-1] if at_best else None


def _adapter_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    shapes = document["adapters"]
    widths = ", ".join(f"{side} {shape['input_width']}" for side, shape in shapes.items())
    return [
        ("encoders", _sides(document["encoders"])),
        ("adapters", _sides({side: shape["kind"] for side, shape in shapes.items()})),
        ("widths", f"{widths}; shared space {shapes['image']['width']}"),
    ]


def _sides(values: Mapping[str, Any]) -> str:
    shown = {side: f"{v:,}" if isinstance(v, int) else str(v) for side, v in values.items()}
    if len({*shown.values()}) == 1:
        return f"{next(iter(shown.values()))} (each side)"
    return ", ".join(f"{side} {value}" for side, value in shown.items())


def _inspected_index(document: Mapping[str, Any]) -> Inspected:
    effort = ", ".join(f"{name} {value}" for name, value in document["effort"].items())
    encoders = {side: (own or {}).get("spec", "none") for side, own in document["encoders"].items()}
    rows = [
        ("content", index_words(document)),
        ("width", f"{document['width']:,}"),
        *([("search effort", effort)] if effort else []),
        *([("correction", document["correct"])] if document["correct"] else []),
        ("adapter", "stored with it" if document["adapter_sha256"] else "none"),
        ("encoders", _sides(encoders)),
        ("built from", f"{document['features']}, split {document['split']}"),
    ]
    return "index, valid", rows, [search_step(document)]


def _inspected_export(document: Mapping[str, Any]) -> Inspected:
    rows = [
        ("files", ", ".join(document["files"])),
        *_adapter_rows(document),
        ("size", decimal(document["bytes"])),
    ]
    card = f"next: {document['path']}/README.md shows how to use it"
    return f"export of an adapter ({document['form']})", rows, [card]


def _inspected_study(document: Mapping[str, Any]) -> Inspected:
    best = document["best"]
    rows = [
        ("searched", ", ".join(document["search"]).replace("_", "-")),
        ("trials", f"{document['trials']:,}"),
    ]
    if best is not None:
        recall = percent(best["mean_recall"])
        rows.append(("highest recall", f"trial {best['number']}, mean recall {recall}"))
        rows.append(("settings", document["config"]))
    step = ("train", "--config", document["config"], "--out", first_free("run"))
    return "study of csalign tune", rows, [step] if best is not None else []


def _inspected_unfinished_features(document: Mapping[str, Any]) -> Inspected:
    counts, missing = document["counts"], document["missing_shards"]
    done = document["shards"] - len(missing)
    listed = ", ".join(missing[:SHARDS_SHOWN]) + (", ..." if missing[SHARDS_SHOWN:] else "")
    state = f"{done} of {counted(document['shards'], 'shard')} done"
    rows = [
        ("source", document["source"]),
        ("shards", state + (f", missing {listed}" if missing else "")),
        ("finished parts", f"{document['parts']:,}"),
        ("rows so far", ", ".join(f"{count:,} {name}" for name, count in counts.items())),
    ]
    if not missing:
        return "unfinished feature set", rows, [("inspect", "--merge", document["out"])]
    shard = [] if document["shards"] == 1 else ["--shard", missing[0]]
    step = ("extract", "--config", document["config"], *shard)
    return "unfinished feature set", rows, [step]


def _inspected_unfinished_run(document: Mapping[str, Any]) -> Inspected:
    rows = [("progress", f"step {document['step']:,}")]
    return "unfinished run", rows, [("train", "--config", document["config"])]


def _inspected_document(document: Mapping[str, Any]) -> Inspected:
    shown = ("features", "adapter", "split", "written_with", "written_on", "written_by")
    rows = [(name.replace("_", " "), str(document[name])) for name in shown if document.get(name)]
    if "mean_recall" in document:
        rows.append(("mean recall", percent(document["mean_recall"])))
    steps: list[Step] = []
    if "mean_recall" in document:
        steps.append(("compare", document["path"], document.get("adapter") or "RUN"))
    return f"{document['kind']}, a document of --json", rows, steps


def _inspected_page(document: Mapping[str, Any]) -> Inspected:
    rows = [("title", document["title"])] if document["title"] else []
    return "page", rows, ["next: open it in a browser"]


INSPECTED: dict[str, Callable[[Mapping[str, Any]], Inspected]] = {
    "features": _inspected_features,
    "run": _inspected_run,
    "index": _inspected_index,
    "export": _inspected_export,
    "study": _inspected_study,
    "unfinished features": _inspected_unfinished_features,
    "unfinished run": _inspected_unfinished_run,
    "evaluation": _inspected_document,
    "comparison": _inspected_document,
    "diagnosis": _inspected_document,
    "search result": _inspected_document,
    "page": _inspected_page,
}
