"""Print results to stdout, as tables or as JSON; nothing else prints there."""

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

from csalign.core import results
from csalign.core.calls import CALL_KEYS
from csalign.core.enums import renamed

R = TypeVar("R")
STDOUT = "stdout"
# Without a terminal a table must not be squeezed into Rich's 80 columns.
PIPED_WIDTH = 160
TRIALS_SHOWN = 10
VALIDATED = {"start": "start", "kept": "best", "matched": "moments matched"}


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def escape_controls(text: str) -> str:
    r"""Escape what a terminal would interpret in text of unknown origin, as ``\x1b``."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


@contextmanager
def to_stdout() -> Iterator[None]:
    """Name stdout in the error of a write to it.

    Raises:
        OSError: stdout cannot be written.
    """
    try:
        yield
        sys.stdout.flush()  # here, where a full disk can still be reported
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, STDOUT) from error


def show(result: R, table: Callable[[R], None], *, as_json: bool) -> None:
    """Print a result as one JSON document, or as tables."""
    with to_stdout():
        print_json(result) if as_json else table(result)


def print_json(result: Any) -> None:
    """Print a document or a result as one JSON document."""
    document = result if isinstance(result, dict) else result.to_json()
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def features_table(result: results.FeaturesResult) -> None:
    """Print the counts of a feature set."""
    counts = renamed(f"{result.images:,} images, {result.texts:,} texts", result.names)
    print_line(
        f"{result.features}: {counts}, {result.pairs:,} pairs"
        + (f", {result.failures:,} inputs skipped (see failures.jsonl)" if result.failures else "")
        + ("" if result.complete else "; waiting for other shards")
    )


def train_table(result: results.TrainResult) -> None:
    """Print what was trained, and its validation metrics."""
    parameters = ", ".join(
        f"{renamed(side, result.names)} {count:,}" for side, count in result.parameters.items()
    )
    rows = [
        ("start", result.start),
        ("pairs", ", ".join(f"{part} {count:,}" for part, count in result.pairs.items())),
        ("parameters", parameters),
        ("steps", f"{result.steps:,} in {result.seconds:.1f} s"),
        ("best", f"step {result.best_step:,}" if result.best_step else "start (no step beat it)"),
    ]
    for name, score in result.validation.items():
        rows.append(
            (
                f"validation, {VALIDATED[name]}",
                f"mean recall {percent(score['mean_recall'])}, "
                f"centroid distance {score['centroid_distance']:.4f}",
            )
        )
    print_rows(str(result.run), rows)


def generate_table(result: results.GenerateResult) -> None:
    """Print what was generated."""
    reused = f", {result.reused:,} of them from an earlier call" if result.reused else ""
    print_line(
        f"{result.out}: {result.images:,} images{reused}, by {result.decoder} from embeddings "
        f"of norm {result.scale:.4g} (that of {result.scale_from})"
    )


def tune_tables(result: results.TuneResult) -> None:
    """Print the best trials and the default, then how to judge the winner."""
    there = result.validation
    states = [trial.state for trial in result.trials]
    rest = [f"{states.count(state)} {state}" for state in ("pruned", "failed") if state in states]
    print_line(
        f"{result.study}: {', '.join([f'{len(states)} trials', *rest])}; measured on "
        f"{there['name']}: {there['images']:,} images, {there['texts']:,} texts"
    )
    best = result.trials[result.best]
    complete = [trial for trial in result.trials if trial.state == "complete"]
    complete.sort(key=lambda trial: (trial is not best, -(trial.mean_recall or 0), trial.number))
    shown = [t for i, t in enumerate(complete) if i < TRIALS_SHOWN or t.number == 0]
    names = [_trial_name(trial) for trial in shown]
    figures = {
        "mean recall": [percent(trial.mean_recall or 0) for trial in shown],
        "vs default": [_to_default(trial, "mean_recall") for trial in shown],
        "centroid": [f"{trial.centroid_distance:.4f}" for trial in shown],
        "CS": [f"{trial.cs_divergence:.4f}" for trial in shown],
        "best": [f"step {trial.best_step}" if trial.best_step else "start" for trial in shown],
        "seconds": [f"{trial.seconds:.1f}" for trial in shown],
    }
    # The name of the closed form says its steps.
    searched = dict.fromkeys(name for trial in shown for name in trial.settings if name != "steps")
    settings = {
        name.replace("_", "-"): [_setting(trial.settings.get(name)) for trial in shown]
        for name in searched
    }
    one = column_table(names, figures | settings)
    for table in (
        [one] if fits(one) else [column_table(names, figures), column_table(names, settings)]
    ):
        print_table(table)
    for line in _tune_verdict(result, best):
        print_line(line)


def _trial_name(trial: results.Trial) -> str:
    role = {0: ", the default"}.get(trial.number, "")
    return f"{trial.number}{role or (', the closed form' if trial.steps == 0 else '')}"


def _to_default(trial: results.Trial, figure: str) -> str:
    return signed(trial.difference[figure]) if trial.difference else ""


def _setting(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _tune_verdict(result: results.TuneResult, best: results.Trial) -> Iterator[str]:
    if best.number == 0:
        yield f"No trial beat the default, whose settings are in {result.config}."
        return
    yield f"Trial {best.number} is the best; its settings are in {result.config}."
    if best.difference:
        low, high = best.difference["mean_recall"]["interval"]
        judged = "within chance" if low <= 0 <= high else "more than chance"
        gap = best.difference["centroid_distance"]
        yield (
            f"Versus the default: mean recall {_to_default(best, 'mean_recall')} points, "
            f"{judged} on these images; centroid distance {gap['value']:+.4f} "
            f"{bracketed(gap['interval'], digits=4)}."
        )
    yield (
        f"The best of {len(result.trials)} trials is biased upwards. Confirm it on a split that no "
        f"trial saw: csalign train --config {result.config} --out RUN, then csalign compare RUN "
        "with a run of the defaults."
    )


def recipes_table(titles: dict[str, str]) -> None:
    """Print the recipes and their purpose."""
    print_rows("csalign train --recipe NAME; csalign recipes NAME prints it", list(titles.items()))


def inspect_table(document: dict[str, Any]) -> None:
    """Print the summary of an artifact, one line per value."""
    body = {
        key: value for key, value in document.items() if key not in ("kind", "path", *CALL_KEYS)
    }
    for line in body.pop("validation", []):
        body[f"validation, step {line['step']}"] = line["validation"]
    names = body.pop("names", None)
    rows = [(renamed(name, names), value) for name, value in leaves(body)]
    kind = "feature set" if document["kind"] == "features" else document["kind"]
    print_rows(f"{document['path']}: {kind}, valid", rows)


def index_table(document: dict[str, Any]) -> None:
    """Print what was built."""
    recall, names = document["recall"], document.get("names")
    quality = "exact search"
    if recall is not None:
        quality = (
            f"recall@10 {percent(recall['value'])} on {recall['queries']:,} "
            f"{renamed(recall['of'], names)}"
        )
    print_line(
        f"{document['path']}: {document['factory']} index of {document['rows']:,} "
        f"{renamed(document['side'] + 's', names)}, {document['bytes'] / 1e6:,.1f} MB, {quality}"
    )


def export_table(document: dict[str, Any]) -> None:
    """Print the files of an export, and how much its outputs differ from the run's."""
    largest = max(document["differences"].values())
    print_line(
        f"{document['out']}: {', '.join(document['files'])}; outputs differ from the run by at "
        f"most {largest:.1e}"
    )


