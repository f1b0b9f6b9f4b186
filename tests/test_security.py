import ast
import html
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from csalign.cli.app import app
from csalign.core.enums import Modality
from csalign.core.errors import CsalignError, DataError
from csalign.sources.arrays.opening import read_side
from csalign.sources.images import read_image
from csalign.sources.records.open import open_source

PACKAGE = Path(__file__).parents[1] / "csalign"
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "_pickle"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
HOSTILE = [
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "</title><img src=x onerror=alert(2)>",
    "{{7*7}} ${7*7} %s [bold red]x[/nothing]",
    '"><svg/onload=alert(3)>',
    "javascript:alert(4)",
    "=cmd|'/C calc'!A0",
    "\u202egnp.exe \x1b]0;owned\x07\x1b[2J",
]


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Module, dotted name and constant keywords of each call in the package."""
    for module in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                constants = {
                    keyword.arg: getattr(keyword.value, "value", ...)
                    for keyword in node.keywords
                    if keyword.arg
                }
                yield module.relative_to(PACKAGE).as_posix(), ast.unparse(node.func), constants


def test_no_module_knows_pickle() -> None:
    for module in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & UNPICKLERS, module


def test_whatever_could_unpickle_is_told_not_to() -> None:
    found = set()
    for module, name, constants in calls():
        last = name.rpartition(".")[2]
        if name in ("torch.load", "open_clip.load_checkpoint") or last == "load_state_dict":
            is_loading = name != last and name.split(".")[0] in ("torch", "open_clip", "timm")
            if is_loading:
                assert constants.get("weights_only") is True, (module, name)
                found.add(name)
        if name.split(".")[0] == "np" and last in ("load", "read_array", "fromfile"):
            assert constants.get("allow_pickle") is False, (module, name)
            found.add(name)
        assert constants.get("allow_pickle") in (None, False), (module, name)
    assert {"torch.load", "np.lib.format.read_array"} <= found


def test_no_code_comes_from_what_is_read() -> None:
    for module, name, constants in calls():
        assert name.partition(".")[0] not in ("subprocess", "pty"), (module, name)
        assert name.rpartition(".")[2] not in ("system", "popen", "extractall"), (module, name)
        assert name not in RUNNERS, (module, name)
        assert constants.get("trust_remote_code") is not True, (module, name)
        assert constants.get("shell") is not True, (module, name)


def csalign(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A table whose captions, ids and splits are hostile, with an image each."""
    folder = tmp_path / "in <b>"
    folder.mkdir()
    lines = []
    for row, text in enumerate(HOSTILE * 3):
        name = f"{row}-<script>alert(5)<.png"
        pixels = np.random.default_rng(row).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
        split = "val" if row % 3 == 1 else "train"
        lines.append({"image": name, "id": f"{row} {text}", "caption": text, "split": split})
    lines.append({"image": "../../etc/passwd", "caption": "x", "id": "out"})
    lines.append({"image": "/etc/passwd", "caption": "x", "id": "out 2"})
    lines.append({"image": "http://127.0.0.1:9/x.png", "caption": "x", "id": "url"})
    lines.append({"image": "file:///etc/passwd", "caption": "x", "id": "url 2"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_a_strangers_captions_pass_through_everything_and_do_nothing(
    hostile: Path, tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    features, run, page = tmp_path / "features", tmp_path / "run<i>", tmp_path / "page.html"
    before = {path for path in tmp_path.rglob("*") if features not in path.parents}
    encoder = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    extracted = csalign(
        *("extract", hostile / "captions.jsonl", "--encoder", encoder, "--out", features),
        *("--id-column", "id", "--max-failures", 1),
    )
    trained = csalign(
        *("train", features, "--out", run, "--steps", 2, "--batch-size", 8, "--hidden", 4),
        *("--report", tmp_path / "training.html"),
    )
    measured = csalign(
        *("eval", features, "--adapter", run, "--split", "val", "--report", page, "--json"),
        *("--resamples", 100),
    )
    inspected = csalign("inspect", features)

    for done in (extracted, trained, measured, inspected):
        assert done.exit_code == 0, done.output
        assert "\x1b]0;" not in done.output
    failures = [json.loads(line) for line in (features / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == 4
    assert sum("outside of" in failure["reason"] for failure in failures) == 3
    assert sum("is a URL, which is not fetched" in failure["reason"] for failure in failures) == 1
    for written in (page, tmp_path / "training.html"):
        text = written.read_text(encoding="utf-8")
        outside, scripts = re.subn(r"<script[^>]*>.*?</script>", "", text, flags=re.S)
        # Plotly's settings and code, and one for each figure.
        assert scripts == text.count('class="plotly-graph-div"') + 2
        assert scripts == text.count("<script") == text.count("</script>")
        assert not re.search(r"<(svg|iframe|object|img src=x|b>|i>)", outside)
        assert "onerror=alert" not in outside.replace(html.escape(HOSTILE[2]), "")
        assert html.escape(HOSTILE[0]) in outside
    new = set(tmp_path.rglob("*")) - before
    kept = (features, run, page, tmp_path / "training.html")
    assert all(path in kept or {*path.parents} & {*kept} for path in new)


def test_members_of_archives_stay_inside(tmp_path: Path) -> None:
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("../../out.jpg", "/etc/out.jpg", "a/../../b.jpg", "ok.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(path)
    with source.open(0) as volume:
        flaws = [record.error for record in volume.records(0, len(volume))]

    assert sum(flaw is not None for flaw in flaws) == 4
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


def bomb(content: bytes, name: str = "images.npy") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def test_an_archive_that_says_more_than_it_holds_takes_no_memory(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 10)}
    np.lib.format.write_array_header_1_0(header, shape)
    (tmp_path / "a.npz").write_bytes(bomb(header.getvalue()))
    (tmp_path / "a.npy").write_bytes(header.getvalue())

    for name in ("a.npz", "a.npy"):
        with pytest.raises(DataError, match="cut short"):
            read_side(tmp_path / name, Modality.IMAGE, None)


def test_an_array_larger_than_the_memory_is_refused_unread(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": True, "shape": (1 << 40, 1 << 10)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.filelist[0].file_size = 1 << 53  # as a bomb of zeros would state truly
    vectors = read_side(tmp_path / "a.npz", Modality.IMAGE, None)

    with pytest.raises(DataError, match=r"a\.npz: .* more than is available; save it as \.npy"):
        list(vectors.chunks())


def test_hdf5_neither_leads_elsewhere_nor_decodes_giant_chunks(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(np.ones(64, np.float32).tobytes())
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("images", (8, 8), "f4", external=[(str(secret), 0, 256)])
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["x"] = np.ones((8, 8), np.float32)
    layout = h5py.VirtualLayout((8, 8), "f4")
    layout[:] = h5py.VirtualSource(tmp_path / "plain.h5", "x", (8, 8))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("images", layout)
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file["images"] = h5py.ExternalLink(tmp_path / "plain.h5", "x")
    with h5py.File(tmp_path / "chunk.h5", "w") as file:
        data = file.create_dataset(
            "images", (1 << 20, 1 << 10), "f4", chunks=(1 << 19, 1 << 10), compression="gzip"
        )
        data.id.write_direct_chunk((0, 0), b"x")

    for name, message in (
        ("external", "is stored in other files"),
        ("virtual", "is stored in other files"),
        ("linked", "no array looks like the image embeddings"),
        ("chunk", "has chunks of 2048 MiB"),
    ):
        with pytest.raises(CsalignError, match=message):
            read_side(tmp_path / f"{name}.h5", Modality.IMAGE, None)


def test_a_picture_of_many_pixels_is_refused_before_it_is_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")

    assert len(buffer.getvalue()) < 200_000
    with pytest.raises(DataError, match="more than"):
        read_image(buffer.getvalue())


def test_a_terminal_obeys_no_file_name(tmp_path: Path) -> None:
    done = csalign("inspect", tmp_path / "\x1b[2J\x1b]0;owned\x07")

    assert done.exit_code == 1
    assert "\x1b" not in done.output
    assert "\\x1b[2J" in done.output
