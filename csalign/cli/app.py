"""The ``csalign`` command: thin skins over the steps.

Each command imports its step when it runs, so that ``--help`` loads nothing heavy.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from csalign import __version__
from csalign.cli import render
from csalign.cli.options import ConfigFile, Json, Quiet, Verbose, options_of
from csalign.cli.progress import shown_progress
from csalign.cli.run import command
from csalign.config import ApplyConfig, EvalConfig, ExtractConfig, ImportConfig, TrainConfig
from csalign.errors import DataError

app = typer.Typer(
    name="csalign",
    help="Align two sets of embeddings: InfoNCE plus the Cauchy-Schwarz divergence.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # a local could be a huge tensor
    context_settings={"help_option_names": ["-h", "--help"]},
)

Given = dict[str, Any]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"csalign {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version)
    ] = False,
) -> None:
    pass


@app.command()
@options_of(ExtractConfig)
def extract(
    given: Given,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Encode images and captions with frozen encoders into a feature set."""
    with command(quiet=quiet, verbose=verbose) as console:
        settings = ExtractConfig.resolve(config, given)
        from csalign.steps.extract import extract

        with shown_progress(console, quiet=quiet) as progress:
            result = extract(settings, progress)
        render.print_json(result.to_json()) if json else render.features_table(result)


@app.command("import")
@options_of(ImportConfig)
def import_(
    given: Given,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Turn arrays of embeddings into a feature set."""
    with command(quiet=quiet, verbose=verbose) as console:
        settings = ImportConfig.resolve(config, given)
        from csalign.steps.import_arrays import import_arrays

        with shown_progress(console, quiet=quiet) as progress:
            result = import_arrays(settings, progress)
        render.print_json(result.to_json()) if json else render.features_table(result)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A feature set or a run.", metavar="PATH")],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Tell what is in an artifact, after checking all of it."""
    with command(quiet=quiet, verbose=verbose):
        from csalign.steps.inspect import inspect

        document = inspect(path)
        render.print_json(document) if json else render.inspect_table(document)


@app.command()
@options_of(TrainConfig)
def train(
    given: Given,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Train adapters on a feature set."""
    with command(quiet=quiet, verbose=verbose) as console:
        settings = TrainConfig.resolve(config, given)
        from csalign.steps.train import train

        with shown_progress(console, quiet=quiet) as progress:
            result = train(settings, progress)
        render.print_json(result.to_json()) if json else render.train_table(result)


@app.command()
@options_of(ApplyConfig)
def apply(
    given: Given,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Map a feature set through trained adapters into a feature set again."""
    with command(quiet=quiet, verbose=verbose) as console:
        settings = ApplyConfig.resolve(config, given)
        from csalign.steps.apply import apply

        with shown_progress(console, quiet=quiet) as progress:
            result = apply(settings, progress)
        render.print_json(result.to_json()) if json else render.features_table(result)


@app.command("eval")
@options_of(EvalConfig)
def eval_(
    given: Given,
    config: ConfigFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure retrieval and the modality gap."""
    with command(quiet=quiet, verbose=verbose) as console:
        settings = EvalConfig.resolve(config, given)
        from csalign.steps.evaluate import evaluate

        with shown_progress(console, quiet=quiet) as progress:
            document = evaluate(settings, progress)
        render.print_json(document) if json else render.eval_tables(document)


@app.command()
def compare(
    evals: Annotated[
        list[Path], typer.Argument(help="What `csalign eval --json` printed.", metavar="EVAL.json")
    ],
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Put several evaluations side by side."""
    with command(quiet=quiet, verbose=verbose):
        render.compare_table([_read_eval(path) for path in evals])


def _read_eval(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["retrieval"]["mean_recall"], document["gap"]["rmg"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make one with csalign eval --json") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is not what csalign eval --json prints") from None
    return dict(document)


def main() -> None:
    """Entry point."""
    app()
