"""Progress as a person sees it: live on a terminal, in lines with the time in a log."""

import re
import time
from io import StringIO

import pytest
from rich.console import Console

from csalign.cli.progress import Phase, format_rate, shown_progress
from csalign.core.progress import duration, reported_to, show_figures, tick, track, within

FIGURES = {
    "loss": "1.98 (pairwise 1.79, others 1.80, divergence 0.0034)",
    "val R": "22.3 % (best 22.8 % at step 30)",
    "gap": "0.12",
}
LINE = re.compile(r"\d\d:\d\d:\d\d (.*)")


def terminal() -> Console:
    return Console(force_terminal=True, width=80, file=StringIO(), color_system=None)


def log() -> Console:
    return Console(force_terminal=False, width=80, file=StringIO(), soft_wrap=True)


def written(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def lines_of(console: Console) -> list[str]:
    found = [LINE.fullmatch(line) for line in written(console).splitlines()]
    assert all(found), written(console)
    return [match[1] for match in found if match]


def on_screen(text: str) -> list[str]:
    """Return the lines that a terminal shows after this output."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part[0] == "\x1b":
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] = part
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "0 s"), (42, "42 s"), (59.7, "1m00s"), (112, "1m52s"), (7_500, "2h05m")],
)
def test_times_are_for_people(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("rate", "unit", "shown"),
    [
        (53_900.0, "rows", "53,900 rows/s"),
        (1_057.4, "rows", "1,057 rows/s"),
        (5.39, "step", "5.4 step/s"),
        (0.48, "step", "0.48 step/s"),
        (0.04, "rows", "25 s/row"),
    ],
)
def test_rates_are_for_people(rate: float, unit: str, shown: str) -> None:
    assert format_rate(rate, unit) == shown


def test_rate_and_time_left_are_of_this_process() -> None:
    phase = Phase("training: step", began=100, first=11, done=66, total=120)

    assert phase.pace(200) == ["0.55 step/s", "1m38s left"]
    assert Phase("matching", 100, 0, 0, None).pace(112) == ["12 s"]


@pytest.mark.parametrize(
    "what", ["training: step", "run-a (1/2), bootstrap of both: resamples", "gap"]
)
def test_a_terminal_shows_the_phase_in_full_lines_and_is_cleared(what: str) -> None:
    console = terminal()
    with shown_progress(console, quiet=False) as progress:
        progress("reading: rows", 5, 10)
        progress(what, 66, 120)
        show_figures(FIGURES)
        shown = progress.render().plain.splitlines()  # type: ignore[attr-defined]
        console.print("csalign: a message")

    assert all(len(line) <= 80 for line in shown)
    name, _, unit = what.partition(": ")
    assert shown[0].startswith(name)
    assert f"{unit} 66/120".strip() in shown[0]
    for figure in FIGURES.items():
        assert sum(" ".join(figure) in line for line in shown) == 1
    assert "reading" not in "".join(shown)
    assert on_screen(written(console)) == ["csalign: a message"]


def test_a_terminal_without_unicode_gets_a_plain_bar() -> None:
    class Ascii(StringIO):
        encoding = "ascii"

    console = Console(force_terminal=True, width=80, file=Ascii(), color_system=None)
    with shown_progress(console, quiet=False) as progress:
        progress("training: step", 60, 120)
        (shown,) = progress.render().plain.splitlines()  # type: ignore[attr-defined]

    assert shown.isascii()
    assert shown.startswith("training  ============------------  step 60/120")


def test_a_log_has_a_line_per_notable_figure_and_long_phase_with_the_time() -> None:
    console = log()
    with shown_progress(console, quiet=False):
        tick("reading: rows", 5, 10)
        tick("training: step", 66, 120)
        show_figures({"loss": "2.00"})
        show_figures(FIGURES, notable=True)
        tick("matching")
        time.sleep(2)

    validated, matching, done = lines_of(console)
    figures = "loss 1.98  val R 22.3 % (best 22.8 % at step 30)  gap 0.12"
    assert validated == f"training: step 66/120  {figures}"
    assert matching.startswith("matching  ")
    assert done == "done in 2 s"


def test_a_log_has_about_ten_lines_of_a_phase_each_within_100_columns() -> None:
    console = log()
    with shown_progress(console, quiet=False):
        for step in range(101):
            tick("training: step", step, 100)
            show_figures(FIGURES, notable=True)

    lines = lines_of(console)
    assert len(lines) == 11
    assert lines[0].startswith("training: step 0/100  loss 1.98  val R 22.3 % (best")
    assert lines[-1].startswith("training: step 100/100  ")
    assert max(map(len, written(console).splitlines())) <= 100


def test_a_short_or_failed_command_leaves_nothing_in_a_log() -> None:
    console = log()
    with shown_progress(console, quiet=False) as progress:
        progress("reading: rows", 5, 10)
    with pytest.raises(ValueError, match="wrong"), shown_progress(console, quiet=False):
        raise ValueError("wrong")
    with shown_progress(console, quiet=True):
        show_figures(FIGURES, notable=True)

    assert written(console) == ""


def test_parts_of_a_phase_are_named_after_it_and_keep_their_figures() -> None:
    console = terminal()
    with shown_progress(console, quiet=False) as progress, reported_to(within("trial 3 of 50")):
        assert list(track("ab", "training: step", 2)) == ["a", "b"]
        show_figures({"loss": "1.98"}, notable=True)
        shown = progress.render().plain  # type: ignore[attr-defined]

    assert shown.startswith("trial 3 of 50, training  ")
    assert "step 2/2" in shown
    assert "loss 1.98" in shown


def test_nothing_is_reported_outside_of_a_command() -> None:
    tick("reading: rows", 5, 10)
    show_figures(FIGURES)
