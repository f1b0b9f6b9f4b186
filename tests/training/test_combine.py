"""The network, a kernel CCA, or both, chosen on validation and put together."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.functional import normalize

from csalign.adapters.builtin import Parts
from csalign.adapters.checkpoint import (
    load_adapter,
    load_adapter_with_info,
    read_info,
    save_adapter,
)
from csalign.adapters.kernel_cca import KernelSetting
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.core.errors import Stopped
from csalign.core.results import TrainResult
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig, ExportConfig
from csalign.runs.export import export
from csalign.training.closed_forms.combine import SEARCH, Combination, assemble, can_combine
from csalign.training.config import DataOptions, TrainConfig
from csalign.training.data import load_data
from csalign.training.network.sampler import make_sampler
from csalign.training.train import train

QUICK: dict[str, Any] = {"steps": 4, "batch_size": 64, "hidden": 8, "validations": 2}
TEXT_KERNEL = KernelSetting(side=Modality.TEXT, gamma=0.75, ridge=0.3, other_ridge=1, power=1)


def make_set(folder: Path, law: str) -> Path:
    """500 pairs, of which 100 are for validation; a curved law is one no linear map follows."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(500, 4))
    images = np.abs(latent @ rng.normal(size=(4, 6)))
    if law == "linear":  # nearly so for unit rows, as their norms hardly vary
        latent = images = np.concatenate([latent, np.full((500, 1), 10.0)], 1)
    texts = {
        "curved": np.concatenate([np.abs(latent), np.cos(2 * latent)], 1),
        "linear": latent,
    }[law]
    for name, values in (("i", images), ("t", texts)):
        noisy = values + 0.05 * rng.normal(size=values.shape)
        np.save(folder / f"{name}.npy", noisy.astype(np.float32))
    rows = [f"{row},caption {row},{'train' if row % 5 else 'val'}" for row in range(500)]
    (folder / "p.csv").write_text("\n".join(["image_id,caption,split", *rows]))
    paths = {"images": folder / "i.npy", "texts": folder / "t.npy", "pairs": folder / "p.csv"}
    return import_arrays(ImportConfig(out=folder / "set", **paths)).features


@pytest.fixture(scope="module")
def curved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("curved"), "curved")


def run(features: Path, out: Path, **values: Any) -> TrainResult:
    return train(TrainConfig(features=features, out=out, **{**QUICK, **values}))


def test_a_network_stays_where_a_kernel_is_no_better(tmp_path: Path) -> None:
    result = run(make_set(tmp_path, "linear"), tmp_path / "run")

    assert result.parts == ""
    assert "parts" not in result.validation
    assert {shape.kind for shape in read_info(tmp_path / "run").adapters.values()} == {"glu"}


def test_a_kernel_is_taken_where_the_law_is_curved(curved: Path, tmp_path: Path) -> None:
    result = run(curved, tmp_path / "run")
    shape = read_info(tmp_path / "run").adapters[Modality.IMAGE]

    assert "kernel CCA" in result.parts
    assert "parts" in result.validation
    gain = result.validation["parts"]["mean_recall"] - result.validation["kept"]["mean_recall"]
    assert gain > 0.02
    # A part that weighs nothing is not stored.
    assert (shape.kind == "parts") == ("instead of" not in result.parts)


def test_a_space_of_a_given_width_has_one_part(curved: Path, tmp_path: Path) -> None:
    result = run(curved, tmp_path / "run", width=5)

    assert result.parts.startswith("kernel CCA")
    shapes = read_info(tmp_path / "run").adapters.values()
    assert {shape.width for shape in shapes} == {5}
    assert sorted(shape.kind for shape in shapes) == ["kernel", "linear"]


def test_the_former_path_is_a_choice(curved: Path, tmp_path: Path) -> None:
    options = {"ensemble": "off", "refit": False, "unpaired_matches": False}
    result = run(curved, tmp_path / "run", **options)

    assert result.parts == ""
    assert result.refit == "not refitted: --no-refit"
    assert {shape.kind for shape in read_info(tmp_path / "run").adapters.values()} == {"glu"}


@pytest.mark.parametrize(
    ("kind", "token_width", "expected"),
    [
        ("glu", None, True),
        ("linear", None, True),
        ("glu", 6, False),
        ("identity", None, False),
        ("low-rank", None, False),
    ],
)
def test_frozen_spaces_and_tokens_are_left_alone(
    kind: str, token_width: int | None, expected: bool
) -> None:
    shapes = {
        Modality.IMAGE: SideShape(kind, 6, 6, token_width=token_width),
        Modality.TEXT: SideShape("linear", 8, 6),
    }
    assert can_combine(Adapter(shapes)) == expected


def test_networks_of_other_seeds_are_parts(curved: Path, tmp_path: Path) -> None:
    options = {
        "networks": 2,
        "ensemble": "off",
        "learning_rate": 1e-2,
        "steps": 40,
        "init": "random",
    }
    result = run(curved, tmp_path / "run", **options)
    adapter = load_adapter(tmp_path / "run")

    assert result.parts == "2 networks"
    assert result.best_step > 0
    assert result.refit.startswith("2 networks refitted on all 500 pairs")
    for side in Modality:
        own = adapter.side(side)
        assert isinstance(own, Parts)
        assert own.shares.tolist() == [0.5, 0.5]
        rows = torch.randn(20, own.shape.input_width)
        first, second = (normalize(part(rows), dim=1) for part in own.parts)
        assert (first - second).norm(dim=1).min() > 1e-3


