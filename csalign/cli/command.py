"""Commands from functions: options, logging, progress, results, and errors as exit codes."""

import inspect
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import typer
from rich.console import Console

from csalign.cli import render
from csalign.cli.options import ConfigFile, Json, Quiet, Verbose, given_values, parameters_of
from csalign.cli.progress import shown_progress
from csalign.core import atomic, distributed
from csalign.core.config import Config
from csalign.core.errors import ConfigError, CsalignError, DataError, ElsewhereError, Stopped
from csalign.core.paths import is_store_error
from csalign.core.results import Progress

C = TypeVar("C", bound=Config)
R = TypeVar("R")


def command_of(
    config: type[C], show: Callable[[R, C], None], *, distributable: bool = False
) -> Callable[[Callable[[C, Progress], R]], Callable[..., None]]:
    """Decorate a function of a config and a progress callback, making it a command.

    Args:
        config: its fields become options, beside ``--config``, ``--json``, ``-q`` and ``-v``.
        show: prints a result, got with some settings, for people.
        distributable: whether processes that torchrun starts run the command together; the main
            one alone prints.
    """

    def decorate(function: Callable[[C, Progress], R]) -> Callable[..., None]:
        def run(
            config_file: ConfigFile = None,
            json: Json = False,
            quiet: Quiet = False,
            verbose: Verbose = 0,
            **options: Any,
        ) -> None:
            is_follower = distributable and distributed.world_from_environment().rank > 0
            quiet = quiet or is_follower
            with (
                error_exits(quiet=quiet, verbose=verbose) as console,
                distributed.process_group() if distributable else nullcontext(),
            ):
                settings = config.resolve(config_file, given_values(options))
                if json and getattr(settings, "jsonl", False):
                    raise ConfigError("--json and --jsonl: are two formats; pass one of them")
                with (
                    _naming_urls(value for _, value in settings),
                    shown_progress(console, quiet=quiet) as progress,
                ):
                    result = function(settings, progress)
                if not is_follower:
                    render.show(result, show, settings, as_json=json, quiet=quiet)

        common = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(run).parameters.items()
            if name != "options"
        ]
        parameters = [*parameters_of(config), *common]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


@contextmanager
def error_exits(*, quiet: bool, verbose: int) -> Iterator[Console]:
    """Set up logging, and print expected errors as one or two lines with their exit code.

    Anything else is a bug and keeps its traceback.

    Yields:
        The console on stderr.

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
    except BrokenPipeError:
        # The reader of our stdout went away, as in `| head`; exit as SIGPIPE would.
        _drop_stdout()
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.filename == render.STDOUT:
            _drop_stdout()
        _print_error(console, atomic.os_error(error), verbose)
        raise typer.Exit(1) from None
    except Exception as error:
        if not is_store_error(error):
            raise
        message = f"the object store failed: {error}; check its address and keys"
        _print_error(console, message, verbose)
        raise typer.Exit(1) from None


def _drop_stdout() -> None:
    """Discard unwritten output, which Python would try to write once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _naming_urls(places: Iterable[Any]) -> Iterator[None]:
    """Raise an object store's error as a DataError with the URLs among `places`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        is_nameless = isinstance(error, OSError) and error.filename is None
        urls = [str(place) for place in places if "://" in str(place)]
        if not urls or not (is_nameless or is_store_error(error)):
            raise
        raise DataError(atomic.os_error(error, " or ".join(urls))) from error


def _print_error(console: Console, message: str, verbose: int) -> None:
    if verbose >= 2:
        console.print(traceback.format_exc(), markup=False, highlight=False)
    text = f"csalign: {render.escape_controls(message)}"
    console.print(text, markup=False, highlight=False, style="red")


class _StderrHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        label = "warning: " if is_warning else ""
        self._console.print(
            f"csalign: {label}{render.escape_controls(record.getMessage())}",
            style="yellow" if is_warning else None,
            markup=False,
            highlight=False,
        )


def _set_up_logging(console: Console, *, quiet: bool, verbose: int) -> None:
    level = logging.ERROR if quiet else (logging.INFO, logging.DEBUG)[min(verbose, 1)]
    logger = logging.getLogger("csalign")
    logger.handlers = [_StderrHandler(console)]
    logger.setLevel(level)
    logger.propagate = False
    if not verbose:
        warnings.simplefilter("ignore")  # of libraries; csalign's own go through the logger
