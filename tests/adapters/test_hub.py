import hashlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

import csalign
from csalign.adapters.checkpoint import AdapterInfo, load_adapter, save_adapter
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.core.errors import DataError

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
