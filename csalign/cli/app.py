"""The ``csalign`` command: one function per subcommand, each a thin skin over its room.

A command's work is imported when it runs, so that ``--help`` loads nothing heavy.
"""

import tomllib
from typing import Annotated, Any

import typer

from csalign.cli import artifact_tables, eval_tables, render, tables
from csalign.cli.command import command_of
from csalign.cli.errors import Commands, error_exits
from csalign.cli.help import Help, show_help
from csalign.cli.options import GENERAL, Json
from csalign.core import __version__, results
from csalign.core.progress import Progress
from csalign.evaluation.config import (
    CompareConfig,
    DiagnoseConfig,
    EvalConfig,
    InspectConfig,
)
from csalign.generation.config import GenerateConfig
from csalign.indexing.config import IndexConfig, SearchConfig
from csalign.ingest.config import ExtractConfig, ImportConfig, SplitConfig
from csalign.runs.config import ApplyConfig, ExportConfig
from csalign.training.config import (
    TrainConfig,
    TuneConfig,
    recipe_names,
    recipe_text,
    recipe_title,
)

EXAMPLES = """\
Examples:
  csalign import image.npy text.npy --out features
  csalign train features --out run
  csalign eval features --adapter run --report eval.html

csalign help COMMAND shows the options of a command."""

app = typer.Typer(
    name="csalign",
    cls=Commands,
    help="Align two sets of embeddings with InfoNCE and the Cauchy-Schwarz divergence.",
    epilog=EXAMPLES,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,  # a local could be a huge tensor
)
DATA = "Data"
TRAINING = "Training"
EVALUATION = "Evaluation"
USE = "Use"


def _show_version(wanted: bool) -> None:
    if wanted:
        with error_exits(quiet=False, verbose=0), render.to_stdout():
            typer.echo(f"csalign {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            help="Print the version.",
            callback=_show_version,
            is_eager=True,
            rich_help_panel=GENERAL,
        ),
    ] = False,
    help_: Help = False,
) -> None:
    if context.invoked_subcommand is None:
        show_help(context, code=2)


@app.command("help", hidden=True)
def help_(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(metavar="[COMMAND]", help="Command.")] = None,
) -> None:
    """Show the help of a command."""
    parent = context.parent
    assert parent is not None
    parent.command.main([*([command] if command else []), "--help"], prog_name="csalign")


@app.command(rich_help_panel=DATA, epilog=f"Example: {ExtractConfig.example}")
@command_of(ExtractConfig, artifact_tables.features_table)
def extract(settings: ExtractConfig, progress: Progress) -> results.FeaturesResult:
    """Encode images and captions with frozen encoders into a feature set."""
    from csalign.ingest.extract import extract

    return extract(settings, progress)


@app.command("import", rich_help_panel=DATA, epilog=f"Example: {ImportConfig.example}")
@command_of(ImportConfig, artifact_tables.features_table)
def import_(settings: ImportConfig, progress: Progress) -> results.FeaturesResult:
    """Import arrays of embeddings as a feature set."""
    from csalign.ingest.import_arrays import import_arrays

    return import_arrays(settings, progress)


@app.command(rich_help_panel=DATA, epilog=f"Example: {SplitConfig.example}")
@command_of(SplitConfig, artifact_tables.split_table)
def split(settings: SplitConfig, progress: Progress) -> results.SplitResult:
    """Divide a feature set into train, val and test, by image."""
    from csalign.ingest.split import split

    return split(settings, progress)


@app.command(rich_help_panel=TRAINING, epilog=f"Example: {TrainConfig.example}")
@command_of(TrainConfig, tables.train_table, distributable=True)
def train(settings: TrainConfig, progress: Progress) -> results.TrainResult:
    """Train adapters on a feature set."""
    from csalign.training.train import train

    return train(settings, progress)


@app.command(rich_help_panel=TRAINING, epilog=f"Example: {TuneConfig.example}")
@command_of(TuneConfig, tables.tune_tables)
def tune(settings: TuneConfig, progress: Progress) -> results.TuneResult:
    """Search settings of train on validation; options you pass stay fixed."""
    from csalign.training.tuning.tune import tune

    return tune(settings, progress)


