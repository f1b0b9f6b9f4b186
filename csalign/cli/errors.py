"""Expected errors as lines on stderr and exit codes, whatever became of the streams."""

import logging
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import wrap
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from csalign.cli import render
from csalign.cli.progress import line_start
from csalign.core import atomic
from csalign.core.config import did_you_mean
from csalign.core.errors import ConfigError, CsalignError, ElsewhereError, Stopped
from csalign.core.paths import is_store_error

# Typer brings click along or depends on it, by version; of its errors it exports this one alone.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """The group of all commands, which prints mistakes of the command line as csalign's errors."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command and exit with its code."""
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
        except _UsageError as error:
            _print_error(Console(stderr=True, soft_wrap=True, emoji=False), _usage(error), 0)
            code = ConfigError.exit_code
        sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> str:
    """Say what is wrong with a command line, and what may have been meant."""
    message = re.sub(r"^Option '(.*?)' requires .*", r"\1 needs a value", error.format_message())
    message = re.sub(r"^Option '(.*?)' does", r"\1 does", message).rstrip(".")
    if error.ctx is None:
        return message
    command, path = error.ctx.command, error.ctx.command_path
    if hasattr(error, "possibilities"):  # an unknown option
        shown = [param for param in command.params if not param.hidden]
        known = {name.lstrip("-") for param in shown for name in param.opts}
        hint = did_you_mean(error.option_name.lstrip("-"), sorted(known), "--")
        see = f"; see {path} --help{'' if hasattr(command, 'commands') else '-all'}"
        return f"{error.option_name}: no such option{hint or see}"
    if found := re.match(r"No such command '(.*?)'", message):
        hint = did_you_mean(found[1], command.commands) or "; see csalign --help"
        return f"{found[1]}: no such command{hint}"
    if found := re.match(r"Got unexpected extra argument\S* \((.*)\)$", message):
        arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
        if query := error.ctx.params.get("query"):
            quoted = shlex.join([*path.split(), error.ctx.params["index"], f"{query} {found[1]}"])
            return f"{found[1]}: unexpected argument; quote the query: {quoted}"
        usage = " ".join([path, *arguments, "[OPTIONS]"])
        return f"{found[1]}: unexpected argument; the usage is {usage}"
    return message


@contextmanager
def error_exits(*, quiet: bool, verbose: int) -> Iterator[Console]:
    """Set up logging, and print expected errors as one or two lines with their exit code.

    Anything else is a bug and keeps its traceback. Yields the console on stderr.

    Raises:
        typer.Exit: with the exit code of an expected error or of a signal.
    """
    console = Console(stderr=True, soft_wrap=True, emoji=False)
    _set_up_logging(console, quiet=quiet, verbose=verbose)
    try:
        yield console
    except ElsewhereError as error:
        raise typer.Exit(error.exit_code) from None
    except (CsalignError, Stopped) as error:
        _print_error(console, str(error), verbose)
        raise typer.Exit(error.exit_code) from None
    except (BrokenPipeError, SystemExit) as error:
        is_broken = isinstance(error, BrokenPipeError)
        if not is_broken and not isinstance(error.__context__, BrokenPipeError):
            raise  # Rich leaves with 1 at a broken pipe
        # The reader of our stdout went away, as in `| head`; exit as SIGPIPE would.
        _drop_stdout()
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except Exception as error:
        if isinstance(error, OSError):
            message = atomic.os_error(error)
            if error.filename == render.STDOUT:
                message = message.partition(", or choose another --out")[0]
                _drop_stdout()
        elif is_store_error(error):
            message = f"the object store failed: {error}; check its address and keys"
        else:
            raise
        _print_error(console, message, verbose)
        raise typer.Exit(1) from None


def _drop_stdout() -> None:
    """Discard unwritten output, which Python would try to write once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(console: Console, message: str, verbose: int) -> None:
    if verbose >= 2:
        console.print(traceback.format_exc(), markup=False, highlight=False)
    for line in message.splitlines():
        _print_line(console, f"csalign: {render.escape_controls(line)}", "red")


def _print_line(console: Console, text: str, style: str | None) -> None:
    """Print a line; on a terminal it is wrapped between words, of which none is broken."""
    lines = [text]
    if console.is_terminal:
        lines = wrap(text, console.width, break_long_words=False, break_on_hyphens=False)
    for line in lines:
        console.print(line, style=style, markup=False, highlight=False)


class _StderrHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        label = line_start(self._console) + ("warning: " if is_warning else "")
        text = label + render.escape_controls(record.getMessage())
        _print_line(self._console, text, "yellow" if is_warning else None)


def _set_up_logging(console: Console, *, quiet: bool, verbose: int) -> None:
    level = (logging.INFO, logging.DEBUG)[min(verbose, 1)]
    handler = _StderrHandler(console)
    handler.setLevel(logging.ERROR if quiet else level)  # documents have the warnings anyway
    logger = logging.getLogger("csalign")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    if not verbose:
        warnings.simplefilter("ignore")  # of libraries; csalign's own go through the logger
