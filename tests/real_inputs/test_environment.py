"""What shells, batch systems and containers hand to a command: streams, locales and variables."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import csalign
from csalign.cli.app import app
from csalign.core.distributed import World, world_from_environment
from csalign.core.errors import ConfigError, CsalignError, OutputError
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


TORCHRUN = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 1}
ALLOCATION = {"SLURM_JOB_ID": 12, "SLURM_NTASKS": 4, "SLURM_NPROCS": 4}

SHARES: list[tuple[str, Environment, str]] = [
    ("nothing", {}, "0/1"),
    ("blank variables", {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", **array(0, 0, 0, 1)}, "0/1"),
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
def extract(make_images: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
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
    ids = FeatureSet.open(tmp_path / "features").images.ids().to_pylist()
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


NAMES = ("été", "一只熊")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a feature set whose name and captions are not ASCII."""
    place = tmp_path_factory.mktemp("environment")
    vectors = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    np.save(place / "q.npy", vectors[:1])
    (place / "c.csv").write_text(
        "image_id,caption\n0,un café\n1,一只熊\n2,a dog\n3,a bear\n", encoding="utf-8"
    )
    csalign.import_arrays(
        images=place / "q.npy", out=place / "one", **{}
    ) if False else csalign.import_arrays(
        images=_saved(place / "x.npy", vectors),
        texts=_saved(place / "y.npy", vectors),
        pairs=place / "c.csv",
        out=place / NAMES[0],
    )
    return place


def _saved(path: Path, values: Any) -> Path:
    np.save(path, values)
    return path
