"""What shells, batch systems and containers hand to a command: streams, locales and variables."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import csalign
from csalign.cli.app import app
from csalign.core.distributed import World, world_from_environment
from csalign.core.errors import ConfigError, CsalignError
from csalign.features.reader import FeatureSet
from csalign.ingest.job import parse_shard

Environment = dict[str, object]


def array(task: int, first: int, last: int, count: int, step: int = 1) -> Environment:
    """The variables of a task of a SLURM array."""
    names = ("ID", "MIN", "MAX", "COUNT", "STEP")
    values = (task, first, last, count, step)
    return {f"SLURM_ARRAY_TASK_{n}": v for n, v in zip(names, values, strict=True)}


def step(rank: int, size: int) -> Environment:
    """The variables of a task that srun starts."""
    return {
        **{"SLURM_JOB_ID": 12, "SLURM_STEP_ID": 0, "SLURM_NTASKS": size, "SLURM_PROCID": rank},
        **{"SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": size},
    }


TORCHRUN: Environment = {
    "RANK": 1,
    "WORLD_SIZE": 2,
    "LOCAL_RANK": 1,
    "MASTER_ADDR": "a",
    "MASTER_PORT": 1,
}
ALLOCATION: Environment = {"SLURM_JOB_ID": 12, "SLURM_NTASKS": 4, "SLURM_NPROCS": 4}

SHARES: list[tuple[str, Environment, str]] = [
    ("nothing", {}, "0/1"),
    (
        "blank variables",
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""},
        "0/1",
    ),
    ("blank array", dict.fromkeys(array(0, 0, 0, 1), ""), "0/1"),
    ("spaces", {"RANK": " ", "WORLD_SIZE": " 4 "}, "0/1"),
    ("numbers with spaces", {"RANK": " 1", "WORLD_SIZE": "4 "}, "1/4"),
    ("a rank without the number of ranks", {"RANK": 3}, "0/1"),
    ("a number of ranks without a rank", {"WORLD_SIZE": 4, "MASTER_ADDR": "a"}, "0/1"),
    ("one rank", {"RANK": 0, "WORLD_SIZE": 1}, "0/1"),
    ("torchrun", TORCHRUN, "1/2"),
    ("torchrun in a step of one task a node", TORCHRUN | step(1, 4), "1/2"),
    ("srun", step(3, 4), "3/4"),
    ("srun of an old SLURM", {"SLURM_PROCID": 2, "SLURM_NTASKS": 4}, "2/4"),
    ("srun, first task", {"SLURM_PROCID": 0, "SLURM_NTASKS": 4, "SLURM_STEPID": 0}, "0/4"),
    ("a shell of salloc", ALLOCATION, "0/1"),
    ("a batch script", ALLOCATION | {"SLURM_PROCID": 0, "SLURM_LOCALID": 0}, "0/1"),
    ("salloc's own step", ALLOCATION | step(0, 1) | {"SLURM_NTASKS": 4}, "0/1"),
    ("Open MPI", {"OMPI_COMM_WORLD_RANK": 2, "OMPI_COMM_WORLD_SIZE": 3} | step(0, 1), "2/3"),
    ("MPICH", {"PMI_RANK": 0, "PMI_SIZE": 3}, "0/3"),
    ("an array", array(15, 0, 15, 16), "15/16"),
    ("an array from 1", array(16, 1, 16, 16), "15/16"),
    ("an array with a step", array(6, 0, 9, 4, 3), "2/4"),
    ("an array of steps", array(1, 0, 3, 4) | step(1, 2), "3/8"),
    ("an array of torchruns", array(3, 0, 3, 4) | TORCHRUN, "7/8"),
    ("not a number", {"RANK": "abc", "WORLD_SIZE": 2}, "RANK is 'abc' in the environment"),
    ("negative", {"RANK": -1, "WORLD_SIZE": 2}, "RANK is '-1' in the environment"),
    ("a rank too high", {"RANK": 4, "WORLD_SIZE": 4}, "RANK 4 of WORLD_SIZE 4, but"),
    ("no ranks", {"RANK": 0, "WORLD_SIZE": 0}, "RANK 0 of WORLD_SIZE 0, but"),
    ("some tasks again", array(7, 3, 7, 2), "task 7 of 2 from 3 to 7"),
    ("one task again", array(5, 5, 5, 1), "pass --shard "),
    ("tasks between the steps", array(1, 0, 6, 3, 3), "task 1 of 3 from 0 to 6"),
    ("an array without its size", {"SLURM_ARRAY_TASK_ID": 3}, "SLURM_ARRAY_TASK_COUNT is not"),
]


@pytest.mark.parametrize(("environment", "share"), [pytest.param(e, s, id=n) for n, e, s in SHARES])
def test_each_process_takes_its_share(environment: Environment, share: str) -> None:
    variables = {name: str(value) for name, value in environment.items()}
    if share[0].isdigit():
        found = parse_shard("auto", variables)
        assert str(found) == share
        named = [word for word in found.origin.split() if word.isupper()]
        assert bool(named) == (found.count > 1)
        assert {*named} <= {*variables}
    else:
        with pytest.raises(CsalignError) as caught:
            parse_shard("auto", variables)
        assert share in str(caught.value)

    assert str(parse_shard("2/5", variables)) == "2/5"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (step(1, 4), "one of 4 processes (SLURM_PROCID 1 of SLURM_STEP_NUM_TASKS 4) that cannot"),
        ({"OMPI_COMM_WORLD_RANK": 1, "OMPI_COMM_WORLD_SIZE": 2}, "torchrun --no-python csalign"),
        ({"RANK": 0, "WORLD_SIZE": 2}, "which sets MASTER_ADDR"),
        ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": ""}, "which sets MASTER_ADDR"),
        (TORCHRUN, "LOCAL_WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "y"}, "RANK is 'x' in the environment, not a number; unset"),
        ({"RANK": 2, "WORLD_SIZE": 2, "MASTER_ADDR": "a"}, "unset both variables"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_processes_that_cannot_meet_do_not_do_the_same_work_at_once(
    environment: Environment,
    message: str,
    command: str,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    options = ["--out", str(tmp_path / "run")] if command == "train" else []
    done = CliRunner().invoke(app, [command, str(features), *options])

    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environment",
    [{}, {"RANK": "", "WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "4"}, ALLOCATION],
)
def test_a_single_process_trains_alone(environment: Environment) -> None:
    assert world_from_environment({n: str(v) for n, v in environment.items()}) == World()


@pytest.fixture
def extract(
    make_images: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """A function that extracts five photos; returns exit code, stdout and stderr."""
    photos = make_images(*(f"{name}.png" for name in "abcde"))

    def invoke(*options: str, out: str = "features") -> tuple[int, str, str]:
        words = ["extract", str(photos), "--image-encoder", "timm:test_vit+none"]
        words += ["--part-rows", "1", "--out", str(tmp_path / out), *options]
        done = CliRunner().invoke(app, words)
        return done.exit_code, done.stdout, done.stderr

    return invoke


@pytest.mark.parametrize("launched", [lambda i: step(i, 3), lambda i: array(2 * i, 0, 4, 3, 2)])
def test_tasks_share_an_extraction_that_may_be_submitted_again(
    launched: Callable[[int], Environment],
    extract: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for task in range(3):
        for name, value in launched(task).items():
            monkeypatch.setenv(name, str(value))
        code, printed, messages = extract()
        assert code == 0
        assert f"processing shard {task}/3 (SLURM_" in messages
        assert "--shard" not in printed  # which the other tasks do on their own
    ids = FeatureSet.open(tmp_path / "features").images.strings("id").to_pylist()
    assert ids == [f"{name}.png" for name in "abcde"]
    written = (tmp_path / "features/manifest.json").stat().st_mtime_ns

    code, printed, _ = extract()
    assert (code, "already complete" in printed) == (0, True)
    assert (tmp_path / "features/manifest.json").stat().st_mtime_ns == written


def test_a_finished_extraction_of_something_else_is_not_taken_for_the_same(
    extract: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    assert extract("--json")[0] == 0
    code, document, _ = extract("--json")
    found = json.loads(document)
    assert (code, found["existed"], found["images"]) == (0, True, 5)

    code, _, messages = extract("--dtype", "float32")
    assert (code, "exists; choose another --out" in messages) == (1, True)

    (tmp_path / "photos/e.png").unlink()
    code, _, messages = extract()
    assert (code, "its source or encoders have changed" in messages) == (1, True)
    assert len(FeatureSet.open(tmp_path / "features").images) == 5


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a feature set and an index of it; names and captions are not ASCII."""
    place = tmp_path_factory.mktemp("environment")
    np.save(place / "x.npy", np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32))
    captions = ["un café", "一只熊", "a dog", "a bear"]
    lines = ["image_id,caption", *(f"{row},{text}" for row, text in enumerate(captions))]
    (place / "c.csv").write_text("\n".join(lines), encoding="utf-8")
    features = place / "été"
    csalign.import_arrays(place / "x.npy", place / "x.npy", pairs=place / "c.csv", out=features)
    csalign.index(features, side="text", out=place / "一")
    return place


