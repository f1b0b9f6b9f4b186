"""The ``csalign`` command: a table of subcommands, each a thin skin over a function of its room.

A function is imported when its command runs, so that ``--help`` loads nothing heavy.
"""

import tomllib
from collections.abc import Callable
from typing import Annotated

import typer

from csalign.cli import eval_tables, render, tables
from csalign.cli.artifact_tables import features_table, inspect_table, split_table
from csalign.cli.command import command_of
from csalign.cli.diagnosis_tables import diagnosis_table
from csalign.cli.errors import Commands, error_exits
from csalign.cli.help import Help, show_help
from csalign.cli.options import GENERAL, Json
from csalign.core import __version__
from csalign.core.config import Config
from csalign.evaluation.config import CompareConfig, DiagnoseConfig, EvalConfig, InspectConfig
from csalign.generation.config import GenerateConfig
from csalign.indexing.config import IndexConfig, SearchConfig
from csalign.ingest.config import ExtractConfig, ImportConfig, SplitConfig
from csalign.runs.config import ApplyConfig, ExportConfig
from csalign.training.bind_config import BindConfig
from csalign.training.config import TrainConfig, TuneConfig, recipe_names, recipe_text, recipe_title

EXAMPLES = """\
Examples:
  csalign import image.npy text.npy --out features
  csalign train features --out run
  csalign eval features --adapter run --report eval.html

csalign help COMMAND shows the options of a command."""

COMMANDS: dict[str, dict[str, tuple[type[Config], str, Callable[..., None]]]] = {
    "Data": {
        "extract": (ExtractConfig, "ingest.extract:extract", features_table),
        "import": (ImportConfig, "ingest.import_arrays:import_arrays", features_table),
        "split": (SplitConfig, "ingest.split:split", split_table),
        "inspect": (InspectConfig, "evaluation.inspect:inspect", inspect_table),
    },
    "Training": {
        "train": (TrainConfig, "training.train:train", tables.train_table),
        "tune": (TuneConfig, "training.tuning.tune:tune", tables.tune_tables),
        "bind": (BindConfig, "training.bind:bind", tables.bind_table),
    },
    "Evaluation": {
        "eval": (EvalConfig, "evaluation.evaluate:evaluate", eval_tables.eval_tables),
        "compare": (CompareConfig, "evaluation.compare:compare", eval_tables.compare_table),
        "diagnose": (DiagnoseConfig, "evaluation.diagnose:diagnose", diagnosis_table),
    },
    "Use": {
        "apply": (ApplyConfig, "runs.apply:apply", features_table),
        "index": (IndexConfig, "indexing.build:index", tables.index_table),
        "search": (SearchConfig, "indexing.search:find", tables.found),
        "export": (ExportConfig, "runs.export:export", tables.export_table),
        "generate": (GenerateConfig, "generation.generate:generate", tables.generate_table),
    },
}
"""By help panel and name: the options, the function, and what prints its result."""

HELP = {
    "extract": "Encode images and captions with frozen encoders into a feature set.",
    "import": "Import arrays of embeddings as a feature set.",
    "split": "Divide a feature set into train, val and test, by image or item.",
    "inspect": "Summarise an artifact and verify all of it.",
    "train": "Train adapters on a feature set.",
    "tune": "Search settings of train on validation; options you pass stay fixed.",
    "bind": "Join two runs that share a side, without new pairs, in the space of the first.",
    "eval": "Measure retrieval and the modality gap.",
    "compare": "Compare runs and evaluations, with paired significance intervals.",
    "diagnose": "Foretell an alignment, analyse the conflict in the loss, decompose the gap.",
    "apply": "Write the aligned embeddings as a new feature set.",
    "index": "Build a search index on disk.",
    "search": "Find the nearest items to a text, an image or an embedding.",
    "export": "Export a run's adapter with a model card.",
    "generate": "Generate images from text with an unCLIP decoder.",
}

DISTRIBUTABLE = ("train", "eval", "apply")
"""Commands that processes which torchrun starts run together."""

app = typer.Typer(
    name="csalign",
    cls=Commands,
    help="Align two sets of embeddings with InfoNCE and the Cauchy-Schwarz divergence.",
    epilog=EXAMPLES,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,  # a local could be a huge tensor
)


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


for _panel, _commands in COMMANDS.items():
    for _name, (_config, _function, _show) in _commands.items():
        _run = command_of(_config, _function, _show, distributable=_name in DISTRIBUTABLE)
        _example = f"Example: {_config.example}"
        app.command(_name, help=HELP[_name], epilog=_example, rich_help_panel=_panel)(_run)


@app.command(
    rich_help_panel="Training",
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