@pytest.fixture(scope="module")
def joined(curved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two networks and a kernel, which weighs 2/3."""
    folder = tmp_path_factory.mktemp("joined")
    networks = []
    for seed in range(2):
        run(curved, folder / f"{seed}", seed=seed, ensemble="off", refit=False)
        networks.append(load_adapter(folder / f"{seed}"))
    _, info = load_adapter_with_info(folder / "0")
    options = DataOptions(features=curved, refit=False)
    data = load_data(options, out=folder / "run", seed=0)
    sampler = make_sampler(options, 0.3, data.rows, None)
    combination = Combination(kernel=TEXT_KERNEL, share=2 / 3)
    adapter = assemble(combination, networks, data.rows, sampler, None, 0)
    changed = info.model_copy(update={"adapters": adapter.shapes})
    (folder / "run").mkdir()
    save_adapter(folder / "run", adapter, changed)
    return folder / "run"


def test_a_cosine_is_the_weighted_mean_of_those_of_the_parts(curved: Path, joined: Path) -> None:
    adapter, rows = load_adapter(joined), load_rows(FeatureSet.open(curved), "val")
    inputs = {side: torch.from_numpy(np.array(rows.embeddings(side))) for side in Modality}

    def cosines(sides: dict[Modality, Any]) -> torch.Tensor:
        with torch.no_grad():
            x, y = (normalize(sides[side](inputs[side]), dim=1) for side in Modality)
        return x @ y.T

    sides = {side: adapter.side(side) for side in Modality}
    assert isinstance(adapter.image, Parts)
    assert isinstance(adapter.text, Parts)
    separate = [[*adapter.image.parts], [*adapter.text.parts]]
    parts = [
        cosines(dict(zip(Modality, both, strict=True))) for both in zip(*separate, strict=True)
    ]
    expected = (parts[0] + parts[1]) / 6 + parts[2] * 2 / 3
    assert cosines(sides).numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_all_that_reads_parts_gives_the_same_embeddings(
    curved: Path, joined: Path, tmp_path: Path
) -> None:
    adapter = load_adapter(joined)
    adapter.save(tmp_path / "saved")
    again = load_adapter(tmp_path / "saved")
    for to in ("onnx", "safetensors"):
        export(ExportConfig(run=joined, to=to, out=tmp_path / to, features=curved))
    exported = load_adapter(tmp_path / "safetensors")
    config = ApplyConfig(features=curved, adapter=joined, out=tmp_path / "set", dtype="float32")
    applied = FeatureSet.open(apply(config).features)
    for side in Modality:
        rows = np.asarray(FeatureSet.open(curved).table(side).embeddings())
        expected = adapter.embed(side, rows)
        session = onnxruntime.InferenceSession(str(tmp_path / f"onnx/{side}.onnx"))
        found = {
            "saved": again.embed(side, rows),
            "safetensors": exported.embed(side, rows),
            "batches": adapter.embed(side, rows, batch_size=7),
            "apply": np.asarray(applied.table(side).embeddings()),
            "onnx": session.run(None, {session.get_inputs()[0].name: rows})[0],
        }
        for name, values in found.items():
            np.testing.assert_allclose(values, expected, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("width", [None, 5])
def test_a_stopped_run_with_a_kernel_is_an_uninterrupted_one(
    curved: Path, tmp_path: Path, width: int | None
) -> None:
    options: dict[str, Any] = {**QUICK, "save_every": 1, "width": width}
    expected = run(curved, tmp_path / "whole", **options)
    out = tmp_path / "run"
    for what in (SEARCH, "refitting the closed form", "refitting: step", "kernel CCA of all parts"):

        def progress(now: str, done: int, total: int | None, stop: str = what) -> None:
            if now == stop:
                raise Stopped(signal.SIGTERM)

        with pytest.raises(Stopped):
            train(TrainConfig(features=curved, out=out, **options), progress)
    result = run(curved, out, **options)

    assert result.parts == expected.parts != ""
    assert "kernel CCA" in result.parts
    assert ", instead of the " in result.parts or width is None
    assert result.validation == expected.validation
    one, two = (load_file(own / "adapter.safetensors") for own in (out, tmp_path / "whole"))
    assert one.keys() == two.keys()
    for name, values in two.items():
        np.testing.assert_allclose(one[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_processes_that_wait_for_the_kernel_end_with_the_same_run(
    curved: Path, tmp_path: Path
) -> None:
    expected = run(curved, tmp_path / "one", noise=0, dropout=0)
    words = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    words += ["-m", "csalign", "train", str(curved), "--out", str(tmp_path / "two"), "--quiet"]
    for name, value in {**QUICK, "noise": 0, "dropout": 0}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    assert "kernel CCA" in expected.parts
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-3, atol=1e-3, err_msg=name)
