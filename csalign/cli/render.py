"""Results for people and for programs: the only place that prints to stdout."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table

from csalign.core.enums import Names, renamed
from csalign.core.results import (
    FeaturesResult,
    Found,
    GenerateResult,
    TrainResult,
    Trial,
    TuneResult,
)

R = TypeVar("R")
STDOUT = "stdout"
# Where stdout is no terminal, a table must not be squeezed into Rich's 80 columns.
PIPED_WIDTH = 160
TRIALS_SHOWN = 10
DIRECTIONS = ("image_to_text", "text_to_image")
_SHARE, _RANK, _PLAIN = (100, ".2f"), (1, ".1f"), (1, ".4f")
RETRIEVAL = {
    **{f"R@{k} %": (f"R@{k}", _SHARE) for k in (1, 5, 10)},
    "true recall@10 %": ("true_recall@10", _SHARE),
    "median rank": ("median_rank", _RANK),
    "mean rank": ("mean_rank", _RANK),
    "MRR": ("mrr", _PLAIN),
    "mAP": ("map", _PLAIN),
}
"""Columns of retrieval tables: which figure, its scale and its format."""


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def escape_controls(text: str) -> str:
    r"""Escape what a terminal would interpret in text of unknown origin, as ``\x1b``."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


@contextmanager
def to_stdout() -> Iterator[None]:
    """Around printing: an error says that it is of stdout.

    Raises:
        OSError: what is printed cannot be written.
    """
    try:
        yield
        sys.stdout.flush()  # here, where a disk that is full can still be told
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, STDOUT) from error


def show(result: R, table: Callable[[R], None], *, as_json: bool) -> None:
    """Print a result as one JSON document, or by a function that makes tables."""
    with to_stdout():
        print_json(result) if as_json else table(result)


def print_json(result: Any) -> None:
    """Print one JSON document to stdout: a document, or a result as one."""
    document = result if isinstance(result, dict) else result.to_json()
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def features_table(result: FeaturesResult) -> None:
    """Say what was written."""
    counts = renamed(f"{result.images:,} images, {result.texts:,} texts", result.names)
    _print(
        f"{result.features}: {counts}, {result.pairs:,} pairs"
        + (f", {result.failures:,} inputs left out (failures.jsonl)" if result.failures else "")
        + ("" if result.complete else "; other shards are not done yet")
    )


def train_table(result: TrainResult) -> None:
    """Say what was trained, and whether it was worth it."""
    parameters = ", ".join(
        f"{renamed(side, result.names)} {count:,}" for side, count in result.parameters.items()
    )
    rows = [
        ("start", result.start),
        ("pairs", ", ".join(f"{part} {count:,}" for part, count in result.pairs.items())),
        ("parameters", parameters),
        ("steps", f"{result.steps:,} in {result.seconds:.1f} s"),
        ("kept", f"step {result.best_step:,}" if result.best_step else "the start"),
    ]
    for name, score in result.validation.items():
        rows.append(
            (
                f"validation, {name}",
                f"mean recall {_percent(score['mean_recall'])}, "
                f"centroid distance {score['centroid_distance']:.4f}",
            )
        )
    _print_rows(str(result.run), rows)


def generate_table(result: GenerateResult) -> None:
    """Say what was made."""
    reused = f", {result.reused:,} of them made before" if result.reused else ""
    _print(
        f"{result.out}: {result.images:,} images{reused}, by {result.decoder} of embeddings of "
        f"norm {result.scale:.4g}, that of {result.scale_from}"
    )


