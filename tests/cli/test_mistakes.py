"""Mistakes on the command line: what is wrong, what was meant, and nothing heavy imported."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from csalign.core.errors import ConfigError
from csalign.evaluation.config import DiagnoseConfig
from csalign.indexing.config import SearchConfig
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: feature sets f, g and a small s, a run r by its looks, an array."""
    monkeypatch.chdir(tmp_path)
    for name in ("f", "g"):
        shutil.copytree(features, name)
    Path("r").mkdir()
    Path("r/adapter.json").write_text("{}")
    Path("r/config.toml").write_text('features = "f"\n')
    np.save("x.npy", np.eye(3))
    import_arrays(ImportConfig(images=Path("x.npy"), texts=Path("x.npy"), out=Path("s")))
    Path("t.csv").touch()
    return tmp_path


MISTAKES = [
    ("train f --step 3", 2, "--step: no such option; did you mean --steps?"),
    ("train f --learning-rat 3", 2, "--learning-rat: no such option; did you mean --learning-r"),
    ("train f --split val", 2, "; did you mean --train-split or --val-split?"),
    ("train f --overwrit", 2, "--overwrit: no such option; did you mean --overwrite?"),
    ("eval f --gpus 3", 2, "--gpus: no such option; see csalign eval --help-all"),
    ("evaluate f", 2, "evaluate: no such command; did you mean eval?"),
    ("search f a red flower", 2, "; quote the query: csalign search f 'a red flower'"),
    ("import x.npy --out q --val 0.6 --test 0.6", 2, "--val, --test: 0.6 and 0.6 leave nothing"),
    ("trian f", 2, "trian: no such command; did you mean train?"),
    ("xyz", 2, "xyz: no such command; see csalign --help"),
    ("help trian", 2, "trian: no such command; did you mean train?"),
    ("train f g", 2, "g: unexpected argument; the usage is csalign train FEATURES [OPTIONS]"),
    ("train f --out", 2, "--out needs a value"),
    ("train f --json=1", 2, "--json does not take a value"),
    ("train f", 2, "missing --out; for instance: csalign train f --out run"),
    (
        "train f --steps 9 --overwrite",
        2,
        "missing --out; for instance: csalign train f --steps 9 --overwrite --out run",
    ),
    ("export", 2, "missing RUN and --out and --to; for instance: csalign export run --out exported "
     "--to onnx"),
    ("eval", 2, "missing FEATURES; for instance: csalign eval features --adapter run --split test "
     "--report eval.html"),
    ("train f --out q --lr fast", 2, "--learning-rate must be a number (got 'fast')"),
    ("train f --out q --steps 1.5", 2, "--steps must be a whole number (got 1.5)"),
    ("train f --out q --cs-weight -1", 2, "--cs-weight must be at least 0 or auto (got -1)"),
    ("train f --out q --bandwidth x", 2, "--bandwidth must be a number, median or tied (got 'x')"),
    (
        "train f --out q --init cannonical",
        2,
        "--init must be canonical or random (got 'cannonical'); did you mean canonical?",
    ),
    (
        "train f --out q --pair-loss x",
        2,
        "--pairwise must be infonce, sigmoid, align-uniform or none (got 'x')",
    ),
    ("train f --out q --steps 3 --epochs 3", 2, "--steps and --epochs both say how long to train"),
    ("train f --out q --adapter gul", 2, "; did you mean glu?"),
    ("train f --out q --recipe few-pair", 2, "; did you mean few-pairs?"),
    ("train f --out=", 2, "--out must not be empty"),
    ("import --images x.npy --out=", 2, "--out must not be empty"),
    ("search f", 2, 'missing a query; for instance: csalign search f "a red bicycle"'),
    ("search f flower --text flower", 2, "QUERY and --text are 2 queries; pass one of them"),
    ("search f flower --query-side text", 2, "--query-side is the side of --embedding; omit it"),
    ("generate --adapter r --decoder d --out q", 2, "--prompts and --features are both texts"),
    ("train nowhere --out q", 1, "nowhere: no such feature set; create one with csalign extract"),
    ("train x.npy --out q", 1, "x.npy: is an array, not a feature set; import it first: csalign "
     "import"),
    ("train t.csv --out q", 1, "t.csv: is a file, not a feature set, which is a folder; create"),
    ("train r --out q", 1, "r: is a run, not a feature set; pass its features, f"),
    ("train f --out f", 1, "f: this is where f is read from; choose another --out"),
    ("train f --out g", 1, "g: exists; choose another --out, or replace it with --overwrite"),
    ("train f --out x.npy", 1, "x.npy: is a file; choose another --out"),
    ("train f --out q --report no/x.html", 1, "no/x.html: the folder no does not exist; create it"),
    ("train f --unpaired nowhere --out q", 1, "nowhere: no such feature set"),
    ("tune nowhere --out q", 1, "nowhere: no such feature set"),
    ("eval f --adapter f", 1, "f: is a feature set, not a run; train one with csalign train f"),
    ("eval f --adapter nowhere", 1, "nowhere: no such run; train one with csalign train"),
    ("compare nowhere", 1, "nowhere: no such file or folder"),
    ("apply f --adapter nowhere --out q", 1, "nowhere: no such run"),
    ("index r --out q", 1, "r: is a run, not a feature set"),
    ("search r flower", 1, "not an index; pass its features and the run: f --adapter r"),
    ("export f --to onnx --out q", 1, "f: is a feature set, not a run"),
    ("generate --adapter f --decoder d --prompts t.csv --out q", 1, "f: is a feature set, not a"),
    ("extract nowhere --out q", 1, "nowhere: no such file or folder"),
    ("inspect nowhere", 1, "nowhere: no such file or folder"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_that_says_what_works(
    place: Path, run: Run, line: str, code: int, message: str
) -> None:
    found, shown, errors = run(*line.split())

    assert (found, shown) == (code, ""), errors
    assert errors.startswith("csalign: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not Path("q").exists()


PROBE = """
import sys
from csalign.__main__ import main
codes = []
for line in sys.argv[1:]:
    sys.argv = ["csalign", *line.split()]
    try:
        main()
    except SystemExit as stop:
        codes.append(stop.code)
heavy = {"torch", "faiss", "open_clip"} & sys.modules.keys()
print(codes, sorted(heavy))
"""


def test_no_mistake_waits_for_torch(place: Path) -> None:
    lines = [line for line, _, _ in MISTAKES]
    words = [sys.executable, "-c", PROBE, *lines, "inspect s -q --json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    codes = [code for _, code, _ in MISTAKES]

    assert done.stdout.splitlines()[-1] == f"{[*codes, 0]} []"


def test_mistakes_of_a_file_name_the_file_and_the_key(place: Path, run: Run) -> None:
    Path("own.toml").write_text('lr = "fast"\nbandwith = 1\nhidden-dim = 8\nshape = 1\n')

    assert run("train", "f", "--out", "q", "--config", "own.toml", "--steps", "x") == (
        2,
        "",
        "csalign: own.toml: unknown key bandwith; did you mean bandwidth?\n"
        "csalign: own.toml: unknown key shape\n"
        "csalign: --steps must be a whole number (got 'x')\n"
        "csalign: own.toml: learning_rate must be a number (got 'fast')\n",
    )
    Path("own.toml").write_text("lr = 1\nlearning_rate = 2\n")
    assert "lr and learning_rate are names of one option; omit one" in run(
        *("train", "f", "--out", "q", "--config", "own.toml")
    )[2]  # fmt: skip


def test_aliases_mean_the_same_on_the_command_line_in_a_file_and_from_python(
    place: Path, run: Run
) -> None:
    Path("own.toml").write_text("hidden-dim = 8\nema = 0.5\nval_count = 2\n")
    words = ("--lr", 0.01, "--dist-weight", 0.2, "--dim", 4, "--chunk-size", 64, "--steps", 2)
    code, _, errors = run("train", "f", "--out", "q", "--config", "own.toml", *words)
    written = tomllib.loads(Path("q/config.toml").read_text())
    expected = {
        **{"hidden": 8, "average": 0.5, "validations": 2, "learning_rate": 0.01},
        **{"cs_weight": 0.2, "width": 4, "sub_batch": 64},
    }

    assert code == 0, errors
    assert {name: written[name] for name in expected} == expected
    both = {"features": "f", "out": "q"}
    recipe = TrainConfig.model_validate({**both, "recipe": "few-pairs", "lr": 0.5})
    assert recipe.learning_rate == 0.5
    assert DiagnoseConfig.model_validate({"features": "f", "plot": "x.html"}).report == Path(
        "x.html"
    )
    with pytest.raises(ConfigError, match="html and report are names of one option"):
        SearchConfig.model_validate({"index": "i", "html": "a.html", "report": "b.html"})


@pytest.mark.parametrize(("batch", "steps"), [(50, 12), (512, 3)])  # 200 pairs
def test_epochs_are_passes_over_the_training_pairs(
    place: Path, run: Run, batch: int, steps: int
) -> None:
    words = ("--epochs", 3, "--batch-size", batch, "--hidden", 8, "--patience", 99)
    code, _, errors = run("train", "f", "--out", "q", *words, "--overwrite")

    assert code == 0, errors
    assert f'"step": {steps},' in Path("q/metrics.jsonl").read_text()
    assert f'"step": {steps + 1},' not in Path("q/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "redirection", "code"),
    [
        (["inspect", "s", "-q"], ">&-", 0),
        (["inspect", "nowhere"], ">&- 2>&-", 1),
        (["--help"], ">/dev/full", 1),
        (["train", "--help"], ">/dev/full", 1),
        (["--version"], ">/dev/full", 1),
        (["recipes"], ">&-", 0),
        (["inspect", "s", "-q"], "<&- >/dev/null", 0),
    ],
)
def test_closed_and_full_streams_end_in_an_exit_code(
    place: Path, arguments: Sequence[str], redirection: str, code: int
) -> None:
    line = f'"$0" -m csalign {" ".join(arguments)} {redirection}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable], capture_output=True, text=True, check=False
    )

    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1


@pytest.mark.parametrize("arguments", ["--help", "train --help-all", "recipes", "inspect s -q"])
def test_a_reader_that_goes_away_ends_the_command_as_sigpipe_would(
    place: Path, arguments: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        words = [sys.executable, "-m", "csalign", *arguments.split()]
        done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)

    assert (done.returncode, done.stderr) == (141, "")
