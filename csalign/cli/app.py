"""The ``csalign`` command: thin skins over the steps.

Each command imports its step when it runs, so that ``--help`` loads nothing heavy.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from csalign.cli import render
from csalign.cli.options import Json, Quiet, Verbose
from csalign.cli.progress import shown_progress
from csalign.cli.run import command, naming
from csalign.cli.step import step_command
from csalign.core.progress import Progress
from csalign.core.results import FeaturesResult, Found, GenerateResult, TrainResult, TuneResult
from csalign.core.version import __version__
from csalign.evaluation.config import DiagnoseConfig, EvalConfig
from csalign.generation.config import GenerateConfig
from csalign.ingest.config import ExtractConfig, ImportConfig
from csalign.runs.config import ApplyConfig, ExportConfig
from csalign.search.config import IndexConfig, SearchConfig
from csalign.training.config import (
    TrainConfig,
    TuneConfig,
    recipe_names,
    recipe_text,
    recipe_title,
)

app = typer.Typer(
    name="csalign",
    help="Align two sets of embeddings: InfoNCE plus the Cauchy-Schwarz divergence.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # a local could be a huge tensor
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
@step_command(ExtractConfig, render.features_table)
def extract(settings: ExtractConfig, progress: Progress) -> FeaturesResult:
    """Encode images and captions with frozen encoders into a feature set."""
    from csalign.ingest.extract import extract

    return extract(settings, progress)


@app.command("import")
@step_command(ImportConfig, render.features_table)
def import_(settings: ImportConfig, progress: Progress) -> FeaturesResult:
    """Turn arrays of embeddings into a feature set."""
    from csalign.ingest.import_arrays import import_arrays

    return import_arrays(settings, progress)


@app.command()
@step_command(TrainConfig, render.train_table, together=True)
def train(settings: TrainConfig, progress: Progress) -> TrainResult:
    """Train adapters on a feature set."""
    from csalign.training.train import train

    return train(settings, progress)


@app.command()
@step_command(TuneConfig, render.tune_tables)
def tune(settings: TuneConfig, progress: Progress) -> TuneResult:
    """Search the settings of train on validation; those that are given stay as they are."""
    from csalign.training.tuning.tune import tune

    return tune(settings, progress)


@app.command()
@step_command(ApplyConfig, render.features_table, together=True)
def apply(settings: ApplyConfig, progress: Progress) -> FeaturesResult:
    """Map a feature set through trained adapters into a feature set again."""
    from csalign.runs.apply import apply

    return apply(settings, progress)


@app.command("eval")
@step_command(EvalConfig, render.eval_tables, together=True)
def eval_(settings: EvalConfig, progress: Progress) -> dict[str, Any]:
    """Measure retrieval and the modality gap."""
    from csalign.evaluation.evaluate import evaluate

    return evaluate(settings, progress)


@app.command()
@step_command(GenerateConfig, render.generate_table)
def generate(settings: GenerateConfig, progress: Progress) -> GenerateResult:
    """Make images of texts by an unCLIP decoder."""
    from csalign.generation.generate import generate

    return generate(settings, progress)


@app.command()
@step_command(DiagnoseConfig, render.diagnosis_tables)
def diagnose(settings: DiagnoseConfig, progress: Progress) -> dict[str, Any]:
    """Tell how far the objective works against itself, and what the gap is made of."""
    from csalign.evaluation.diagnose import diagnose

    return diagnose(settings, progress)


@app.command()
@step_command(IndexConfig, render.index_table)
def index(settings: IndexConfig, progress: Progress) -> dict[str, Any]:
    """Build an index of a feature set on disk, for search, or add to one."""
    from csalign.search.build import index

    return index(settings, progress)


@app.command()
@step_command(SearchConfig, render.found)
def search(settings: SearchConfig, progress: Progress) -> Found:
    """Find what is nearest to a text, a picture or an embedding in an index."""
    from csalign.search.search import find

    return find(settings, progress)


@app.command()
@step_command(ExportConfig, render.export_table)
def export(settings: ExportConfig, progress: Progress) -> dict[str, Any]:
    """Write a run's adapter for other programs, checked, with a model card."""
    from csalign.runs.export import export

    return export(settings, progress)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A feature set, a run or an index.", metavar="PATH")],
    merge: Annotated[
        bool, typer.Option("--merge", help="First make it whole from the parts in PATH.partial.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Tell what is in an artifact, after checking all of it."""
    with command(quiet=quiet, verbose=verbose), naming([path]):
        from csalign.evaluation.inspect import inspect

        document = inspect(path, merge=merge)
        render.show(document, render.inspect_table, as_json=json)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="One of them, to print its file.", metavar="NAME")
    ] = None,
) -> None:
    """List the named settings of train, or print one, to be changed and given by --config."""
    with command(quiet=False, verbose=0), render.to_stdout():
        if name is not None:
            typer.echo(recipe_text(name), nl=False)
        else:
            render.recipes_table({known: recipe_title(known) for known in recipe_names()})


@app.command()
def compare(
    systems: Annotated[
        list[Path],
        typer.Argument(
            help="Runs, evaluated on their features, and what `csalign eval --json` printed.",
            metavar="RUN|EVAL.json",
        ),
    ],
    split: Annotated[
        str | None,
        typer.Option(help="Split(s) of the runs; 'all' takes every row (default: test if any)."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What the others are compared with, by name or number (default: the first).",
            metavar="N|NAME",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Put several systems side by side and tell which differences are more than chance."""
    with command(quiet=quiet, verbose=verbose) as console, naming(systems):
        from csalign.evaluation.compare import compare

        with shown_progress(console, quiet=quiet) as progress:
            document = compare(systems, split=split, baseline=baseline, progress=progress)
        render.show(document, render.compare_table, as_json=json)
