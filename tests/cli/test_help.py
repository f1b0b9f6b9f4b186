"""What ``--help`` shows, and that nothing of it breaks on narrow terminals."""

import re
from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

from csalign.adapters.kinds import NAMES
from csalign.adapters.model import KINDS
from csalign.cli.app import app
from csalign.core import __version__
from csalign.core.config import ALIASES, Config
from csalign.evaluation.config import CompareConfig, DiagnoseConfig, EvalConfig, InspectConfig
from csalign.generation.config import GenerateConfig
from csalign.indexing.config import IndexConfig, SearchConfig
from csalign.ingest.config import ExtractConfig, ImportConfig, SplitConfig
from csalign.runs.config import ApplyConfig, ExportConfig
from csalign.training.bind_config import BindConfig
from csalign.training.config import TrainConfig, TuneConfig

Run = Callable[..., tuple[int, str, str]]

CONFIGS: dict[str, type[Config]] = {
    "extract": ExtractConfig,
    "import": ImportConfig,
    "split": SplitConfig,
    "inspect": InspectConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "bind": BindConfig,
    "eval": EvalConfig,
    "compare": CompareConfig,
    "diagnose": DiagnoseConfig,
    "apply": ApplyConfig,
    "index": IndexConfig,
    "search": SearchConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
}


def test_the_first_help_shows_the_commands_by_purpose_and_three_examples(run: Run) -> None:
    code, shown, _ = run("--help", columns=80)
    groups = re.findall(r"^(\w+)\n((?:  \S.*\n|   +\S.*\n)+)", shown, re.M)
    names = {title: re.findall(r"^  (\w+) ", rows, re.M) for title, rows in groups}

    assert code == 0
    assert [*names][:4] == ["Data", "Training", "Evaluation", "Use"]
    assert names["Training"] == ["train", "tune", "bind", "recipes"]
    assert names["Evaluation"] == ["eval", "compare", "diagnose"]
    assert names["Use"] == ["apply", "index", "search", "export", "generate"]
    assert names["Data"] == ["extract", "import", "split", "inspect"]
    assert len(re.findall(r"^  csalign ", shown, re.M)) == 3
    assert run("-h") == run("--help") == run("help")


def test_the_version_has_a_short_option(run: Run) -> None:
    assert run("-V") == run("--version") == (0, f"csalign {__version__}\n", "")


def test_no_command_is_a_mistake_that_shows_the_help(run: Run) -> None:
    assert run() == (2, run("--help")[1], "")


def test_the_help_of_a_command_has_its_common_options_and_names_the_way_to_all(run: Run) -> None:
    _, short, _ = run("train", "--help", columns=100)
    _, complete, _ = run("train", "--help-all", columns=100)
    shown = {*re.findall(r"^ .{5}--([\w-]+)", short, re.M)}
    everything = {*re.findall(r"^ .{5}--([\w-]+)", complete, re.M)}
    fields = {name.replace("_", "-") for name in TrainConfig.model_fields}

    assert {"out", "recipe", "steps", "batch-size", "learning-rate", "seed", "report"} <= shown
    assert len(shown) < 25
    assert f"{len(everything - shown)} more options: csalign train --help-all" in short
    assert fields - {"features"} <= everything | {name.removeprefix("no-") for name in everything}
    assert "lr" not in everything  # an alias works, but is not shown
    assert run("help", "train", columns=100)[1] == short


def test_eval_shows_what_it_evaluates_first(run: Run) -> None:
    _, shown, _ = run("eval", "--help")

    assert re.findall(r"^ .{5}--([\w-]+)", shown, re.M)[:3] == ["adapter", "split", "report"]


@pytest.mark.parametrize("command", CONFIGS)
@pytest.mark.parametrize("columns", [80, 100])
def test_lines_fit_the_terminal_and_words_stay_complete(
    run: Run, command: str, columns: int
) -> None:
    code, narrow, _ = run(command, "--help-all", columns=columns)
    _, wide, _ = run(command, "--help-all", columns=1000)

    assert code == 0
    body = narrow.partition("\nExample")[0]
    assert max(map(len, body.splitlines())) <= columns
    assert narrow.split() == wide.split()


@pytest.mark.parametrize("command", CONFIGS)
def test_every_command_has_an_example_that_its_config_accepts(run: Run, command: str) -> None:
    _, shown, _ = run(command, "--help")

    assert f"Example: {CONFIGS[command].example}" in shown
    assert CONFIGS[command].example.startswith(f"csalign {command} ")


def test_common_fields_and_aliases_are_those_of_fields() -> None:
    names = {name for config in CONFIGS.values() for name in config.model_fields}

    assert {*ALIASES.values()} <= names
    assert names & ALIASES.keys() <= {"sides"}  # which is another name of --side in import only
    assert {*CONFIGS} | {"recipes", "help"} <= {
        own.name or own.callback.__name__ for own in app.registered_commands if own.callback
    }


def test_the_kinds_of_adapters_are_known_without_torch() -> None:
    assert [*KINDS] == [*NAMES]
    assert not entry_points(group="csalign.adapters", name="gul")
