"""Object stores that are slow, busy or broken for a while, or for good."""

import http.client
import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import s3fs
from typer.testing import CliRunner, Result

from csalign.cli.app import app
from csalign.core import paths
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays

Plan = Callable[[int, str], str | None]
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"
BROKEN = b"<Error><Code>InternalError</Code><Message>We are sorry.</Message></Error>"


class Flaky(ThreadingHTTPServer):
    """Answers for a server behind it, or for files of a folder, but fails by a plan.

    Attributes:
        plan: what happens to a request by its number and method: None lets it through, "busy",
            "broken", "reset", "cut" (half of an answer) and "slow" do not.
        seen: requests so far.
    """

    daemon_threads = True

    def __init__(self, behind: str | Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.plan: Plan = lambda number, method: None
        self.seen: list[str] = []
        self.lock = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Flaky

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.seen.append(self.command)
            fate = self.server.plan(len(self.server.seen), self.command)
        if fate == "reset":
            self.connection.shutdown(2)
            self.close_connection = True
            return
        if fate == "slow":
            time.sleep(0.3)
        if fate in ("busy", "broken"):
            self._send(503 if fate == "busy" else 500, {}, SLOW_DOWN if fate == "busy" else BROKEN)
            return
        status, headers, content = self._pass_on(body)
        self._send(status, headers, content, cut=fate == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def _pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if isinstance(self.server.behind, Path):
            return self._file(self.server.behind / self.path.lstrip("/"))
        connection = http.client.HTTPConnection(urlsplit(self.server.behind).netloc, timeout=20)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("content-length", "transfer-encoding", "connection")
        }
        length = answer.getheader("Content-Length")
        connection.close()
        return answer.status, kept | ({"Content-Length": length} if length else {}), content

    def _file(self, path: Path) -> tuple[int, dict[str, str], bytes]:
        if not path.is_file():
            return 404, {}, b""
        content = path.read_bytes()
        given = self.headers.get("Range")
        if given is None:
            return 200, {"Accept-Ranges": "bytes", "Content-Length": str(len(content))}, content
        start, _, stop = given.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(stop) + 1]
        told = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
        return 206, {"Content-Range": told, "Content-Length": str(len(part))}, part

    def _send(
        self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.connection.shutdown(2)
            self.close_connection = True


@pytest.fixture
def store(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Flaky, str]]:
    """A flaky server before that of S3, and the URL of an empty bucket."""
    flaky = Flaky(s3_server)
    for name, value in (
        ("AWS_ENDPOINT_URL", flaky.address),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_MAX_ATTEMPTS", "2"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)  # of its five, to spare time
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{uuid.uuid4()}"
    s3fs.S3FileSystem().mkdir(name)
    yield flaky, f"s3://{name}"
    flaky.shutdown()
    flaky.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


def csalign(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("fate", ["busy", "reset", "cut"])
def test_a_store_that_fails_now_and_then_is_asked_again(
    store: tuple[Flaky, str], arrays: tuple[Path, Path], tmp_path: Path, fate: str
) -> None:
    flaky, url = store
    # A cut answer is for reads; what is written was taken all the same.
    flaky.plan = lambda number, method: (
        fate if number % 4 == 0 and (fate != "cut" or method == "GET") else None
    )
    given = ("--images", arrays[0], "--texts", arrays[1])
    away = csalign("import", *given, "--out", f"{url}/features")
    here = csalign("import", *given, "--out", tmp_path / "features")
    inspected = csalign("inspect", f"{url}/features", "--json")

    assert (away.exit_code, here.exit_code) == (0, 0), away.output
    assert inspected.exit_code == 0, inspected.output
    assert (
        json.loads(inspected.stdout)["fingerprint"]
        == FeatureSet.open(tmp_path / "features").manifest.fingerprint()
    )
    assert len(flaky.seen) >= 8


@pytest.mark.parametrize("fate", ["busy", "broken"])
def test_a_store_that_stays_away_is_given_up_with_a_word(
    store: tuple[Flaky, str], arrays: tuple[Path, Path], tmp_path: Path, fate: str
) -> None:
    flaky, url = store
    flaky.plan = lambda number, method: fate
    written = csalign("import", "--images", arrays[0], "--out", f"{url}/features")
    read = csalign("inspect", f"{url}/features")
    extracted = csalign("extract", f"{url}/photos", "--encoder", "none", "--out", tmp_path / "out")

    for done in (written, read, extracted):
        assert done.exit_code == 1, done.output
        assert "Traceback" not in done.output
        assert isinstance(done.exception, SystemExit)
        assert url in done.stderr
        assert "check the address, the keys and the network" in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 2
    flaky.plan = lambda number, method: None
    again = csalign("import", "--images", arrays[0], "--out", f"{url}/features")
    assert again.exit_code == 0, again.output
    assert csalign("inspect", f"{url}/features").exit_code == 0


@pytest.fixture
def web(
    arrays: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Flaky]:
    """A flaky web server with the arrays, and a feature set of them."""
    folder = tmp_path / "web"
    folder.mkdir()
    for path in arrays:
        shutil.copy(path, folder)
    import_arrays(ImportConfig(images=arrays[0], texts=arrays[1], out=folder / "features"))
    monkeypatch.setattr(paths, "RETRY_WAITS_S", (0.01, 0.02, 0.03))
    flaky = Flaky(folder)
    yield flaky
    flaky.shutdown()
    flaky.server_close()


@pytest.mark.parametrize("fate", ["busy", "broken", "reset", "slow"])
def test_a_web_server_that_fails_now_and_then_is_asked_again(
    web: Flaky, arrays: tuple[Path, Path], tmp_path: Path, fate: str
) -> None:
    web.plan = lambda number, method: fate if number % 3 else None
    given = ("--images", f"{web.address}/{arrays[0].name}")
    done = csalign("import", *given, "--out", tmp_path / "out")

    assert done.exit_code == 0, done.output
    found = FeatureSet.open(tmp_path / "out").images.embeddings()
    assert np.array_equal(found, np.load(arrays[0]))


@pytest.mark.parametrize("fate", ["busy", "reset", "cut"])
def test_a_web_server_that_stays_away_is_given_up_with_a_word(
    web: Flaky, arrays: tuple[Path, Path], tmp_path: Path, fate: str
) -> None:
    web.plan = lambda number, method: fate
    given = ("--images", f"{web.address}/{arrays[0].name}")
    done = csalign("import", *given, "--out", tmp_path / "out")

    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert web.address in done.stderr
    assert not (tmp_path / "out").exists()
