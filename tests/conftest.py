"""What several tests stand on: a tiny CLIP model on disk and folders of images."""

import json
import os
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from hypothesis import settings
from moto.server import ThreadedMotoServer
from PIL import Image

from csalign.config import ImportConfig
from csalign.enums import Modality
from csalign.locations import parse_location
from csalign.steps.import_arrays import import_arrays
from csalign.store.manifest import EncoderInfo
from csalign.store.shard import Rows
from csalign.store.writer import FeatureWriter

# UMAP compiles for half a minute what then takes a second of plain Python on the rows of a test.
os.environ["NUMBA_DISABLE_JIT"] = "1"
# A loaded machine must not fail a test: results are asserted, never seconds. The examples are the
# same each time, so that a change is judged by what it changed.
settings.register_profile("csalign", deadline=None, derandomize=True)
settings.load_profile("csalign")

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny networks lose time, not win it, when torch splits their work over the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Config file and checkpoint of a CLIP of two small layers a side, with fixed weights."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    model = folder / "tiny-clip.json"
    model.write_text(json.dumps(TINY_CLIP))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = open_clip.CLIP(**TINY_CLIP)
    weights = folder / "tiny-clip.safetensors"
    safetensors.torch.save_file(network.state_dict(), weights)
    return model, weights


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server in this process."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty bucket of a local S3 server, as commands find it: by its URL alone."""
    for name, value in (
        ("AWS_ENDPOINT_URL", s3_server),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{uuid.uuid4()}"
    s3fs.S3FileSystem().mkdir(name)
    return parse_location(f"s3://{name}")


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes images of noise under a folder and returns the folder."""

    def make(*names: str, folder: str = "photos", size: tuple[int, int] = (40, 36)) -> Path:
        root = tmp_path / folder
        for seed, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
            Image.fromarray(pixels).save(path)
        return root

    return make


@pytest.fixture
def write_tokens(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes pairs with tokens: images 12 wide, texts 10 wide, unless told.

    A pair shares a latent, of which its embeddings and tokens are noisy views. Some rows have no
    tokens. The last fifth is split "test", the fifth before it "val".
    """

    def write(
        name: str = "tokens",
        *,
        rows: int = 120,
        sides: Collection[Modality] = tuple(Modality),
        dtype: str = "float32",
        most: int = 7,
        widths: tuple[int, int] = (12, 10),
        token_widths: tuple[int, int] | None = None,
    ) -> Path:
        rng = np.random.default_rng(0)
        latent = rng.normal(size=(rows, 6))
        splits = [
            ("train", "train", "train", "val", "test")[5 * row // rows] for row in range(rows)
        ]
        folder = tmp_path / name
        folder.mkdir()
        encoders, stored = {}, {}
        for side, width, token_width in zip(Modality, widths, token_widths or widths, strict=True):
            to_row, to_token = rng.normal(size=(6, width)), rng.normal(size=(6, token_width))
            if token_width == width:
                to_token = to_row
            counts = rng.integers(0, most + 1, rows)
            views = [
                own + 0.5 * rng.normal(size=(k, 6)) for own, k in zip(latent, counts, strict=True)
            ]
            tokens = [view @ to_token for view in views]
            embeddings = (latent + 0.2 * rng.normal(size=latent.shape)) @ to_row
            has = side in sides
            encoders[side] = EncoderInfo(
                spec="made up",
                width=width,
                token_width=token_width if has else None,
                token_space="projected" if has else None,
            )
            ids = [str(row) for row in range(rows)]
            columns: dict[str, Any] = {"id": ids, "split": splits}
            if side is Modality.TEXT:
                columns |= {"image_id": ids, "caption": [f"caption {row}" for row in ids]}
            stored[side] = Rows(columns, embeddings, tokens if has else None)
        with FeatureWriter(folder, encoders, dtype) as writer:
            for side, own in stored.items():
                writer.write(side, own)
        return folder

    return write


@pytest.fixture
def arrays(tmp_path: Path) -> tuple[Path, Path]:
    """Two .npy files of 300 pairs that share a latent: images 24 wide, texts 16 wide."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(300, 8))
    paths = (tmp_path / "images.npy", tmp_path / "texts.npy")
    for path, width in zip(paths, (24, 16), strict=True):
        mixed = latent @ rng.normal(size=(8, width)) + 0.7 * rng.normal(size=(300, width))
        np.save(path, mixed.astype(np.float32))
    return paths


@pytest.fixture
def features(arrays: tuple[Path, Path], tmp_path: Path) -> Path:
    """The arrays as a feature set: 200 training, 40 validation and 60 test pairs."""
    splits = ["train"] * 200 + ["val"] * 40 + ["test"] * 60
    table = tmp_path / "texts.csv"
    lines = [f"{row},caption {row},{split}" for row, split in enumerate(splits)]
    table.write_text("\n".join(["image_id,caption,split", *lines]))
    out = tmp_path / "features"
    import_arrays(ImportConfig(images=arrays[0], texts=arrays[1], pairs=table, out=out))
    return out
