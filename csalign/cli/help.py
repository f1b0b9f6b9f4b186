"""The help of commands: the common options, or all of them, by panel."""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from csalign.cli.errors import error_exits
from csalign.cli.layout import JOINT, term_lines, wrap
from csalign.cli.options import COMMON, GENERAL
from csalign.cli.render import to_stdout

MOST_COLUMNS = 120
NAMES = 30  # columns of names; text beside a longer name begins on the next line
_NOTE = re.compile(r"\((?:default: [^()]*|required)\)$")
_NAME = re.compile(r"^ {2,6}\S.*?(?=   |$)")


def show_help(context: typer.Context, *, everything: bool = False, code: int = 0) -> None:
    """Print the help of a command and leave.

    Raises:
        typer.Exit: always.
    """
    with error_exits(quiet=False, verbose=0), to_stdout():
        console = Console(highlight=False, emoji=False)
        width = min(console.width, MOST_COLUMNS)
        for line in _lines(context, everything=everything, width=width):
            console.print(line, soft_wrap=True)
    raise typer.Exit(code)


def _option(*names: str, help: str, everything: bool) -> Any:
    def callback(context: typer.Context, wanted: bool) -> None:
        if wanted:
            show_help(context, everything=everything)

    return typer.Option(
        *names, help=help, callback=callback, is_eager=True, rich_help_panel=GENERAL
    )


Help = Annotated[bool, _option("--help", "-h", help="Show this help.", everything=False)]
HelpAll = Annotated[bool, _option("--help-all", help="Show all options.", everything=True)]


def _lines(context: typer.Context, *, everything: bool, width: int) -> Iterator[Text]:
    command: Any = context.command
    params = [param for param in command.params if not param.hidden]
    arguments = [param for param in params if param.param_type_name == "argument"]
    subcommands: dict[str, Any] = getattr(command, "commands", {})
    usage = ["COMMAND"] if subcommands else [param.metavar for param in arguments]
    line = " ".join([context.command_path, *usage, "[OPTIONS]"])
    yield Text.assemble(("Usage: ", "yellow"), (line, "bold"))
    yield Text()
    yield from map(Text, wrap(command.help or "", width))
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, own in subcommands.items():
        if not own.hidden:
            groups.setdefault(own.rich_help_panel, []).append((name, own.help or ""))
    for param in params:
        panel = "Arguments" if param in arguments else param.rich_help_panel or GENERAL
        name = param.metavar if param in arguments else _names(param)
        groups.setdefault(panel, []).append((name, param.help or ""))
    hidden = 0
    for title, rows in groups.items():
        if everything or COMMON not in groups or title in ("Arguments", COMMON, GENERAL):
            yield Text()
            yield Text(title, "bold")
            yield from _rows(rows, width)
        else:
            hidden += len(rows)
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
    """Lay out names and texts in two columns."""
    joined = [(name, _NOTE.sub(lambda n: n[0].replace(" ", JOINT), own)) for name, own in rows]
    for line in term_lines(joined, width, NAMES):
        text = Text(line)
        text.highlight_regex(_NAME, "cyan")
        text.highlight_regex(_NOTE, "dim")
        yield text
