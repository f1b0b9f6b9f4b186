"""Print to stdout: JSON, lines and tables; nothing else prints there."""

import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from csalign.cli.layout import Columns, table_lines, term_lines, wrap
from csalign.core.config import Config

R = TypeVar("R")
C = TypeVar("C", bound=Config)
STDOUT = "stdout"
PIPED_WIDTH = 160  # of tables without a terminal

_QUIET = ContextVar("quiet", default=False)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed
_ASCII = str.maketrans({"↑": "^", "↓": "v", "±": "+/-", "─": "-", "…": "...", "é": "e"})


def escape_controls(text: str) -> str:
    r"""Escape what a terminal would interpret in text of unknown origin, as ``\x1b``."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def printable(text: str) -> str:
    r"""Escape controls, and what the encoding of stdout lacks: signs in ASCII, others as ``\xe9``.

    Tabs and line feeds become spaces.
    """
    line, encoding = escape_controls(re.sub(r"\s", " ", text)), _encoding()
    if not encoding.lower().startswith("utf"):
        line = line.translate(_ASCII)
    return line.encode(encoding, "backslashreplace").decode(encoding)


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


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


def show(
    result: R, table: Callable[[R, C], None], settings: C, *, as_json: bool, quiet: bool = False
) -> None:
    """Print a result as one JSON document, or as tables; if quiet, without what to do next."""
    _QUIET.set(quiet)
    with to_stdout():
        print_json(result) if as_json else table(result, settings)


def print_json(result: Any, indent: int | None = 2) -> None:
    """Print a document or a result as one JSON document; in ASCII where stdout is not Unicode."""
    document = result.to_json() if hasattr(result, "to_json") else dict(result)
    is_utf8 = _encoding().lower().startswith("utf")
    text = json.dumps(document, indent=indent, ensure_ascii=not is_utf8, allow_nan=False)
    if not text.isascii() and text != text.encode(errors="ignore").decode():  # half a surrogate
        text = json.dumps(document, indent=indent, allow_nan=False)
    sys.stdout.write(text + "\n")


def screen_width() -> int | None:
    """Return the width of the terminal, or $COLUMNS; None if stdout goes elsewhere."""
    return Console().width if "COLUMNS" in os.environ or sys.stdout.isatty() else None


def print_line(line: str = "", style: str = "") -> None:
    """Print a line to stdout, escaped and unwrapped."""
    Console(soft_wrap=True, emoji=False, highlight=False).print(Text(printable(line), style=style))


def print_title(title: str) -> None:
    """Print a title after an empty line."""
    print_line()
    print_line(title, "bold")


def print_table(labels: Sequence[str], columns: Columns) -> None:
    """Print a table of figures, fitted to the screen; see `layout.table_lines`."""
    cleaned = {printable(title): [*map(printable, cells)] for title, cells in columns.items()}
    for line in table_lines([*map(printable, labels)], cleaned, screen_width() or PIPED_WIDTH):
        print_line(line)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print names with texts, which are wrapped on a screen."""
    cleaned = [(printable(name), printable(text)) for name, text in rows]
    for line in term_lines(cleaned, screen_width()):
        print_line(line)


def print_wrapped(text: str) -> None:
    """Print a paragraph, wrapped on a screen."""
    for line in wrap(printable(text), screen_width()):
        print_line(line)


def print_wrote(what: str) -> None:
    """Print what was written and what is in it."""
    print_line(what if _QUIET.get() else f"wrote {what}", "bold")


def print_closing(settings: Config | None, *following: Sequence[object] | str) -> None:
    """Print which pages were written and what to do next: commands by words, or sentences."""
    if not _QUIET.get():
        steps = [step if isinstance(step, str) else f"next: {command(*step)}" for step in following]
        page = getattr(settings, "report", None)
        for line in [*([f"wrote {page}"] if page else []), *steps]:
            print_line(line)


def command(*words: object) -> str:
    """Word a command of csalign as one types it."""
    return shlex.join(["csalign", *(str(word) for word in words)])


def is_verbose() -> bool:
    """Return whether more is to be printed (-v)."""
    return logging.getLogger("csalign").isEnabledFor(logging.DEBUG)