def found(result: results.Found) -> None:
    """Print search results as tables or JSON lines, each query as soon as it is answered."""
    if result.jsonl:
        _found_lines(result)
    else:
        _found_tables(result)


def _found_tables(result: results.Found) -> None:
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
        print_line(one["query"])
        print_table(table)


def _found_lines(result: results.Found) -> None:
    for one in result.queries:
        sys.stdout.write(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()


def figure_table(first: str, *names: str) -> Table:
    """Build a table of names in the first column and numbers in the others."""
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    return Table(Column(first, overflow="fold"), *columns, box=SIMPLE)


def column_table(names: list[str], cells: dict[str, list[str]]) -> Table:
    """Build a table of names and of columns by title."""
    table = figure_table("", *cells)
    for name, *row in zip(names, *cells.values(), strict=True):
        table.add_row(name, *row)
    return table


def fits(table: Table) -> bool:
    """Return whether a table fits the width of stdout."""
    console = _console()
    unbounded = console.options.update(max_width=1_000)
    return Measurement.get(console, unbounded, table).maximum <= console.width


def leaves(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name and the value of everything in a nested document, except None."""
    for key, value in document.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from leaves(value, f"{name}, ")
        elif value is not None:
            yield name, f"{value:,.4g}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    """Format a fraction in percent."""
    return f"{100 * share:.2f} %"


def plus_minus(error: float | None) -> str:
    """Format a standard error; empty for an exact value."""
    return "" if error is None else f" ± {error:.2g}"


def beside(interval: list[float] | None, *, scale: float = 1, digits: int = 2) -> str:
    """Format an interval; empty if there is none."""
    return "" if interval is None else f" {bracketed(interval, scale=scale, digits=digits)}"


def bracketed(interval: list[float], *, scale: float = 1, digits: int = 2) -> str:
    """Format an interval as ``[low, high]``."""
    return "[" + ", ".join(f"{scale * end:.{digits}f}" for end in interval) + "]"


def signed(difference: dict[str, Any]) -> str:
    """Format a difference of recalls in points, with its interval."""
    low, high = difference["interval"]
    return f"{100 * difference['value']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a title and a table of names and values."""
    table = Table(Column(), Column(overflow="fold"), show_header=False, box=SIMPLE)
    for name, value in rows:
        table.add_row(escape(escape_controls(name)), escape(escape_controls(value)))
    print_line(title)
    print_table(table)


def print_table(table: Table) -> None:
    """Print a table to stdout."""
    _console().print(table)


def _console() -> Console:
    console = Console(emoji=False)
    return console if console.is_terminal else Console(width=PIPED_WIDTH, emoji=False)


def print_line(line: str) -> None:
    """Print a line to stdout, escaped and unwrapped."""
    Console(soft_wrap=True, emoji=False).print(escape_controls(line), markup=False, highlight=False)
