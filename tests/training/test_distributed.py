"""Several processes do what one does to a tolerance, and they end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from csalign.core.errors import Stopped
from csalign.core.progress import CALL_KEYS
from csalign.core.results import FeaturesResult
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig
from csalign.training.config import TrainConfig
from csalign.training.train import train

CLOSE = 1e-5
# Noise and dropout are drawn by each process on its own.
QUICK = {"steps": 12, "hidden": 16, "validations": 3, "patience": 99, "noise": 0, "dropout": 0}
# By the name of the run. All but the first are there for one term or another.
RUNS: dict[str, dict[str, Any]] = {
    "default": {"steps": 30},
    "scale": {"learn_scale": True, "sub_batch": 50, "unpaired_negatives": True, "batch_size": 130},
    "sigmoid": {"pairwise": "sigmoid", "captions": "all", "networks": 2, "bandwidth": (0.5, 1.0)},
    "mixed": {"mixing": 0.5, "divergence": "gaussian-kl", "adapter": "transformer", "layers": 1},
    "auto": {"cs_weight": "auto", "average": 0.9, "divergence": "mmd", "memory": 0},
}
THROUGH_CLI = "default"
PROCESSES = 3  # which divides no number of rows
LONG = {"batch_size": 60, "sub_batch": 13, "captions": "sample", "steps": 5_000}
LONG |= {"save_every": 4, "validations": 200}

# Run in each process of a job. The last command fails in one of them.
ALL = """
import json, sys
from pathlib import Path
import torch
from typer.testing import CliRunner
from csalign.cli.app import app
from csalign.cli.command import error_exits
from csalign.core import distributed
from csalign.core.progress import CALL_KEYS
from csalign.runs.config import ApplyConfig
from csalign.evaluation.config import EvalConfig
from csalign.training.config import TrainConfig
from csalign.runs.apply import apply
from csalign.evaluation.evaluate import evaluate
from csalign.training.train import train
from csalign.objective.loss import Objective

torch.set_num_threads(1)
out, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])

def gradients(divided):
    found = []
    for options, n, m, sigma, owner in (
        ({"pairwise": "infonce", "weight": 1.0, "label_smoothing": 0.1}, 300, 260, 0.5, False),
        ({"pairwise": "infonce", "weight": 1.0}, 300, 260, (0.4, 2.0), False),
        ({"pairwise": "infonce", "weight": 0.0}, 300, 3, 0.5, False),
        ({"pairwise": "none", "weight": 1.0, "divergence": "mmd"}, 300, 260, 0.5, False),
        ({"pairwise": "sigmoid", "weight": 0.5, "divergence": "gaussian-kl"}, 7, 5, 0.5, False),
        ({"pairwise": "sigmoid", "weight": 0.0}, 300, 260, 0.5, True),
        ({"pairwise": "infonce", "weight": 0.3}, 9, 8, 0.5, True),
        ({"pairwise": "align-uniform", "weight": 0.5}, 300, 260, 0.5, False),
        ({"pairwise": "align-uniform", "weight": 0.0}, 10, 8, 0.5, True),
    ):
        generator = torch.Generator().manual_seed(n)
        def rows(count):
            made = torch.randn(count, 6, generator=generator, dtype=torch.float64)
            return made.requires_grad_()
        x, y, more = rows(n), rows(n), rows(m)
        scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
        own = torch.arange(n).flip(0) if owner else None
        takes_more = options["pairwise"] in ("infonce", "align-uniform") and n > 9
        negatives = (0, min(m, 3)) if takes_more else (0, 0)
        parts = Objective(**options, divided=divided)(
            x, y, logit_scale=scale, logit_bias=bias, sigma=sigma, owner=own, y_extra=more,
            negatives=negatives,
        )
        parts.total.backward()
        found += [parts.total.detach(), *(
            torch.zeros(1) if value.grad is None else value.grad
            for value in (x, y, more, scale, bias)
        )]
    return torch.cat([value.double().flatten() for value in found])

def found_by(result):
    return {key: value for key, value in result.items() if key not in CALL_KEYS}

with error_exits(quiet=True, verbose=0), distributed.process_group():
    apart = float((gradients(True) - gradients(False)).abs().max())
    done = CliRunner().invoke(app, jobs["command"])
    results = [found_by(train(TrainConfig(**job))) for job in jobs["train"]]
    documents = [found_by(evaluate(EvalConfig(**job))) for job in jobs["eval"]]
    applied = [found_by(apply(ApplyConfig(**job))) for job in jobs["apply"]]
    found = [done.exit_code, done.stdout, apart, results, documents, applied]
    (out / f"{distributed.world().rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    train(TrainConfig(**jobs["train"][0]))
"""


def job(size: int, *command: str, **options: Any) -> "list[subprocess.Popen[str]]":
    """Processes that find each other as those of torchrun do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        **{"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)},
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(size)
    ]


def torchrun(*command: str) -> "subprocess.Popen[str]":
    """Two processes that torchrun starts."""
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes: "list[subprocess.Popen[str]]") -> tuple[list[int], str, str]:
    """Exit codes, and all that was printed."""
    found = [process.communicate(timeout=600) for process in processes]
    codes = [process.returncode for process in processes]
    return codes, "".join(out for out, _ in found), "".join(err for _, err in found)


