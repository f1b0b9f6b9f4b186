import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from csalign.cli.app import app
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig
from csalign.training.train import train

Refused = Callable[..., Result]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """A function that runs a command and expects its refusal, by exit code and message."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, code: int, message: str) -> Result:
        before = sorted(tmp_path.rglob("*"))
        done = CliRunner().invoke(app, command.split(" "))
        told = done.stderr
        assert (done.exit_code, message in " ".join(told.split())) == (code, True), (
            f"{done.exit_code}: {told!r} {done.exception!r}"
        )
        assert isinstance(done.exception, SystemExit), done.exception
        assert "Traceback" not in told
        assert done.stdout == ""
        assert sum(line.startswith("csalign: ") for line in told.splitlines()[-2:]) >= (code == 1)
        left = [path for path in tmp_path.rglob("*") if path not in before]
        # What an extraction left out is listed, and finished parts are kept.
        assert not [path for path in left if "out.partial" not in path.parts], left
        return done

    return run


def arrays(folder: Path, rows: int = 40) -> None:
    """i.npy (n, 6), t.npy (n, 5) and pairs.csv of as many pairs, in splits."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(rows, 4))
    for name, width in (("i", 6), ("t", 5)):
        values = (latent @ rng.normal(size=(4, width))).astype(np.float32)
        np.save(folder / f"{name}.npy", values)
    splits = [("train", "train", "val", "test")[row % 4] for row in range(rows)]
    lines = [f"{row},caption {row},{split}" for row, split in enumerate(splits)]
    (folder / "pairs.csv").write_text("\n".join(["image_id,caption,split", *lines]))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """The folder of `arrays`."""
    arrays(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of arrays, a feature set of them in ``f``, and a run on it in ``r``."""
    folder = tmp_path_factory.mktemp("made")
    arrays(folder)
    named = {"images": folder / "i.npy", "texts": folder / "t.npy", "pairs": folder / "pairs.csv"}
    import_arrays(ImportConfig(**named, out=folder / "f"))
    train(TrainConfig(features=folder / "f", out=folder / "r", steps=2, batch_size=8, hidden=4))
    return folder


@pytest.fixture
def features(made: Path, tmp_path: Path) -> Path:
    """A copy of them all; that of the feature set."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "f"


@pytest.fixture(params=["NFC", "NFD", "NFKC", "NFKD"])
def normal_form(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """A function that brings text into a normal form of Unicode."""
    return lambda text: unicodedata.normalize(request.param, text)