def tune_tables(result: TuneResult) -> None:
    """The best trials and the default, then what the winner is worth."""
    there = result.validation
    states = [trial.state for trial in result.trials]
    rest = [f"{states.count(state)} {state}" for state in ("pruned", "failed") if state in states]
    _print(
        f"{result.study}: {', '.join([f'{len(states)} trials', *rest])}; measured on "
        f"{there['name']}: {there['images']:,} images, {there['texts']:,} texts"
    )
    best = result.trials[result.best]
    complete = [trial for trial in result.trials if trial.state == "complete"]
    complete.sort(key=lambda trial: (trial is not best, -(trial.mean_recall or 0), trial.number))
    shown = [t for i, t in enumerate(complete) if i < TRIALS_SHOWN or t.number == 0]
    names = [_trial_name(trial) for trial in shown]
    figures = {
        "mean recall": [_percent(trial.mean_recall or 0) for trial in shown],
        "to the default": [_to_default(trial, "mean_recall") for trial in shown],
        "centroid": [f"{trial.centroid_distance:.4f}" for trial in shown],
        "CS": [f"{trial.cs_divergence:.4f}" for trial in shown],
        "kept": [f"step {trial.best_step}" if trial.best_step else "start" for trial in shown],
        "seconds": [f"{trial.seconds:.1f}" for trial in shown],
    }
    searched = list(dict.fromkeys(name for trial in shown for name in trial.settings))
    searched = [name for name in searched if name != "steps"]  # of the closed form, by its name
    settings = {
        name.replace("_", "-"): [_setting(trial.settings.get(name)) for trial in shown]
        for name in searched
    }
    one = _columns(names, figures | settings)
    for table in [one] if _fits(one) else [_columns(names, figures), _columns(names, settings)]:
        _print_table(table)
    for line in _tune_verdict(result, best):
        _print(line)


def _trial_name(trial: Trial) -> str:
    role = {0: ", the default"}.get(trial.number, "")
    return f"{trial.number}{role or (', the closed form' if trial.steps == 0 else '')}"


def _to_default(trial: Trial, figure: str) -> str:
    return _signed(trial.difference[figure]) if trial.difference else ""