INSPECT = "csalign inspect été"
SEARCH = "csalign search 一 --embedding x.npy"

COMMANDS: list[tuple[str, int, str, str]] = [
    # command, exit code, what stdout contains, what stderr contains
    (f"PYTHONIOENCODING=ascii:strict {SEARCH} -q --json", 0, r'"un caf\u00e9"', ""),
    (f"PYTHONIOENCODING=latin-1 {SEARCH} --jsonl -q", 0, r"\u4e00\u53ea\u718a", ""),
    (f"PYTHONIOENCODING=cp1252 {SEARCH} -q", 0, "a dog", ""),
    ("PYTHONIOENCODING=ascii:strict csalign inspect 熊", 1, "", r"\u718a: no such file"),
    (f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {INSPECT} --json", 0, '"images": 4', ""),
    (f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {SEARCH} --json", 0, r"\u718a", ""),
    (f"{INSPECT} >&- 2>&- <&-", 0, "", ""),
    ("csalign search 熊 - <&-", 1, "", "熊: no such index"),
    (f"{INSPECT} > /dev/full", 1, "", "stdout: No space left on device; free some space"),
    ("csalign --help > /dev/full", 1, "", "stdout: No space left on device; free some space"),
    (f"{INSPECT} 2> /dev/full", 0, "4 images, 4 texts, 4 pairs", ""),
    ("csalign inspect 熊 2> /dev/full", 1, "", ""),
    ("csalign inspec 2>&1 | true; exit ${PIPESTATUS[0]}", 2, "", ""),
    (f"{INSPECT} --json | true; exit ${{PIPESTATUS[0]}}", 141, "", ""),
    ("csalign --help | true; exit ${PIPESTATUS[0]}", 141, "", ""),
    (f"COLUMNS=0 LINES=0 {INSPECT}", 0, "4 images, 4 texts, 4 pairs", ""),
    (f"COLUMNS=² {INSPECT}", 0, "4 images, 4 texts, 4 pairs", ""),
    (f"COLUMNS= TERM=dumb NO_COLOR=1 {INSPECT}", 0, "4 images, 4 texts, 4 pairs", ""),
    ("PYTHONOPTIMIZE=2 csalign train --help", 0, "Train adapters on a feature set.", ""),
    (f"PYTHONWARNINGS=error OMP_NUM_THREADS= {INSPECT}", 0, "4 images, 4 texts", ""),
    ("TMPDIR=/nowhere HOME=/nowhere csalign eval été --json", 0, '"pairs": 4', ""),
]


@pytest.mark.parametrize(("command", "code", "printed", "messages"), COMMANDS)
def test_streams_and_variables_of_every_kind_are_no_reason_to_fail(
    command: str, code: int, printed: str, messages: str, place: Path
) -> None:
    words = command.replace("csalign ", f"{sys.executable} -m csalign ", 1)
    done = subprocess.run(
        ["bash", "-c", words], cwd=place, capture_output=True, text=True, encoding="utf-8"
    )

    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr
    assert printed in done.stdout
    assert messages in done.stderr
    if command.endswith("--json"):
        assert json.loads(done.stdout)


def test_a_working_directory_that_was_removed_is_named(place: Path) -> None:
    script = 'mkdir gone; cd gone; rmdir ../gone; "$0" -m csalign train "$1" --out "$2"'
    words = ["bash", "-c", script, sys.executable, str(place / "été"), str(place / "run")]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)

    assert done.returncode == 1
    assert done.stderr == "csalign: the working directory was removed; change to another one\n"


def test_images_with_names_in_utf8_are_found_in_any_locale(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    photos = make_images("été.png", "一.png")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "csalign", "extract", str(photos)]
    words += ["--image-encoder", "timm:test_vit+none", "--out", str(tmp_path / "features")]
    done = subprocess.run(words, env={**os.environ, **locale}, capture_output=True)

    assert done.returncode == 0
    ids = FeatureSet.open(tmp_path / "features").images.strings("id").to_pylist()
    assert ids == ["été.png", "一.png"]


def test_a_tree_that_is_not_installed_has_a_version(tmp_path: Path) -> None:
    package = Path(csalign.__file__).parent
    (tmp_path / "csalign").symlink_to(package)
    code = "import csalign, importlib.metadata as m; print(csalign.__version__)"
    hidden = "import importlib.metadata as m\nm.version = lambda n: m.distribution('no-' + n)\n"
    words = [sys.executable, "-c", hidden + code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, "0+source\n")


def test_a_config_with_a_wrong_name_says_which_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"^stp: unknown key; did you mean steps\?$"):
        csalign.TrainConfig(features="features", out="run", stp=3)  # type: ignore[call-arg]
