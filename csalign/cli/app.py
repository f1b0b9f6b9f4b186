"""The ``csalign`` command: one function per subcommand, each a thin skin over its room.

A command's work is imported when it runs, so that ``--help`` loads nothing heavy.
"""

import tomllib
from typing import Annotated, Any

import typer

from csalign.cli import artifact_tables, eval_tables, render, tables
from csalign.cli.command import command_of, error_exits
from csalign.cli.options import Json
from csalign.core import __version__, results
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
@command_of(ExtractConfig, artifact_tables.features_table)
def extract(settings: ExtractConfig, progress: results.Progress) -> results.FeaturesResult:
    """Encode images and captions with frozen encoders into a feature set."""
    from csalign.ingest.extract import extract

    return extract(settings, progress)


@app.command(
    "import",
    rich_help_panel=PIPELINE,
    epilog="Example: csalign import --images image.npy --texts text.npy --out features",
)
@command_of(ImportConfig, artifact_tables.features_table)
def import_(settings: ImportConfig, progress: results.Progress) -> results.FeaturesResult:
    """Import arrays of embeddings as a feature set."""
    from csalign.ingest.import_arrays import import_arrays

    return import_arrays(settings, progress)


@app.command(
    rich_help_panel=PIPELINE, epilog="Example: csalign split features --val 0.1 --test 0.1"
)
@command_of(SplitConfig, artifact_tables.split_table)
def split(settings: SplitConfig, progress: results.Progress) -> results.SplitResult:
    """Divide a feature set into train, val and test, by image."""
    from csalign.ingest.split import split

    return split(settings, progress)


@app.command(
    rich_help_panel=PIPELINE,
    epilog="Example: csalign train features --out run --report training.html",
)
@command_of(TrainConfig, tables.train_table, distributable=True)
def train(settings: TrainConfig, progress: results.Progress) -> results.TrainResult:
    """Train adapters on a feature set."""
    from csalign.training.train import train

    return train(settings, progress)


@app.command(
    rich_help_panel=PIPELINE, epilog="Example: csalign tune features --out study --minutes 30"
)
@command_of(TuneConfig, tables.tune_tables)
def tune(settings: TuneConfig, progress: results.Progress) -> results.TuneResult:
    """Tune train's hyperparameters on validation; options you pass stay fixed."""
    from csalign.training.tuning.tune import tune

    return tune(settings, progress)


@app.command(
    "eval",
    rich_help_panel=PIPELINE,
    epilog="Example: csalign eval features --adapter run --split test --report eval.html",
)
@command_of(EvalConfig, eval_tables.eval_tables, distributable=True)
def eval_(settings: EvalConfig, progress: results.Progress) -> dict[str, Any]:
    """Measure retrieval and the modality gap."""
    from csalign.evaluation.evaluate import evaluate

    return evaluate(settings, progress)


@app.command(
    rich_help_panel=ANALYSIS,
    epilog="Example: csalign compare run-a run-b eval.json --split test",
)
@command_of(CompareConfig, eval_tables.compare_table)
def compare(settings: CompareConfig, progress: results.Progress) -> dict[str, Any]:
    """Compare runs and evaluations, with paired significance intervals."""
    from csalign.evaluation.compare import compare

    return compare(settings, progress)


@app.command(
    rich_help_panel=ANALYSIS, epilog="Example: csalign diagnose features --report diagnosis.html"
)
@command_of(DiagnoseConfig, eval_tables.diagnosis_tables)
def diagnose(settings: DiagnoseConfig, progress: results.Progress) -> dict[str, Any]:
    """Analyse the alignment/uniformity conflict and decompose the gap."""
    from csalign.evaluation.diagnose import diagnose

    return diagnose(settings, progress)


@app.command(rich_help_panel=ANALYSIS, epilog="Example: csalign inspect features")
@command_of(InspectConfig, artifact_tables.inspect_table)
def inspect(settings: InspectConfig, progress: results.Progress) -> dict[str, Any]:
    """Summarise an artifact and verify all of it."""
    from csalign.evaluation.inspect import inspect

    return inspect(settings.path, merge=settings.merge)


@app.command(
    rich_help_panel=ANALYSIS,
    epilog="Example: csalign recipes few-pairs > few.toml; csalign train features --config "
    "few.toml --out run",
)
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe whose file to print.", metavar="NAME")
    ] = None,
    json: Json = False,
) -> None:
    """List the presets of train, or print one as a file for --config."""
    with error_exits(quiet=False, verbose=0), render.to_stdout():
        titles = {known: recipe_title(known) for known in recipe_names()}
        if name is None:
            render.print_json(titles) if json else tables.recipes_table(titles)
        else:
            text = recipe_text(name)
            render.print_json(tomllib.loads(text)) if json else typer.echo(text, nl=False)


@app.command(
    rich_help_panel=USE, epilog="Example: csalign apply features --adapter run --out aligned"
)
@command_of(ApplyConfig, artifact_tables.features_table, distributable=True)
def apply(settings: ApplyConfig, progress: results.Progress) -> results.FeaturesResult:
    """Write the aligned embeddings as a new feature set."""
    from csalign.runs.apply import apply

    return apply(settings, progress)


@app.command(
    rich_help_panel=USE, epilog="Example: csalign index features --adapter run --out index"
)
@command_of(IndexConfig, tables.index_table)
def index(settings: IndexConfig, progress: results.Progress) -> dict[str, Any]:
    """Build a search index on disk."""
    from csalign.indexing.build import index

    return index(settings, progress)


@app.command(
    rich_help_panel=USE, epilog='Example: csalign search index --text "a red bicycle" --top 5'
)
@command_of(SearchConfig, tables.found)
def search(settings: SearchConfig, progress: results.Progress) -> results.Found:
    """Find the nearest items to a text, an image or an embedding."""
    from csalign.indexing.search import find

    return find(settings, progress)


@app.command(rich_help_panel=USE, epilog="Example: csalign export run --to onnx --out exported")
@command_of(ExportConfig, tables.export_table)
def export(settings: ExportConfig, progress: results.Progress) -> dict[str, Any]:
    """Export a run's adapter with a model card."""
    from csalign.runs.export import export

    return export(settings, progress)


@app.command(
    rich_help_panel=USE,
    epilog="Example: csalign generate --adapter run --decoder DECODER --prompts prompts.txt "
    "--out images",
)
@command_of(GenerateConfig, tables.generate_table)
def generate(settings: GenerateConfig, progress: results.Progress) -> results.GenerateResult:
    """Generate images from text with an unCLIP decoder."""
    from csalign.generation.generate import generate

    return generate(settings, progress)