def _setting(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _tune_verdict(result: TuneResult, best: Trial) -> Iterator[str]:
    if best.number == 0:
        yield f"No trial was better than the default, whose settings are in {result.config}."
        return
    yield f"Trial {best.number} is the best; {result.config} has its settings."
    if best.difference:
        low, high = best.difference["mean_recall"]["interval"]
        judged = "cannot be told from chance" if low <= 0 <= high else "is more than chance"
        gap = best.difference["centroid_distance"]
        yield (
            f"To the default: mean recall {_to_default(best, 'mean_recall')} points, which "
            f"{judged} on these images; centroid distance {gap['value']:+.4f} "
            f"{_range(gap['interval'], digits=4)}."
        )
    yield (
        f"The best of {len(result.trials)} looks at the same images flatters itself. What it is "
        f"worth: csalign train --config {result.config} --out RUN, and csalign compare RUN with a "
        "run of the defaults, on a split that no trial saw."
    )


def recipes_table(titles: dict[str, str]) -> None:
    """Recipes by name, and what each is for."""
    _print_rows("csalign train --recipe NAME; csalign recipes NAME prints it", list(titles.items()))


def eval_tables(document: dict[str, Any]) -> None:
    """The document of ``csalign eval`` as tables."""
    counts = document["counts"]
    if "distribution" in document:
        _print(
            f"{document['generated']}: {counts['generated']:,} images, against "
            f"{document['images']}: {counts['images']:,}, by {document['encoder']}"
        )
        names = {"frechet": "Frechet distance", "frechet_unit": "of unit rows", "cmmd": "CMMD"}
        figures = document["distribution"]
        _print_rows("distance", [(names[key], f"{figures[key]:.4f}") for key in names])
        _further_tables(document)
        return
    adapter = document["adapter"] or "no adapter"
    rows = f"{counts['images']:,} images, {counts['texts']:,} texts, {counts['pairs']:,} pairs"
    _print(
        f"{document['features']}, {adapter}, split {document['split']}: "
        + renamed(rows, document.get("names"))
    )
    if "retrieval" in document:
        _retrieval_and_gap(document)
    _further_tables(document)


def _retrieval_and_gap(document: dict[str, Any]) -> None:
    names = document.get("names")
    _print(_protocol(document["protocol"], names))
    retrieval, intervals = document["retrieval"], document["intervals"]
    _print_table(_retrieval_table({"": retrieval}, intervals, names))
    gap = document["gap"]
    whole = intervals.get("mean_recall")
    flat = [("mean recall", _percent(retrieval["mean_recall"]) + _beside(whole, scale=100))]
    errors = gap.get("standard_errors", {})
    for name, value in gap.items():
        label = name.replace("_", " ")
        if name == "standard_errors":
            continue
        if isinstance(value, dict):
            plain = {part: number for part, number in value.items() if not isinstance(number, list)}
            around = errors.get(name, {})
            flat += [
                (
                    f"{label}, {renamed(part, names)}",
                    f"{number:.4f}" + _give_or_take(around.get(part)),
                )
                for part, number in plain.items()
            ]
        else:
            beside = _give_or_take(errors.get(name)) + _beside(intervals.get(name), digits=4)
            flat.append((label, f"{value:.4f}" + beside))
    _print_rows("modality gap", flat)
    hubs = [
        (renamed(name.replace("_", " "), names), f"{skew:.4f}")
        for name, skew in document["hubness"].items()
    ]
    _print_rows("hubness, skewness of the 10-occurrence", hubs)


def _further_tables(document: dict[str, Any]) -> None:
    """What is there only if it was asked for."""
    names = document.get("names")
    if corrected := document.get("corrected"):
        _print("retrieval with hubs corrected for, by the evaluated rows themselves")
        _print_table(_retrieval_table(corrected, {}, names))
    if graded := document.get("graded"):
        told = [(renamed(name, names), value) for name, value in _leaves(graded)]
        _print_rows(f"items that agree in {graded['column']!r} are right", told)
    if by := document.get("by"):
        _print(f"retrieval by {by['column']!r} of the query's {renamed('image', names)}")
        titled = {f"{name} ({block['texts']:,})": block for name, block in by["values"].items()}
        _print_table(_retrieval_table(titled, {}, names))
    if "zero_shot" in document:
        _zero_shot_table(document)
    if explanations := document.get("explanations"):
        rows = [
            (name, text["formula"] + (f" ({text['source']})" if text["source"] else ""))
            for name, text in explanations.items()
        ]
        _print_rows("what the figures mean", rows)


def _zero_shot_table(document: dict[str, Any]) -> None:
    """Zero-shot figures, each with its interval."""
    figures, intervals = document["zero_shot"], document["intervals"].get("zero_shot", {})
    shares = ("top1", "top5", "mean_per_class_recall")
    rows = [
        (name.replace("_", " "), _percent(figures[name]) + _beside(intervals.get(name), scale=100))
        for name in shares
        if figures[name] is not None
    ]
    counts = ", ".join(f"{figures[key]:,} {key}" for key in ("images", "classes", "prompts"))
    counts = renamed(counts, document.get("names"))
    _print_rows(f"zero-shot classification: {counts}", rows)


def _protocol(protocol: dict[str, Any], names: Names | None) -> str:
    """One line of what decides a score beside the model."""
    folds = f"mean of {protocol['folds']} folds of " if protocol["folds"] > 1 else ""
    dtype = protocol["dtype"]
    images, texts = (protocol[side] // protocol["folds"] for side in ("images", "texts"))
    rows = f"{images:,} images and {texts:,} " + ("texts" if names else "captions")
    return (
        f"protocol {protocol['name']}: {folds}{renamed(rows, names)}, split {protocol['split']}, "
        f"stored as {dtype['stored']}, scores in {dtype['scores']}, {protocol['ties']}"
    )


def _retrieval_table(
    blocks: dict[str, Any], intervals: dict[str, Any], names: Names | None
) -> Table:
    """Both directions of retrieval blocks by what stands before their names."""
    table = _figures("", *RETRIEVAL)
    for title, block in blocks.items():
        for name in DIRECTIONS:
            if name in block:
                row = block[name]
                label = f"{title} {renamed(name.replace('_', ' '), names)}".strip()
                cells = (_format(row[figure], how) for figure, how in RETRIEVAL.values())
                table.add_row(escape(label), *cells)
                if intervals:
                    table.add_row("95 %", *_ranges(intervals[name]), style="dim")
    return table


def _format(value: float, how: tuple[float, str]) -> str:
    scale, form = how
    return f"{scale * value:{form}}"


def _ranges(around: dict[str, list[float]]) -> Iterator[str]:
    """The intervals of a direction in the table's columns; a figure may have none."""
    for figure, how in RETRIEVAL.values():
        ends = [_format(end, how) for end in around.get(figure, ())]
        yield f"[{', '.join(ends)}]" if ends else ""


def compare_table(document: dict[str, Any]) -> None:
    """The document of ``csalign compare``, a row a system; two tables where one is too wide."""
    rows = document["evaluations"]
    names = [escape(escape_controls(row["name"])) for row in rows]
    judged = {"mean recall": [], "difference": [], "verdict": [row["verdict"] for row in rows]}
    for row in rows:
        difference = row["difference"].get("mean_recall")
        interval = _beside(row["intervals"].get("mean_recall"), scale=100)
        judged["mean recall"].append(_percent(row["mean_recall"]) + interval)
        judged["difference"].append(_signed(difference) if difference else "")
    called = document.get("names")
    shown = {
        renamed("i2t R@1", called): [_percent(row["image_to_text_R@1"]) for row in rows],
        renamed("t2i R@1", called): [_percent(row["text_to_image_R@1"]) for row in rows],
    }
    gap = {"centroid": "centroid_distance", "RMG": "rmg", "CS": "cs_divergence"}
    for title, key in {**gap, "Frechet": "frechet"}.items():
        shown[title] = [f"{row[key]:.4f}" for row in rows]
    for key, kind in (("parameters", ",.0f"), ("seconds", ",.1f")):
        if any(row[key] is not None for row in rows):
            shown[key] = ["" if row[key] is None else format(row[key], kind) for row in rows]
    one = _columns(names, judged | shown)
    for table in [one] if _fits(one) else [_columns(names, judged), _columns(names, shown)]:
        _print_table(table)
    if any(row["intervals"] for row in rows):
        paired = "; differences are paired" if any(row["difference"] for row in rows) else ""
        _print(f"[..., ...]: 95 % bootstrap intervals over images{paired}")


def diagnosis_tables(document: dict[str, Any]) -> None:
    """The document of ``csalign diagnose``: both objectives side by side, then the gap."""
    infonce, objective = document["infonce"], document["objective"]
    _print(
        f"{document['features']}, {document['adapter'] or 'no adapter'}, split "
        f"{document['split']}: {document['pairs']:,} pairs at logit scale "
        f"{document['logit_scale']:g}, CS weight {document['cs_weight']:g}"
    )
    table = _figures("", "InfoNCE", "with CS")
    for name in ("loss", "alignment", "uniformity", "gradient_cosine"):
        label = "cosine of their gradients" if name == "gradient_cosine" else name
        table.add_row(label, f"{infonce[name]:.4f}", f"{objective[name]:.4f}")
    _print_table(table)
    rest = {name: value for name, value in objective.items() if name not in infonce}
    told = list(_leaves(rest | document["gap"]))
    _print_rows(
        "divergence and gap",
        [(renamed(name, document.get("names")), value) for name, value in told],
    )


def inspect_table(document: dict[str, Any]) -> None:
    """What ``csalign inspect`` found, a line a figure."""
    body = {key: value for key, value in document.items() if key not in ("kind", "path")}
    for line in body.pop("validation", []):
        body[f"validation, step {line['step']}"] = line["validation"]
    names = body.pop("names", None)
    told = [(renamed(name, names), value) for name, value in _leaves(body)]
    kind = "feature set" if document["kind"] == "features" else document["kind"]
    _print_rows(f"{document['path']}: {kind}, valid", told)


def index_table(document: dict[str, Any]) -> None:
    """Print what was built."""
    recall, names = document["recall"], document.get("names")
    quality = "exact search"
    if recall is not None:
        quality = (
            f"recall@10 {_percent(recall['value'])} on {recall['queries']:,} "
            f"{renamed(recall['of'], names)}"
        )
    _print(
        f"{document['path']}: {document['factory']} index of {document['rows']:,} "
        f"{renamed(document['side'] + 's', names)}, {document['bytes'] / 1e6:,.1f} MB, {quality}"
    )


def export_table(document: dict[str, Any]) -> None:
    """Say what was written, and how near it computes to the run."""
    largest = max(document["differences"].values())
    _print(
        f"{document['out']}: {', '.join(document['files'])}; differs by at most {largest:.1e} from "
        "the run"
    )


def found(result: Found) -> None:
    """What was found, as tables or as JSON lines, each query as soon as it is there."""
    if result.jsonl:
        _found_lines(result)
    else:
        _found_tables(result)


def _found_tables(result: Found) -> None:
    for one in result.queries:
        table = Table(
            Column("", justify="right"),
            Column("score", justify="right", no_wrap=True),
            Column("id", overflow="fold"),
            Column("caption", overflow="fold"),
            Column("source", overflow="fold"),
            box=SIMPLE,
        )
        for hit in one["hits"]:
            words = (hit["id"], hit["caption"] or "", hit["source"] or "")
            cells = [escape(escape_controls(word)) for word in words]
            table.add_row(str(hit["rank"]), f"{hit['score']:.4f}", *cells)
        _print(one["query"])
        _print_table(table)


def _found_lines(result: Found) -> None:
    for one in result.queries:
        sys.stdout.write(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()


def _figures(first: str, *names: str) -> Table:
    """A table with a name in the first column and figures in the others."""
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    return Table(Column(first, overflow="fold"), *columns, box=SIMPLE)


def _columns(names: list[str], cells: dict[str, list[str]]) -> Table:
    """A table of the names and of columns by title."""
    table = _figures("", *cells)
    for name, *row in zip(names, *cells.values(), strict=True):
        table.add_row(name, *row)
    return table


def _fits(table: Table) -> bool:
    console = _console()
    unbounded = console.options.update(max_width=1_000)
    return Measurement.get(console, unbounded, table).maximum <= console.width


def _leaves(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of everything in a nested document; what is unset is left out."""
    for key, value in document.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}, ")
        elif value is not None:
            yield name, f"{value:,.4g}" if isinstance(value, float) else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _give_or_take(error: float | None) -> str:
    """A standard error to stand behind its figure; nothing where the figure is exact."""
    return "" if error is None else f" ± {error:.2g}"


def _beside(interval: list[float] | None, *, scale: float = 1, digits: int = 2) -> str:
    """An interval to stand behind its figure; nothing where there is none."""
    return "" if interval is None else f" {_range(interval, scale=scale, digits=digits)}"


def _range(interval: list[float], *, scale: float = 1, digits: int = 2) -> str:
    return "[" + ", ".join(f"{scale * end:.{digits}f}" for end in interval) + "]"


def _signed(difference: dict[str, Any]) -> str:
    low, high = difference["interval"]
    return f"{100 * difference['value']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(Column(), Column(overflow="fold"), show_header=False, box=SIMPLE)
    for name, value in rows:
        table.add_row(escape(escape_controls(name)), escape(escape_controls(value)))
    _print(title)
    _print_table(table)


def _print_table(table: Table) -> None:
    _console().print(table)


def _console() -> Console:
    console = Console(emoji=False)
    return console if console.is_terminal else Console(width=PIPED_WIDTH, emoji=False)


def _print(line: str) -> None:
    Console(soft_wrap=True, emoji=False).print(escape_controls(line), markup=False, highlight=False)
