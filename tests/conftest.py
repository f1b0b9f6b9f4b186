"""What several tests stand on: a tiny CLIP model on disk and folders of images."""

import json
import logging
import os
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from hypothesis import settings
from moto.server import ThreadedMotoServer
from PIL import Image

from csalign.adapters.checkpoint import save_adapter, unknown_info
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.core.paths import parse_location
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays

# UMAP compiles for half a minute what then takes a second of plain Python on the rows of a test.
os.environ["NUMBA_DISABLE_JIT"] = "1"
# What matched its checksum is remembered here, not in the user's cache; subprocesses inherit it.
_CACHE = tempfile.TemporaryDirectory(prefix="csalign-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
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


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny networks take many times longer when torch splits their work over busy cores.

    Set before each test, since UMAP changes it.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """A command keeps its messages from other handlers, such as those of the next test."""
    yield
    logger = logging.getLogger("csalign")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


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


def _tiny_decoders(root: Path, width: int) -> None:
    """Decoders of the three families in diffusers' format: few small layers, random weights."""
    import diffusers
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{own}</w>" for own in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tower: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "projection_dim": width,
    }
    text = CLIPTextConfig(
        **tower,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        vocab_size=len(vocabulary),
        max_position_embeddings=16,
    )
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    blocks: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1}
    unet: dict[str, Any] = {**blocks, "norm_num_groups": 4, "cross_attention_dim": width}
    simple: dict[str, Any] = {
        **unet,
        "sample_size": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
    }
    prior = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=width,
        num_layers=1,
        num_embeddings=4,
        additional_embeddings=4,
    )
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=width)
    for mean, std in ((prior.clip_mean, prior.clip_std), (normalizer.mean, normalizer.std)):
        mean.data, std.data = torch.randn(1, width), 0.5 + torch.rand(1, width)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**tower, image_size=32, patch_size=16))

    diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=None,
        image_encoder=encoder,
        image_normalizer=normalizer,
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(text),
        unet=diffusers.UNet2DConditionModel(
            **unet,
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(2, 4),
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * width,
        ),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
        vae=diffusers.AutoencoderKL(
            **blocks,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ),
    ).save_pretrained(root / "stable")

    def super_resolution() -> Any:
        return diffusers.UNet2DModel(
            **blocks,
            norm_num_groups=4,
            sample_size=16,
            in_channels=6,
            out_channels=3,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
        )

    text_encoder = CLIPTextModelWithProjection(text)
    pipeline = diffusers.UnCLIPPipeline
    projection = vars(sys.modules[pipeline.__module__])["UnCLIPTextProjModel"]
    schedule = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample")
    pipeline(
        prior=prior,
        decoder=diffusers.UNet2DConditionModel(
            **simple, in_channels=3, out_channels=6, class_embed_type="identity"
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_proj=projection(
            clip_embeddings_dim=width, time_embed_dim=32, cross_attention_dim=width
        ),
        super_res_first=super_resolution(),
        super_res_last=super_resolution(),
        prior_scheduler=schedule,
        decoder_scheduler=diffusers.UnCLIPScheduler(variance_type="learned_range"),
        super_res_scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log"),
    ).save_pretrained(root / "karlo")

    diffusers.KandinskyV22Pipeline(
        unet=diffusers.UNet2DConditionModel(
            **simple,
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            encoder_hid_dim=width,
            encoder_hid_dim_type="image_proj",
        ),
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False),
        movq=diffusers.VQModel(
            block_out_channels=(32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            norm_type="spatial",
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
    ).save_pretrained(root / "kandinsky")
    diffusers.KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=encoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=schedule,
        image_processor=None,
    ).save_pretrained(root / "prior")


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of decoders for embeddings of width 24: stable, karlo, kandinsky and its prior."""
    root = tmp_path_factory.mktemp("decoders")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        _tiny_decoders(root, 24)
    return root


class Sided(NamedTuple):
    """A feature set of four sides, and a run that maps all of them onto one latent."""

    features: Path
    run: Path
    rows: dict[str, Any]  # embeddings of each side, in the order of its table
    latents: dict[str, Any]  # unit rows that the run maps them to
    items: dict[str, list[str]]


@pytest.fixture(scope="session")
def sided(tmp_path_factory: pytest.TempPathFactory) -> Sided:
    """60 items with image and text; 30 have audio, of which 10 twice, and 20 have depth."""
    folder, rng = tmp_path_factory.mktemp("sided"), np.random.default_rng(0)
    latent = rng.normal(size=(60, 6))
    places = {
        "image": np.arange(60),
        "text": rng.permutation(60),
        "audio": np.concatenate([np.arange(20, 50), np.arange(20, 30)]),
        "depth": np.arange(40, 60),
    }
    maps = {
        side: np.linalg.qr(rng.normal(size=(8 + n, 6)))[0] for n, side in enumerate(sorted(places))
    }
    seen = {
        side: latent[own] + 0.5 * rng.normal(size=(len(own), 6)) for side, own in places.items()
    }
    rows = {side: (own @ maps[side].T).astype(np.float32) for side, own in seen.items()}
    features, run = folder / "features", folder / "run"
    features.mkdir()
    encoders = {
        side: EncoderInfo(spec=f"{side}-encoder", width=own.shape[1]) for side, own in rows.items()
    }
    with FeatureWriter(features, encoders, "float32") as writer:
        for side, own in places.items():
            splits = ["test" if place % 3 == 0 else "train" for place in own]
            columns: dict[str, Any] = {"id": [f"{side}-{row}" for row in range(len(own))]}
            if side == "image":
                columns |= {"id": [f"i{place}" for place in own], "source": columns["id"]}
            elif side == "text":
                columns |= {"image_id": [f"i{place}" for place in own]}
                columns |= {"caption": [f"caption {place}" for place in own]}
            else:
                columns |= {"item": [f"i{place}" for place in own]}
            writer.write(side, Rows({**columns, "split": splits}, rows[side]))
    adapter = Adapter({side: SideShape("linear", own.shape[1], 6) for side, own in rows.items()})
    for side, own in maps.items():
        weight = torch.from_numpy(own.T.copy()).float()
        adapter.side(side).start_from(torch.zeros(len(own)), weight, torch.zeros(6))
    run.mkdir()
    info = unknown_info(adapter.shapes)
    specs = {side: f"{side}-encoder" for side in rows}
    save_adapter(run, adapter, info.model_copy(update={"encoders": specs, "train_split": "train"}))
    latents = {side: own / np.linalg.norm(own, axis=1, keepdims=True) for side, own in seen.items()}
    items = {side: [f"i{place}" for place in own] for side, own in places.items()}
    return Sided(features, run, rows, latents, items)
