"""Tables of the commands that make something: train, tune, bind, index, search, and others."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.filesize import decimal

from csalign.cli import render
from csalign.cli.next_steps import ALIGNED, Step, first_free, splits_of
from csalign.core import results
from csalign.core.enums import Modality, renamed, side_of
from csalign.core.figures import counted, figure_of, percent
from csalign.generation.config import GenerateConfig
from csalign.indexing.config import IndexConfig, SearchConfig
from csalign.runs.config import ExportConfig
from csalign.training.bind_config import BindConfig
from csalign.training.config import TrainConfig, TuneConfig

TRIALS_SHOWN = 10
ENCODERS = ("open_clip:", "hf:")  # of texts, that search can load
VALIDATED = {"start": "start", "kept": "best", "matched": "moments matched", "parts": "all parts"}
RECALL = figure_of("retrieval.mean_recall")
CENTROID = figure_of("gap.centroid_distance")


def train_table(result: results.TrainResult, settings: TrainConfig) -> None:
    """Print what was trained, and its validation metrics."""
    parameters = ", ".join(
        f"{renamed(side, result.names)} {count:,}" for side, count in result.parameters.items()
    )
    render.print_wrote(f"{result.run}")
    steps = f"{result.steps:,} in" if result.steps else "none,"
    render.print_rows(
        [
            ("start", result.start),
            *[("sides", ", ".join(result.sides or ()))] * bool(result.sides),
            (
                "items" if result.sides else "pairs",
                ", ".join(f"{part} {count:,}" for part, count in result.pairs.items()),
            ),
            *[("parts", result.parts)] * bool(result.parts),
            ("width", f"{result.width:,}"),
            ("parameters", parameters),
            ("steps", f"{steps} {result.seconds:.1f} s"),
            *[("best", best_words(result.best_step, result.start))] * bool(result.steps),
            *[("refit", result.refit.removeprefix("refitted "))] * bool(result.refit),
        ]
    )
    same = set() if result.steps else {"kept"}  # as the start
    if validation := {name: own for name, own in result.validation.items() if name not in same}:
        render.print_title("validation")
        scores = validation.values()
        shown = {"mean_recall": RECALL, "centroid_distance": CENTROID}
        render.print_table(
            [VALIDATED.get(name, name) for name in validation],
            {one.heading: [one.show(own[name]) for own in scores] for name, one in shown.items()},
        )
    features = settings.features
    splits = splits_of(features)
    split = ["--split", "test"] if "test" in splits else []
    render.print_closing(settings, ("eval", features, "--adapter", result.run, *split))


def bind_table(result: results.Result, settings: BindConfig) -> None:
    """Print which sides a bound run has, and how well the shared side agrees in it."""
    held, widths = result["held_out"], result["widths"]
    render.print_wrote(f"{result['run']}")
    mapped = ", ".join(result["mapped"])
    rows = [
        ("sides", ", ".join(result["sides"])),
        ("shared", f"{result['shared']}, {result['rows']:,} different rows"),
        ("mapped", f"{mapped}: {widths['from']} to {widths['to']} wide, by a rotation"),
    ]
    if held["rows"]:
        recall = RECALL.show(held["mean_recall"])
        shown = f"{RECALL.heading} {recall}, cosine {held['cosine']:.3f}"
        rows.append(("agreement", f"{shown}, on {held['rows']:,} rows held out"))
    render.print_rows(rows)
    render.print_closing(settings, ("inspect", result["run"]))


def best_words(step: int, start: str) -> str:
    """Word which weights of a run were kept."""
    if step:
        return f"step {step:,}"
    return ("random weights" if start == "random" else "closed form") + " (no step beat it)"


def generate_table(result: results.GenerateResult, settings: GenerateConfig) -> None:
    """Print what was generated."""
    reused = f", {result.reused:,} of them from an earlier call" if result.reused else ""
    render.print_wrote(
        f"{result.out}: {counted(result.images, 'image')}{reused}, "
        f"by {result.decoder} from embeddings of norm {result.scale:.4g} (that of "
        f"{result.scale_from})"
    )
    made = ("--generated", result.out, "--encoder", "ENCODER")
    render.print_closing(settings, ("eval", "--images", "REAL", *made))


def tune_tables(result: results.TuneResult, settings: TuneConfig) -> None:
    """Print the best trials and the default, then how to judge the winner."""
    there = result.validation
    states = [trial.state for trial in result.trials]
    rest = [f"{states.count(state)} {state}" for state in ("pruned", "failed") if state in states]
    render.print_line(
        f"{result.study}: {', '.join([counted(len(states), 'trial'), *rest])}; measured on "
        f"{there['name']}: {there['images']:,} images, {there['texts']:,} texts"
    )
    best = result.trials[result.best]
    complete = [trial for trial in result.trials if trial.state == "complete"]
    complete.sort(key=lambda trial: (trial is not best, -(trial.mean_recall or 0), trial.number))
    shown = [t for i, t in enumerate(complete) if i < TRIALS_SHOWN or t.number == 0]
    names = [_trial_name(trial) for trial in shown]
    divergence = figure_of("gap.cs_divergence")
    render.print_line()
    render.print_table(
        names,
        {
            RECALL.heading: [RECALL.show(trial.mean_recall) for trial in shown],
            "vs default": [_to_default(trial) for trial in shown],
            CENTROID.heading: [CENTROID.show(trial.centroid_distance) for trial in shown],
            divergence.heading: [divergence.show(trial.cs_divergence) for trial in shown],
            "best step": [str(trial.best_step or "start") for trial in shown],
            "seconds": [f"{trial.seconds:.1f}" for trial in shown],
        },
    )
    # The name of the closed form says its steps.
    searched = dict.fromkeys(name for trial in shown for name in trial.settings if name != "steps")
    values = {
        name.replace("_", "-"): [_setting(trial.settings.get(name)) for trial in shown]
        for name in searched
    }
    same = {name: {*own} - {"-"} for name, own in values.items() if len({*own} - {"-"}) == 1}
    render.print_line()
    if same:
        common = ", ".join(f"{name} {value}" for name, (value,) in same.items())
        render.print_wrapped(f"settings of all these trials: {common}")
    if differing := {name: own for name, own in values.items() if name not in same}:
        render.print_table(names, differing)
    render.print_line()
    for line in _tune_verdict(result, best):
        render.print_wrapped(line)
    render.print_closing(settings, ("train", "--config", result.config, "--out", first_free("run")))


def _trial_name(trial: results.Trial) -> str:
    if trial.number == 0:
        return "0 (default)"
    return f"{trial.number}" + (" (closed form)" if trial.settings.get("steps") == 0 else "")


def _to_default(trial: results.Trial) -> str:
    found = trial.difference.get("mean_recall")
    return RECALL.show_difference(**found) if found else "-"


def _setting(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _tune_verdict(result: results.TuneResult, best: results.Trial) -> Iterator[str]:
    if best.number == 0:
        yield f"No trial beat the default, whose settings are in {result.config}."
        return
    yield f"Trial {best.number} is the best; its settings are in {result.config}."
    if best.difference:
        low, high = best.difference["mean_recall"]["interval"]
        judged = "within chance" if low <= 0 <= high else "more than chance"
        gap = CENTROID.show_difference(**best.difference["centroid_distance"])
        yield (
            f"Versus the default: mean recall {_to_default(best)} points, {judged} on these "
            f"images; centroid distance {gap}."
        )
    yield (
        f"The best of {len(result.trials)} trials is biased upwards. Confirm it on a split that no "
        "trial saw: train with these settings, then csalign compare with a run of the defaults."
    )


def recipes_table(titles: Mapping[str, str]) -> None:
    """Print the recipes and their purpose."""
    render.print_line("csalign train --recipe NAME; csalign recipes NAME prints it", "bold")
    render.print_rows(titles.items())


def index_table(document: Mapping[str, Any], settings: IndexConfig) -> None:
    """Print what was built."""
    render.print_wrote(f"{document['path']}: {index_words(document)}")
    render.print_closing(settings, search_step(document))


def index_words(document: Mapping[str, Any]) -> str:
    """Word the kind, content, size and recall of an index."""
    recall, names = document["recall"], document.get("names")
    plural = ", ".join(side_of(side).plural for side in document["side"].split(","))
    quality = "exact search"
    if recall is not None:
        quality = (
            f"recall@10 {percent(recall['value'])} on {recall['queries']:,} "
            f"{renamed(recall['of'], names)}"
        )
    return (
        f"{document['factory']} index of {document['rows']:,} "
        f"{renamed(plural, names)}, {decimal(document['bytes'])}, {quality}"
    )


def search_step(document: Mapping[str, Any]) -> Step:
    """Suggest a query: words if the texts have an encoder that can be loaded."""
    known = (document["encoders"].get("text") or {}).get("spec", "")
    if known.startswith(ENCODERS) and ALIGNED not in known:
        return ("search", document["path"], "a red bicycle")
    others = [side for side in document["encoders"] if side not in document["side"].split(",")]
    if len(document["encoders"]) > len(Modality) and others:
        return ("search", document["path"], "--query", f"{others[0]}=query.npy")
    return ("search", document["path"], "--embedding", "query.npy")


def export_table(document: Mapping[str, Any], settings: ExportConfig) -> None:
    """Print the files of an export, and how much its outputs differ from the run's."""
    largest = max(document["differences"].values())
    render.print_wrote(
        f"{document['out']}: {', '.join(document['files'])}; "
        f"outputs differ from the run by at most {largest:.1e}"
    )
    render.print_closing(settings, f"next: {document['out']}/README.md shows how to use it")


def found(result: results.Found, settings: SearchConfig) -> None:
    """Print search results as tables or JSON lines, each query as soon as it is answered."""
    for one in result.queries:
        if result.jsonl:
            render.print_json(one, indent=None)
            sys.stdout.flush()
            continue
        render.print_line(one["query"], "bold")
        hits = one["hits"]
        digits = len(str(len(hits)))
        render.print_rows(
            (f"{hit['rank']:>{digits}}   {hit['score']:.4f}   {_name(hit)}", _words(hit))
            for hit in hits
        )
        render.print_line()
    if not result.jsonl:
        render.print_closing(settings)


def _name(hit: Mapping[str, Any]) -> str:
    """Name a hit: its id, and among several sides its side and item."""
    if "side" not in hit:
        return str(hit["id"])
    item = f" of {hit['item']}" if hit["item"] not in (None, hit["id"]) else ""
    return f"{hit['side']} {hit['id']}{item}"


def _words(hit: Mapping[str, Any]) -> str:
    """Return what to show of a hit beside its id: its caption, or a source that the id hides."""
    source = hit["source"] or ""
    return hit["caption"] or ("" if source.endswith(hit["id"]) else source)
