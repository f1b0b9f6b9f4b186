"""Tables of artifacts: what extract, import and apply wrote, and what inspect finds."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from rich.filesize import decimal

from csalign.cli.next_steps import FAILURES, MANIFEST, NO_SPLIT, Step, after_features, first_free
from csalign.cli.render import print_closing, print_line, print_rows, print_wrapped, print_wrote
from csalign.cli.tables import CENTROID, RECALL, best_words, index_words, search_step
from csalign.core import results
from csalign.core.config import Config
from csalign.core.enums import Modality, renamed
from csalign.core.errors import CsalignError
from csalign.core.figures import counted, percent
from csalign.runs.config import ApplyConfig

FAILURES_SHOWN = 3
SHARDS_SHOWN = 5
FINGERPRINT = 16  # letters shown, of many; --json has all


def features_table(result: results.FeaturesResult, settings: Config) -> None:
    """Print the counts, splits and size of a feature set, and what was skipped."""
    from csalign.evaluation.config import InspectConfig
    from csalign.evaluation.inspect import inspect, summarise_features
    from csalign.features.reader import FeatureSet

    folder = result.features
    counts = {"image": result.images, "text": result.texts, "pair": result.pairs}
    if result.counts is not None and result.sides is not None:
        counts = {"item": result.counts["items"], "side": len(result.sides)}
    listed = ", ".join(counted(number, noun) for noun, number in counts.items())
    line = f"{folder}: {renamed(listed, result.names)}"
    if not result.complete:
        print_line(f"{line} by this process; the last one completes the set")
        with suppress(CsalignError):  # which another process may do right now
            if getattr(settings, "shard", "auto") != "auto":  # else the others run on their own
                inspect_table(inspect(InspectConfig(path=folder)), settings)
        return
    if not (folder / MANIFEST).is_file():  # apply wrote another format
        print_wrote(line)
        for name, text in _sided(result).items():
            print_wrapped(f"  {name}: {text}")
        print_closing(settings)
        return
    summary = summarise_features(FeatureSet.open(folder))
    size = f"{line}, {decimal(summary['bytes'])}"
    print_line(f"{size}, already complete") if result.existed else print_wrote(size)
    for name, text in _sided(result).items():
        print_wrapped(f"  {name}: {text}")
    print_wrapped(f"  splits: {_splits(summary)}")
    if "pairing" in summary:
        title = "joined by" if result.sides else "pairs"
        print_wrapped(f"  {title}: {summary['pairing']}")
    for text in _failures(result):
        print_line(f"  {text}")
    is_eval = isinstance(settings, ApplyConfig) and result.pairs
    print_closing(settings, *([("eval", folder)] if is_eval else after_features(summary)))


def split_table(result: results.SplitResult, settings: Config) -> None:
    """Print how many images each split has."""
    from csalign.evaluation.inspect import summarise_features
    from csalign.features.reader import FeatureSet

    print_wrote(f"{result.features}: {result}")
    print_closing(settings, *after_features(summarise_features(FeatureSet.open(result.features))))


def _sided(summary: Mapping[str, Any]) -> dict[str, str]:
    """Word the rows of each side, and how many items have several; {} for images and texts."""
    if not ("sides" in summary and "counts" in summary):
        return {}
    found = {}
    for name, own in summary["sides"].items():
        alone = f", {own['unpaired']:,} without a row of another side" * bool(own["unpaired"])
        rows = counted(own["rows"], "row")
        found[name] = f"{rows}, {own['width']} wide, encoder {own['encoder']}{alone}"
    by_sides, pairs = (summary["counts"][name].items() for name in ("by_sides", "pairs"))
    return {
        **found,
        "items": ", ".join(f"{n:,} of {counted(int(k), 'side')}" for k, n in by_sides),
        "pairs": ", ".join(f"{a}-{b} {n:,}" for a, own in pairs for b, n in own.items()),
    }


def _splits(summary: Mapping[str, Any]) -> str:
    """Word the splits of a feature set, with the rows of each side."""
    splits = summary["splits"]
    if set(splits) <= {NO_SPLIT}:
        return "none"
    order = sorted(splits, key=lambda name: ("train", "val", "test", name).index(name))
    sides = [*next(iter(splits.values()))]
    if len(sides) > len(Modality):
        sides = [side for side in sides if any(own[side] for own in splits.values())]
    counts = [f"{name} " + " + ".join(f"{splits[name][own]:,}" for own in sides) for name in order]
    return f"{', '.join(counts)} ({renamed(' + '.join(sides), summary.get('names'))})"


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


Inspected = tuple[str, dict[str, str], list[Step]]
"""What an artifact is, the values that matter by name, "" if unknown, and what to do with it."""


def inspect_table(document: Mapping[str, Any], settings: Config) -> None:
    """Print what an artifact is, the values that matter, and what to do with it."""
    title, rows, following = INSPECTED[document["kind"]](document)
    print_line(f"{document['path']}: {title}", "bold")
    print_rows((name, value) for name, value in rows.items() if value)
    print_closing(settings, *following)


def _inspected_features(document: Mapping[str, Any]) -> Inspected:
    counts, names = document["counts"], document.get("names")
    encoders, sided = document["encoders"].items(), _sided(document)
    if sided:  # which have the encoders
        encoders, listed = {}.items(), ""
    else:
        listed = ", ".join(counted(counts[f"{noun}s"], noun) for noun in ("image", "text", "pair"))
    rows = {
        "rows": renamed(listed, names),
        **sided,
        "splits": _splits(document),
        "joined by" if sided else "pairs": str(document.get("pairing", "")),
        "joined images": f"{document['joined']:,} repeated" if "joined" in document else "",
        **{renamed(f"{side} encoder", names): _encoder(own) for side, own in encoders if own},
        **{
            renamed(f"{side} rows", names): f"mean cosine {own['mean_cosine']:.2f}, effective "
            f"dimensions {own['effective_dimensions']:.1f}, {percent(own['equal_rows'], 0)} equal"
            for side, own in document["health"].items()
        },
        "findings": "; ".join(document["findings"]),
        "skipped inputs": f"{counts['failures']:,}" + f" ({FAILURES})" * bool(counts["failures"]),
        "size": f"{decimal(document['bytes'])} in {counted(document['shards'], 'file')}, "
        f"{document['dtype']}",
        "fingerprint": " + ".join(own[:FINGERPRINT] for own in document["fingerprint"].split("+")),
    }
    return "feature set, valid", rows, list(after_features(document))


def _encoder(encoder: Mapping[str, Any]) -> str:
    tokens = encoder.get("token_width")
    also = f", tokens {tokens} wide ({encoder['token_space']})" if tokens else ""
    return f"{encoder['spec']}, {encoder['width']} wide{also}"


def _inspected_run(document: Mapping[str, Any]) -> Inspected:
    features, start = document["features"], document["start"]
    took = "" if document["seconds"] is None else f" in {document['seconds']:,.1f} s"
    best = best_words(document["step"], start)
    if "kernel" in {shape["kind"] for shape in document["adapters"].values()}:
        best = "kernel CCA, instead of the network"
    steps = f"{document['steps']:,}{took}; best: {best}" if document["steps"] else f"none{took}"
    lines = document["validation"]
    ends = [*lines[:1], *(line for line in lines if line.get("step") == document["step"])]
    scores = [end["validation"] for end in ends]
    scores += [document["figures"]] if document["figures"] else []
    rows = {
        "trained on": f"{features or 'unknown features'}, split {document['train_split']}",
        **_adapter_rows(document),
        "parameters": _sides(document["parameters"]),
        "closed form": "none" if start == "random" else start,
        "steps": steps,
    }
    for name, figure in (("mean_recall", RECALL), ("centroid_distance", CENTROID)):
        if values := [figure.show(score[name]) for score in scores if name in score]:
            rows[figure.heading] = f"{values[-1]} on validation (start {values[0]})"
    if document["refit"]:
        noun = "pairs" if {*document["adapters"]} <= {*Modality} else "items"
        count = document["refit"]["pairs"]
        rows["refit"] = f"on all {count:,} {noun}; the figures are those before it"
    rows["size"] = decimal(document["bytes"])
    following = [("eval", features, "--adapter", document["path"])] if features else []
    return "run, valid", rows, [*following]


def _adapter_rows(document: Mapping[str, Any]) -> dict[str, str]:
    shapes = document["adapters"]
    widths = ", ".join(f"{side} {shape['input_width']}" for side, shape in shapes.items())
    first = next(iter(shapes.values()))
    parts = " + ".join(str(part["width"]) for part in first["parts"])
    shares = document.get("shares", [])
    return {
        "encoders": _sides(document["encoders"]),
        "adapters": _sides(document["kinds"]),
        "shares": " + ".join(percent(own, 0) for own in shares) if shares[1:] else "",
        "widths": f"{widths}; shared space {first['width']}" + f" ({parts})" * bool(parts),
    }


def _sides(values: Mapping[str, Any]) -> str:
    shown = {side: f"{v:,}" if isinstance(v, int) else str(v) for side, v in values.items()}
    if len({*shown.values()}) == 1:
        return f"{next(iter(shown.values()))} (each side)"
    return ", ".join(f"{side} {value}" for side, value in shown.items())


def _inspected_index(document: Mapping[str, Any]) -> Inspected:
    encoders = {side: (own or {}).get("spec", "none") for side, own in document["encoders"].items()}
    rows = {
        "content": index_words(document),
        "width": f"{document['width']:,}",
        "search effort": ", ".join(f"{name} {own}" for name, own in document["effort"].items()),
        "correction": document["correct"] or "",
        "adapter": "stored with it" if document["adapter_sha256"] else "none",
        "encoders": _sides(encoders),
        "built from": f"{document['features']}, split {document['split']}",
    }
    return "index, valid", rows, [search_step(document)]


def _inspected_export(document: Mapping[str, Any]) -> Inspected:
    files, size = ", ".join(document["files"]), decimal(document["bytes"])
    card = f"next: {document['path']}/README.md shows how to use it"
    rows = {"files": files, **_adapter_rows(document), "size": size}
    return f"export of an adapter ({document['form']})", rows, [card]


def _inspected_study(document: Mapping[str, Any]) -> Inspected:
    best, config = document["best"], document["config"]
    rows = {
        "searched": ", ".join(document["search"]).replace("_", "-"),
        "trials": f"{document['trials']:,}",
    }
    if best is None:
        return "study of csalign tune", rows, []
    rows["highest recall"] = f"trial {best['number']}, mean recall {percent(best['mean_recall'])}"
    rows["settings"] = config
    step = ("train", "--config", config, "--out", first_free("run"))
    return "study of csalign tune", rows, [step]


def _inspected_unfinished_features(document: Mapping[str, Any]) -> Inspected:
    shards, missing = document["shards"], document["missing_shards"]
    listed = ", ".join(missing[:SHARDS_SHOWN]) + ", ..." * bool(missing[SHARDS_SHOWN:])
    state = f"{shards - len(missing)} of {counted(shards, 'shard')} done"
    rows = {
        "source": document["source"],
        "shards": state + (f", missing {listed}" if missing else ""),
        "finished parts": f"{document['parts']:,}",
        "rows so far": ", ".join(f"{own:,} {name}" for name, own in document["counts"].items()),
    }
    step: Step = ("inspect", "--merge", document["out"])
    if missing:
        shard = [] if shards == 1 else ["--shard", missing[0]]
        step = ("extract", "--config", document["config"], *shard)
    return "unfinished feature set", rows, [step]


def _inspected_unfinished_run(document: Mapping[str, Any]) -> Inspected:
    of = f" of {document['steps']:,}" if document["steps"] else ""
    rows = {"progress": f"step {document['step']:,}{of}"}
    return "unfinished run", rows, [("train", "--config", document["config"])]


def _inspected_document(document: Mapping[str, Any]) -> Inspected:
    shown = ("features", "adapter", "split", "written_with", "written_on", "written_by")
    rows = {name.replace("_", " "): str(document.get(name) or "") for name in shown}
    steps: list[Step] = []
    if "mean_recall" in document:
        rows["mean recall"] = percent(document["mean_recall"])
        steps.append(("compare", document["path"], document.get("adapter") or "RUN"))
    return f"{document['kind']}, a document of --json", rows, steps


def _inspected_page(document: Mapping[str, Any]) -> Inspected:
    return "page", {"title": document["title"] or ""}, ["next: open it in a browser"]


INSPECTED: dict[str, Callable[[Mapping[str, Any]], Inspected]] = {
    "features": _inspected_features,
    "run": _inspected_run,
    "index": _inspected_index,
    "export": _inspected_export,
    "study": _inspected_study,
    "unfinished features": _inspected_unfinished_features,
    "unfinished run": _inspected_unfinished_run,
    "page": _inspected_page,
    **dict.fromkeys(
        ("evaluation", "comparison", "comparison of models", "diagnosis", "search result"),
        _inspected_document,
    ),
}
