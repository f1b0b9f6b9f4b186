"""The README's quickstarts print what it says they do."""

import contextlib
import io
import os
import re
import shlex
from itertools import groupby
from pathlib import Path

import pytest
from typer.testing import CliRunner

from csalign.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def sessions(block: str) -> list[tuple[list[str], list[str]]]:
    """The words of each command of a console block, and the lines that it prints."""
    found: list[tuple[list[str], list[str]]] = []
    lines = iter(block.splitlines())
    for line in lines:
        if not line.startswith("$ "):
            found[-1][1].append(line)
            continue
        while line.endswith("\\"):
            line = line[:-1] + next(lines)
        found.append((shlex.split(line[2:]), []))
    return found


def shape(line: str) -> str:
    """A line without its numbers, rules and runs of spaces."""
    return " ".join(NUMBER.sub("#", re.sub("[─━]+", "", line)).split())


def numbers(line: str) -> list[float]:
    """The numbers of a line, but for seconds, which are the machine's."""
    line = re.sub(r"[\d.]+ s\b", "", line)
    return [float(number.replace(",", "")) for number in NUMBER.findall(line)]


def close(found: float, expected: float) -> bool:
    """Training repeats on one machine, but early stopping may differ between machines."""
    return abs(found - expected) <= 0.25 * abs(expected) + (1 if abs(expected) >= 1 else 0.05)


def check(expected: list[str], printed: str) -> None:
    """Check that the lines are printed in this order; ``...`` stands for any lines between."""
    found = [line for line in printed.splitlines() if shape(line)]
    for _, group in groupby(expected, lambda line: line.strip() == "..."):
        lines = [line for line in group if shape(line)]
        if lines == ["..."]:
            continue
        shapes = [shape(line) for line in lines]
        starts = [
            start
            for start in range(len(found))
            if [shape(line) for line in found[start : start + len(lines)]] == shapes
        ]
        assert starts, f"{lines} not in\n{printed}"
        for want, line in zip(lines, found[starts[0] :], strict=False):
            pairs = zip(numbers(line), numbers(want), strict=True)
            assert all(close(*pair) for pair in pairs), f"{line}\nis not about\n{want}"
        found = found[starts[0] + len(lines) :]


@pytest.fixture(autouse=True)
def as_after_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder but for the sample data."""
    (tmp_path / "sample_data").symlink_to(ROOT / "sample_data")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", blocks("console"))
def test_the_commands_print_what_the_readme_says(block: str) -> None:
    for words, expected in sessions(block):
        assert words[0] == "csalign"
        environment = {"COLUMNS": "80"}
        result = CliRunner().invoke(app, words[1:], env=environment, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        check(expected, result.output)


def test_python_prints_what_the_readme_says() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    (expected,) = blocks("text")

    check(expected.splitlines(), printed.getvalue())


def test_every_file_that_the_readme_links_is_there() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target
    assert os.access(ROOT / "sample_data" / "demo.sh", os.X_OK)
