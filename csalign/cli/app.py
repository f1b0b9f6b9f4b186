"""The ``csalign`` command: one function per subcommand, each a thin skin over its room.

A command's work is imported when it runs, so that ``--help`` loads nothing heavy.
"""

from typing import Annotated, Any

import typer

from csalign.cli import eval_tables as tables
from csalign.cli import render
from csalign.cli.command import command_of, error_exits
from csalign.core import __version__, results
from csalign.evaluation.config import (
    CompareConfig,
    DiagnoseConfig,
    EvalConfig,
    InspectConfig,
)
from csalign.generation.config import GenerateConfig
from csalign.indexing.config import IndexConfig, SearchConfig
from csalign.ingest.config import ExtractConfig, ImportConfig
from csalign.runs.config import ApplyConfig, ExportConfig
from csalign.training.config import (
    TrainConfig,
    TuneConfig,
    recipe_names,
    recipe_text,
    recipe_title,
)

app = typer.Typer(
    name="csalign",
    help="Align two sets of embeddings with InfoNCE and the Cauchy-Schwarz divergence.",
    epilog="Example: csalign extract photos --encoder open_clip:ViT-B-32/laion2b_s34b_b79k -o "
    "features",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # a local could be a huge tensor
    context_settings={"help_option_names": ["-h", "--help"]},
)
PIPELINE = "Pipeline"
ANALYSIS = "Analysis"
USE = "Use"


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


@app.command(
    rich_help_panel=PIPELINE,
    epilog="Example: csalign extract photos --captions captions.csv --encoder "
    "open_clip:ViT-B-32/openai --out features",
)
@command_of(ExtractConfig, render.features_table)
def extract(settings: ExtractConfig, progress: results.Progress) -> results.FeaturesResult:
    """Encode images and captions with frozen encoders into a feature set."""
    from csalign.ingest.extract import extract

    return extract(settings, progress)


@app.command(
    "import",
    rich_help_panel=PIPELINE,
    epilog="Example: csalign import --images image.npy --texts text.npy --out features",
)
@command_of(ImportConfig, render.features_table)
def import_(settings: ImportConfig, progress: results.Progress) -> results.FeaturesResult:
    """Import arrays of embeddings as a feature set."""
    from csalign.ingest.import_arrays import import_arrays

    return import_arrays(settings, progress)


@app.command(
    rich_help_panel=PIPELINE,
    epilog="Example: csalign train features --out run --report training.html",
)
@command_of(TrainConfig, render.train_table, distributable=True)
def train(settings: TrainConfig, progress: results.Progress) -> results.TrainResult:
    """Train adapters on a feature set."""
    from csalign.training.train import train

    return train(settings, progress)


@app.command(
    rich_help_panel=PIPELINE, epilog="Example: csalign tune features --out study --minutes 30"
)
@command_of(TuneConfig, render.tune_tables)
def tune(settings: TuneConfig, progress: results.Progress) -> results.TuneResult:
    """Tune train's hyperparameters on validation; options you pass stay fixed."""
    from csalign.training.tuning.tune import tune

    return tune(settings, progress)


@app.command(
    "eval",
    rich_help_panel=PIPELINE,
    epilog="Example: csalign eval features --adapter run --split test --report eval.html",
)
@command_of(EvalConfig, tables.eval_tables, distributable=True)
def eval_(settings: EvalConfig, progress: results.Progress) -> dict[str, Any]:
    """Measure retrieval and the modality gap."""
    from csalign.evaluation.evaluate import evaluate

    return evaluate(settings, progress)


@app.command(
    rich_help_panel=ANALYSIS,
    epilog="Example: csalign compare run-a run-b eval.json --split test",
)
@command_of(CompareConfig, tables.compare_table)
def compare(settings: CompareConfig, progress: results.Progress) -> dict[str, Any]:
    """Compare runs and evaluations, with paired significance intervals."""
    from csalign.evaluation.compare import compare

    return compare(settings, progress)


@app.command(
    rich_help_panel=ANALYSIS, epilog="Example: csalign diagnose features --report diagnosis.html"
)
@command_of(DiagnoseConfig, tables.diagnosis_tables)
def diagnose(settings: DiagnoseConfig, progress: results.Progress) -> dict[str, Any]:
    """Analyse the alignment/uniformity conflict and decompose the gap."""
    from csalign.evaluation.diagnose import diagnose

    return diagnose(settings, progress)


@app.command(rich_help_panel=ANALYSIS, epilog="Example: csalign inspect features")
@command_of(InspectConfig, render.inspect_table)
def inspect(settings: InspectConfig, progress: results.Progress) -> dict[str, Any]:
    """Summarise an artifact and verify all of it."""
    from csalign.evaluation.inspect import inspect

    return inspect(settings, progress)


@app.command(
    rich_help_panel=ANALYSIS,
    epilog="Example: csalign recipes few-pairs > few.toml; csalign train features --config "
    "few.toml --out run",
)
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe whose file to print.", metavar="NAME")
    ] = None,
) -> None:
    """List the presets of train, or print one as a file for --config."""
    with error_exits(quiet=False, verbose=0), render.to_stdout():
        if name is not None:
            typer.echo(recipe_text(name), nl=False)
        else:
            render.recipes_table({known: recipe_title(known) for known in recipe_names()})


@app.command(
    rich_help_panel=USE, epilog="Example: csalign apply features --adapter run --out aligned"
)
@command_of(ApplyConfig, render.features_table, distributable=True)
def apply(settings: ApplyConfig, progress: results.Progress) -> results.FeaturesResult:
    """Write the aligned embeddings as a new feature set."""
    from csalign.runs.apply import apply

    return apply(settings, progress)


@app.command(
    rich_help_panel=USE, epilog="Example: csalign index features --adapter run --out index"
)
@command_of(IndexConfig, render.index_table)
def index(settings: IndexConfig, progress: results.Progress) -> dict[str, Any]:
    """Build a search index on disk."""
    from csalign.indexing.build import index

    return index(settings, progress)


@app.command(
    rich_help_panel=USE, epilog='Example: csalign search index --text "a red bicycle" --top 5'
)
@command_of(SearchConfig, render.found)
def search(settings: SearchConfig, progress: results.Progress) -> results.Found:
    """Find the nearest items to a text, an image or an embedding."""
    from csalign.indexing.search import find

    return find(settings, progress)


@app.command(rich_help_panel=USE, epilog="Example: csalign export run --to onnx --out exported")
@command_of(ExportConfig, render.export_table)
def export(settings: ExportConfig, progress: results.Progress) -> dict[str, Any]:
    """Export a run's adapter with a model card."""
    from csalign.runs.export import export

    return export(settings, progress)


@app.command(
    rich_help_panel=USE,
    epilog="Example: csalign generate --adapter run --decoder DECODER --prompts prompts.txt "
    "--out images",
)
@command_of(GenerateConfig, render.generate_table)
def generate(settings: GenerateConfig, progress: results.Progress) -> results.GenerateResult:
    """Generate images from text with an unCLIP decoder."""
    from csalign.generation.generate import generate

    return generate(settings, progress)
