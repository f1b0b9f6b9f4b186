"""Makes a command out of a step: its options, its progress, its result."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from csalign.cli import render
from csalign.cli.options import ConfigFile, Json, Quiet, Verbose, parameters_of
from csalign.cli.progress import shown_progress
from csalign.cli.run import command, naming
from csalign.core import distributed
from csalign.core.config import Config
from csalign.core.progress import Progress

C = TypeVar("C", bound=Config)
R = TypeVar("R")


def step_command(
    config: type[C], show: Callable[[R], None], *, together: bool = False
) -> Callable[[Callable[[C, Progress], R]], Callable[..., None]]:
    """Decorate a function that runs a step, giving it the command line of the step's config.

    Args:
        config: its fields become options, beside ``--config``, ``--json``, ``-q`` and ``-v``.
        show: prints a result for people.
        together: whether processes that torchrun starts do the step together; the first of them
            then speaks for all.
    """

    def decorate(run_step: Callable[[C, Progress], R]) -> Callable[..., None]:
        def run(
            config_file: ConfigFile = None,
            json: Json = False,
            quiet: Quiet = False,
            verbose: Verbose = 0,
            **options: Any,
        ) -> None:
            given = {name: value for name, value in options.items() if value is not None}
            follows = together and distributed.world_from_environment().rank > 0
            quiet = quiet or follows
            with (
                command(quiet=quiet, verbose=verbose) as console,
                distributed.process_group() if together else nullcontext(),
            ):
                settings = config.resolve(config_file, given)
                places = [value for _, value in settings]
                with naming(places), shown_progress(console, quiet=quiet) as progress:
                    result = run_step(settings, progress)
                if not follows:
                    render.show(result, show, as_json=json)

        common = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(run).parameters.items()
            if name != "options"
        ]
        parameters = [*parameters_of(config), *common]
        run.__name__, run.__doc__ = run_step.__name__, run_step.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