def options_of(name: str) -> dict[str, Any]:
    return {**QUICK, **RUNS[name]}


def losses(run: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {
        name: [step[name] for step in steps if step[name] is not None]
        for name in ("loss", "pairwise", "pairwise_others", "divergence", "logit_scale")
    }


def files_of(folder: Path, *but: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in but
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="session")
def features(folder: Path) -> Path:
    """700 images, 640 of them with up to three captions, and 50 captions alone."""
    rng = np.random.default_rng(1)
    latent = rng.normal(size=(700, 8))
    owners = np.sort(np.concatenate([np.arange(640), rng.integers(0, 640, 300)]))
    texts = np.concatenate([latent[owners], rng.normal(size=(50, 8))])
    for name, values, width in (("i", latent, 24), ("t", texts, 16)):
        made = values @ rng.normal(size=(8, width)) + 0.5 * rng.normal(size=(len(values), width))
        np.save(folder / f"{name}.npy", made.astype(np.float32))
    of = [*map(str, owners), *[""] * 50]
    lines = [f"{row},{owner},caption {row % 900}" for row, owner in enumerate(of)]
    (folder / "t.csv").write_text("\n".join(["id,image_id,caption", *lines]))
    (folder / "i.csv").write_text("\n".join(["id", *map(str, range(700))]))
    config = ImportConfig(
        images=folder / "i.npy",
        texts=folder / "t.npy",
        image_table=folder / "i.csv",
        text_table=folder / "t.csv",
        out=folder / "features",
    )
    return import_arrays(config).features


@pytest.fixture(scope="session")
def alone(folder: Path, features: Path) -> Path:
    """All runs, by one process."""
    for name in RUNS:
        train(TrainConfig(features=features, out=folder / "1" / name, **options_of(name)))
    return folder / "1"


@dataclass(frozen=True)
class Several:
    """What the processes of one job did.

    Attributes:
        out: folder of what they wrote.
        codes: their exit codes.
        errors: what they printed on stderr.
        stdout: what each printed of the run through the command line.
        apart: largest difference of the gradients from those of an undivided objective.
        results: of all steps, by process.
    """

    out: Path
    codes: list[int]
    errors: str
    stdout: list[str]
    apart: float
    results: list[Any]


@pytest.fixture(scope="session")
def several(folder: Path, features: Path, alone: Path) -> Several:
    """All runs, evaluations and applications by several processes."""
    out = folder / "several"
    out.mkdir()
    jobs: dict[str, list[dict[str, Any]]] = {
        "train": [
            {"out": str(out / name), **options_of(name)} for name in RUNS if name != THROUGH_CLI
        ],
        "eval": evaluations(alone),
        "apply": applications(alone, out),
    }
    for some in jobs.values():
        for one in some:
            one["features"] = str(features)
    words = [*command(features, out / THROUGH_CLI, **options_of(THROUGH_CLI)), "--json", "--quiet"]
    given = json.dumps({**jobs, "command": words})
    codes, _, errors = ends(job(PROCESSES, "-c", ALL, str(out), given))
    paths = [out / f"{rank}.json" for rank in range(PROCESSES)]
    assert all(path.is_file() for path in paths), errors
    found = [json.loads(path.read_text()) for path in paths]
    exits, stdout, apart, *results = zip(*found, strict=True)
    assert set(exits) == {0}, errors
    return Several(out, codes, errors, list(stdout), max(apart), [*zip(*results, strict=True)])


def evaluations(alone: Path) -> list[dict[str, Any]]:
    adapter = str(alone / "default")
    return [
        {"adapter": adapter, "resamples": 100},
        {"adapter": adapter, "index": "ivf", "intervals": False},
    ]


def applications(alone: Path, out: Path) -> list[dict[str, Any]]:
    adapter = str(alone / "default")
    return [
        {"adapter": adapter, "out": str(out / "aligned")},
        {"adapter": adapter, "out": str(out / "npy"), "format": "npy", "dtype": "float32"},
    ]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_one_process(alone: Path, several: Several, name: str) -> None:
    expected, found = losses(alone / name), losses(several.out / name)

    assert len(expected["loss"]) == options_of(name)["steps"]
    for term, values in expected.items():
        np.testing.assert_allclose(found[term], values, rtol=CLOSE, atol=CLOSE, err_msg=term)
    for key, weights in load_file(alone / name / "adapter.safetensors").items():  # of all pairs
        refitted = load_file(several.out / name / "adapter.safetensors")[key]
        np.testing.assert_allclose(refitted, weights, atol=1e-3, err_msg=key)


def test_gradients_of_a_divided_objective_are_those_of_the_whole(several: Several) -> None:
    assert several.apart < 1e-12


def test_every_process_returns_what_the_first_does_and_that_alone_prints(several: Several) -> None:
    first = several.results[0]

    assert all(one == first for one in several.results)
    assert first[0][0]["pairs"]["validation"] > 100
    assert first[0][0]["validation"]["kept"]["mean_recall"] > 0.5
    assert json.loads(several.stdout[0])["steps"] == options_of(THROUGH_CLI)["steps"]
    assert {*several.stdout[1:]} == {""}


def test_what_one_process_cannot_do_ends_all_and_is_printed_once(several: Several) -> None:
    assert several.codes == [1] * PROCESSES
    (error,) = [line for line in errors_in(several.errors) if ": warning: " not in line]
    assert ": exists; choose another --out" in error


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a document by their path."""
    if not isinstance(value, dict | list):
        return {name: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for k, part in parts for key, leaf in flat(part, f"{name}/{k}").items()}


def test_evaluations_are_those_of_one_process(
    features: Path, alone: Path, several: Several
) -> None:
    documents = [evaluate(EvalConfig(features=features, **one)) for one in evaluations(alone)]
    expected = [
        {key: value for key, value in document.items() if key not in CALL_KEYS}
        for document in json.loads(json.dumps(documents))
    ]

    assert flat(several.results[0][1]) == pytest.approx(flat(expected))


def test_applied_sets_have_the_bytes_of_one_process(
    features: Path, alone: Path, several: Several
) -> None:
    for one in applications(alone, alone):
        apply_once(features, one)
    for name in ("aligned", "npy"):
        assert files_of(several.out / name, "config.toml") == files_of(alone / name, "config.toml")
    assert [one["pairs"] for one in several.results[0][2]] == [940, 940]


def apply_once(features: Path, options: dict[str, Any]) -> FeaturesResult | None:
    if Path(options["out"]).exists():
        return None
    return apply(ApplyConfig(features=features, **options))


def command(features: Path, out: Path, **options: Any) -> list[str]:
    words = ["train", str(features), "--out", str(out)]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def wait_for(out: Path, lines: int, process: "subprocess.Popen[str]") -> None:
    log = out.with_name(f"{out.name}.partial") / "metrics.jsonl"
    while not (log.is_file() and log.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def errors_in(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("csalign: ")]


def test_a_killed_or_stopped_process_ends_all_and_a_rerun_resumes(
    features: Path, folder: Path
) -> None:
    out, options = folder / "ended", {**QUICK, **LONG}
    partial = out.with_name("ended.partial")
    words = ["-m", "csalign", *command(features, out, **options)]
    agent = torchrun(*words, "--quiet")
    wait_for(out, 10, agent)
    os.kill(process_of(1, agent.pid), signal.SIGKILL)
    _, stdout, errors = ends([agent])

    assert stdout == ""
    assert len(errors_in(errors)) == 1, errors
    # torchrun stops the others as soon as it sees one gone.
    ended, stopped = "another process of the job has ended; run the same command", "stopped by"
    assert ended in errors or stopped in errors
    saved = [int(path.name.removeprefix("step-")) for path in (partial / "resume").iterdir()]

    processes = job(2, *words)
    wait_for(out, max(saved) + 6, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    codes, stdout, errors = ends(processes)
    state = max(path.name for path in (partial / "resume").iterdir())
    step = json.loads((partial / "metrics.jsonl").read_text().splitlines()[-1])["step"]

    assert codes == [143, 143], errors
    assert stdout == ""
    assert any(f"resuming from step {step} " in errors for step in saved)
    assert errors.count("stopped by SIGTERM; run the same command to resume") == 1
    assert state == f"step-{step:06d}"

    def progress(what: str, done: int, total: int | None) -> None:
        if what == "training: step" and done >= step + 3:
            raise Stopped(signal.SIGTERM)

    for own in (out, folder / "one"):
        with pytest.raises(Stopped):
            train(TrainConfig(features=features, out=own, **options), progress)
    found, expected = (losses(folder / f"{name}.partial")["loss"] for name in ("ended", "one"))
    assert len(found) == step + 3
    np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE)


def process_of(rank: int, parent: int) -> int:
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError
