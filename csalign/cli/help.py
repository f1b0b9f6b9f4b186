"""The help of commands: the common options, or all of them, by panel."""

import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from csalign.cli.errors import error_exits
from csalign.cli.options import COMMON, GENERAL
from csalign.cli.render import to_stdout

MOST_COLUMNS = 120
NAMES = 30  # columns of names; text beside a longer name begins on the next line
_NOTE = re.compile(r"(?:^| )\((?:default: [^()]*|required)\)$")


def show_help(context: typer.Context, *, everything: bool = False, code: int = 0) -> None:
    """Print the help of a command and leave.

    Args:
        context: of the command.
        everything: whether to print all options where the command has common ones.
        code: exit code.

    Raises:
        typer.Exit: always.
    """
    with error_exits(quiet=False, verbose=0), to_stdout():
        console = Console(highlight=False, emoji=False)
        width = min(console.width, MOST_COLUMNS)
        for line in _lines(context, everything=everything, width=width):
            console.print(line, soft_wrap=True)
    raise typer.Exit(code)


def _show_short(context: typer.Context, wanted: bool) -> None:
    if wanted:
        show_help(context)


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        show_help(context, everything=True)


def _option(*names: str, help: str, callback: Any) -> Any:
    return typer.Option(
        *names, help=help, callback=callback, is_eager=True, rich_help_panel=GENERAL
    )


Help = Annotated[bool, _option("--help", "-h", help="Show this help.", callback=_show_short)]
HelpAll = Annotated[bool, _option("--help-all", help="Show all options.", callback=_show_all)]


def _lines(context: typer.Context, *, everything: bool, width: int) -> Iterator[Text]:
    command: Any = context.command
    shown = [param for param in command.params if not param.hidden]
    arguments = [param for param in shown if param.param_type_name == "argument"]
    panels: dict[str, list[Any]] = {}
    for param in shown:
        if param not in arguments:
            panels.setdefault(param.rich_help_panel or "Options", []).append(param)
    subcommands: dict[str, Any] = getattr(command, "commands", {})
    usage = ["COMMAND"] if subcommands else [param.metavar for param in arguments]
    yield Text.assemble(
        ("Usage: ", "yellow"), (" ".join([context.command_path, *usage, "[OPTIONS]"]), "bold")
    )
    yield Text()
    yield from map(Text, _wrapped(command.help or "", width))
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, own in subcommands.items():
        if not own.hidden:
            row = (name, (own.help or "").partition("\n\n")[0])
            groups.setdefault(own.rich_help_panel or "Commands", []).append(row)
    if arguments:
        groups["Arguments"] = [(param.metavar, param.help or "") for param in arguments]
    hidden = 0
    for panel, options in panels.items():
        if everything or COMMON not in panels or panel in (COMMON, GENERAL):
            groups[panel] = [(_names(param), param.help or "") for param in options]
        else:
            hidden += len(options)
    for title, rows in groups.items():
        yield Text()
        yield Text(title, "bold")
        yield from _rows(rows, width)
    if hidden:
        yield Text()
        yield Text(f"{hidden} more options: {context.command_path} --help-all", "bold")
    if command.epilog:
        yield Text()
        yield from map(Text, command.epilog.splitlines())


def _names(param: Any) -> str:
    """Return how an option is written: ``-o, --out PATH``; aliases follow the first long name."""
    short = [name for name in param.opts if not name.startswith("--")]
    long = next(name for name in param.opts if name.startswith("--"))
    names = f"{short[0]}, {long}" if short else f"    {long}"
    return f"{names} {param.metavar}" if param.metavar else names


def _rows(rows: Iterable[tuple[str, str]], width: int) -> Iterator[Text]:
    """Lay out names and texts in two columns; no word is broken."""
    rows = list(rows)
    column = min(NAMES, max(len(name) for name, _ in rows))
    for name, text in rows:
        lines = _wrapped(text, width - column - 4)
        first = lines.pop(0) if lines and len(name) <= column else ""
        head = Text("  ").append(name.ljust(column) if first else name, "cyan")
        yield head.append("  ").append_text(_dimmed(first)) if first else head
        indent = " " * (column + 4)
        yield from (Text(indent).append_text(_dimmed(line)) for line in lines)


def _dimmed(line: str) -> Text:
    text = Text(line)
    text.highlight_regex(_NOTE, "dim")
    return text


def _wrapped(text: str, width: int) -> list[str]:
    text = _NOTE.sub(lambda note: " " + note[0].strip().replace(" ", "\0"), text)
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]