@app.command("eval", rich_help_panel=EVALUATION, epilog=f"Example: {EvalConfig.example}")
@command_of(EvalConfig, eval_tables.eval_tables, distributable=True)
def eval_(settings: EvalConfig, progress: Progress) -> dict[str, Any]:
    """Measure retrieval and the modality gap."""
    from csalign.evaluation.evaluate import evaluate

    return evaluate(settings, progress)


@app.command(rich_help_panel=EVALUATION, epilog=f"Example: {CompareConfig.example}")
@command_of(CompareConfig, eval_tables.compare_table)
def compare(settings: CompareConfig, progress: Progress) -> dict[str, Any]:
    """Compare runs and evaluations, with paired significance intervals."""
    from csalign.evaluation.compare import compare

    return compare(settings, progress)


@app.command(rich_help_panel=EVALUATION, epilog=f"Example: {DiagnoseConfig.example}")
@command_of(DiagnoseConfig, eval_tables.diagnosis_tables)
def diagnose(settings: DiagnoseConfig, progress: Progress) -> dict[str, Any]:
    """Analyse the alignment/uniformity conflict and decompose the gap."""
    from csalign.evaluation.diagnose import diagnose

    return diagnose(settings, progress)


@app.command(rich_help_panel=DATA, epilog=f"Example: {InspectConfig.example}")
@command_of(InspectConfig, artifact_tables.inspect_table)
def inspect(settings: InspectConfig, progress: Progress) -> dict[str, Any]:
    """Summarise an artifact and verify all of it."""
    from csalign.evaluation.inspect import inspect

    return inspect(settings, progress)


@app.command(
    rich_help_panel=TRAINING,
    epilog="Example: csalign recipes few-pairs > few.toml; csalign train features --config "
    "few.toml --out run",
)
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe whose file to print.", metavar="[NAME]")
    ] = None,
    json: Json = False,
    help_: Help = False,
) -> None:
    """List the presets of train, or print one as a file for --config."""
    with error_exits(quiet=False, verbose=0), render.to_stdout():
        titles = {known: recipe_title(known) for known in recipe_names()}
        if name is None:
            render.print_json(titles) if json else tables.recipes_table(titles)
        else:
            text = recipe_text(name)
            render.print_json(tomllib.loads(text)) if json else typer.echo(text, nl=False)


@app.command(rich_help_panel=USE, epilog=f"Example: {ApplyConfig.example}")
@command_of(ApplyConfig, artifact_tables.features_table, distributable=True)
def apply(settings: ApplyConfig, progress: Progress) -> results.FeaturesResult:
    """Write the aligned embeddings as a new feature set."""
    from csalign.runs.apply import apply

    return apply(settings, progress)


@app.command(rich_help_panel=USE, epilog=f"Example: {IndexConfig.example}")
@command_of(IndexConfig, tables.index_table)
def index(settings: IndexConfig, progress: Progress) -> dict[str, Any]:
    """Build a search index on disk."""
    from csalign.indexing.build import index

    return index(settings, progress)


@app.command(rich_help_panel=USE, epilog=f"Example: {SearchConfig.example}")
@command_of(SearchConfig, tables.found)
def search(settings: SearchConfig, progress: Progress) -> results.Found:
    """Find the nearest items to a text, an image or an embedding."""
    from csalign.indexing.search import find

    return find(settings, progress)


@app.command(rich_help_panel=USE, epilog=f"Example: {ExportConfig.example}")
@command_of(ExportConfig, tables.export_table)
def export(settings: ExportConfig, progress: Progress) -> dict[str, Any]:
    """Export a run's adapter with a model card."""
    from csalign.runs.export import export

    return export(settings, progress)


@app.command(rich_help_panel=USE, epilog=f"Example: {GenerateConfig.example}")
@command_of(GenerateConfig, tables.generate_table)
def generate(settings: GenerateConfig, progress: Progress) -> results.GenerateResult:
    """Generate images from text with an unCLIP decoder."""
    from csalign.generation.generate import generate

    return generate(settings, progress)
