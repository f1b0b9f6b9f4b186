import hashlib
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import csalign
from csalign.adapters.checkpoint import AdapterInfo, load_adapter, save_adapter
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.cli.app import app
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError

COMMIT = "c" * 40


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shapes = dict.fromkeys(Modality, SideShape("linear", 4, 3))
    info = AdapterInfo(
        adapters=shapes,
        encoders=dict.fromkeys(Modality, "some"),
        start="random",
        step=0,
        logit_scale=7.0,
        bandwidth=None,
        data_fingerprint="",
        train_split="train",
    )
    folder = tmp_path / "run"
    folder.mkdir()
    save_adapter(folder, Adapter(shapes), info)
    return folder


@pytest.fixture
def hub(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub of this machine that holds the run as user/name."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = run / self.path.rpartition("/")[2].partition("?")[0]
            if not self.path.startswith("/user/name/resolve/main/") or not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield url
        server.shutdown()


def test_an_adapter_comes_from_the_hub_where_that_is_asked_for(run: Path, hub: str) -> None:
    rows = np.ones((2, 4), np.float32)
    with pytest.raises(DataError, match="no such run"):
        load_adapter("user/name", hub=False)

    expected = load_adapter(run).embed_texts(rows)
    for name in ("user/name", "hf://user/name", "hf://user/name@main"):
        np.testing.assert_array_equal(csalign.load_adapter(name).embed_texts(rows), expected)


def test_a_name_that_the_hub_has_not_is_one_line(hub: str) -> None:
    with pytest.raises(DataError, match="user/other: no such run here, and the hub has no adapter"):
        load_adapter("user/other", hub=True)


def test_a_folder_that_is_there_is_never_looked_for_elsewhere(run: Path) -> None:
    assert load_adapter(run, hub=True).image.shape.width == 3


@pytest.fixture
def cached(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of user/name in a cache of the hub, which cannot be reached."""
    repository = tmp_path / "hub" / "models--user--name"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(run, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


@pytest.mark.parametrize("name", ["user/name", "hf://user/name"])
def test_every_command_takes_a_run_from_the_hub(name: str, run: Path, cached: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 30, 4)).astype(np.float32)
    csalign.import_arrays(*rows, out="features")

    by_name = csalign.evaluate("features", adapter=name, intervals=False)
    assert by_name["adapter"] == name
    assert by_name["retrieval"] == csalign.evaluate(rows[0], rows[1], adapter=run)["retrieval"]
    assert csalign.apply("features", name, "aligned").pairs == 30
    assert csalign.index("features", "index", adapter=name)["rows"] == 30
    assert csalign.export(name, "exported", to="safetensors")["to"] == "safetensors"
    assert csalign.SentenceAdapter(name)._modality == "text"
    config = csalign.EvalConfig(features=Path("features"), adapter=name)
    assert csalign.evaluate(config)["adapter"] == name
    done = CliRunner().invoke(app, ["eval", "features", "--adapter", name, "--json"])
    assert json.loads(done.stdout)["retrieval"] == by_name["retrieval"]


@pytest.mark.parametrize("name", ["user/other", "hf://user/other"])
def test_a_run_that_is_neither_here_nor_in_the_cache_is_named(name: str, cached: Path) -> None:
    with pytest.raises(DataError, match="user/other: no such run here, and it is not in the cache"):
        load_adapter(name)


def test_a_wrong_name_in_a_folder_that_exists_is_not_looked_for_on_the_hub(cached: Path) -> None:
    Path("runs").mkdir()
    with pytest.raises(DataError, match="runs/a: no such run"):
        load_adapter("runs/a")


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[1, 2, 3, 4], [0, 0, 0, 0]], DataError, "text embeddings, row 1: has norm 0"),
        ([[1, 2, 3, float("nan")]], DataError, "text embeddings, row 0: is not finite"),
        ([[1, 2, 3, float("inf")]], DataError, "text embeddings, row 0: is not finite"),
        ([[1, 2, 3]], ShapeError, "takes width 4"),
        ([1, 2, 3, 4], ShapeError, r"shape \(4,\), not \(rows, width\)"),
        ([[1, 2, 3, 4], [1, 2]], ShapeError, "give rows of one length"),
        ([["a", "b", "c", "d"]], ShapeError, "contains text"),
    ],
)
def test_rows_without_a_direction_are_refused_by_number(
    rows: list[list[float]], error: type[Exception], message: str, run: Path
) -> None:
    with pytest.raises(error, match=message):
        load_adapter(run).embed_texts(rows)


def test_a_bad_row_of_a_later_batch_keeps_its_number(run: Path) -> None:
    rows = np.ones((7, 4), np.float32)
    rows[5] = 0
    with pytest.raises(DataError, match="row 5: has norm 0"):
        load_adapter(run).embed("image", rows, batch_size=2)


def test_a_saved_adapter_is_read_again(run: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 4))
    loaded, made = load_adapter(run), Adapter(dict.fromkeys(Modality, SideShape("mlp", 4, 3)))
    for number, adapter in enumerate((loaded, made)):
        adapter.save(tmp_path / f"saved-{number}" / "deeper")
        again = load_adapter(tmp_path / f"saved-{number}" / "deeper")
        np.testing.assert_array_equal(again.embed_images(rows), adapter.embed_images(rows))
    assert load_adapter(tmp_path / "saved-0" / "deeper").info == loaded.info
