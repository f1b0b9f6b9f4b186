"""``csalign generate``: images of texts, by an unCLIP decoder."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from csalign.adapters.checkpoint import AdapterInfo, load_adapter_with_info
from csalign.core import atomic, locks
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError, ShapeError
from csalign.core.progress import Progress, silent
from csalign.core.records import Record, read_job, write_record
from csalign.core.results import GenerateResult
from csalign.features.reader import FeatureSet
from csalign.generation.config import GenerateConfig
from csalign.generation.decoder import Decoder, DrawOptions, Statistics
from csalign.generation.prompts import Prompts, embed_prompts, stored_prompts
from csalign.generation.unclip import find_decoder, load_decoder
from csalign.report.contact_sheet import draw_sheet
from csalign.runs.load import load_adapter_for
from csalign.sources.images import read_image

log = logging.getLogger(__name__)

IMAGES = "images"
LINES = "generated.jsonl"
SHEET = "sheet.jpg"
DESCRIPTION = "generation.json"

UNIT = 0.01  # a norm that is so near to 1 is that of rows that were normalised before
FACTOR = 1.25  # between norms of one encoder's embeddings of different images
MOST_DEVIATION = 2.0

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
# What does not change the images, or is told by a fingerprint of what it holds.
_LEFT_OUT = {
    *("out", "overwrite", "prompts", "features", "split", "adapter", "allow_adapter"),
    *("text_encoder", "batch_size", "sheet", "device"),
}


class Generation(Record):
    """What decides the images that come out, on one machine.

    Attributes:
        options: of the config.
        adapter: SHA-256 of its weights.
        prompts: fingerprint of what is embedded.
        scale: norm that the embeddings are given.
    """

    FORMAT: ClassVar[str] = "csalign-generation"

    format: str = FORMAT
    options: dict[str, Any]
    adapter: str
    prompts: str
    scale: float


def generate(config: GenerateConfig, progress: Progress = silent) -> GenerateResult:
    """Map texts into the space of a decoder's images and make an image of each.

    What is finished stays in ``OUT.partial`` when the call is stopped, and the same call goes on
    from there. An image depends on its embedding, its seed and the options, not on its batch,
    but for rounding.

    Args:
        config: what to do.
        progress: told how far it is.

    Raises:
        ConfigError: options that do not go together; the run's images are not those of an encoder
            but of an adapter; or nothing tells the scale.
        DataError: no such run, prompts or features, or they cannot be used.
        DecoderError: the decoder cannot be loaded or run.
        EncoderError: the text encoder cannot be loaded or run.
        OutputError: ``config.out`` exists and is not to be replaced, or other images were begun
            there.
        ShapeError: widths do not fit: the decoder's, the adapter's or the features'.
    """
    began = time.monotonic()
    inputs = [path for path in (config.adapter, config.prompts, config.features) if path]
    atomic.check_output(config.out, overwrite=config.overwrite, inputs=tuple(inputs))
    find_decoder(config.decoder)  # before the prompts are embedded, which may take long
    prompts, info = _prompts(config)
    decoder = _decoder(config)
    _check_width(config, decoder, info)
    scale, scale_from = _scale(config, decoder.statistics, info)
    embeddings = scale * torch.from_numpy(prompts.embeddings)
    if decoder.statistics is not None:
        _check_space(config, decoder.statistics, embeddings)
    job = Generation(
        options=config.model_dump(mode="json", exclude=_LEFT_OUT),
        adapter=info.weights_sha256,
        prompts=prompts.fingerprint,
        scale=scale,
    )
    with _folder(config, job) as folder:
        records = [
            {
                "number": number,
                "id": prompts.ids[number],
                "prompt": text,
                "seed": config.seed + number,
                "file": f"{IMAGES}/{number:06d}.png",
            }
            for number, text in enumerate(prompts.texts)
        ]
        reused = _draw(records, embeddings, decoder, folder, config.batch_size, progress)
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        atomic.write_text(folder / LINES, "".join(lines))
        if config.sheet:
            paths = [folder / str(record["file"]) for record in records]
            with atomic.atomic_path(folder / SHEET) as path:
                draw_sheet(paths, prompts.texts, path)
        atomic.write_text(folder / "config.toml", config.to_toml())
        document = {
            **job.model_dump(mode="json"),
            "images": len(records),
            "family": decoder.family,
            "scale_from": scale_from,
        }
        atomic.write_json(folder / DESCRIPTION, document)
    return GenerateResult(
        out=config.out,
        images=len(records),
        reused=reused,
        decoder=decoder.family,
        scale=scale,
        scale_from=scale_from,
        seconds=round(time.monotonic() - began, 3),
    )


def _prompts(config: GenerateConfig) -> tuple[Prompts, AdapterInfo]:
    """The texts in the run's space of images, and the run's description."""
    if (config.prompts is None) == (config.features is None):
        raise ConfigError("prompts, features: give one of them")
    device = pick_device(config.device)
    if config.features is not None:
        if config.text_encoder is not None:
            raise ConfigError("text-encoder: is for --prompts; the features are embedded already")
        features = FeatureSet.open(config.features)
        adapter, info = load_adapter_for(
            features, config.adapter, config.device, config.allow_adapter
        )
        _check_frozen(config, info)
        return stored_prompts(features, config.split, adapter), info
    assert config.prompts is not None
    allow = () if config.allow_adapter is None else (config.allow_adapter,)
    adapter, info = load_adapter_with_info(config.adapter, allow=allow)
    _check_frozen(config, info)
    loaded = (adapter.to(device), info)
    return embed_prompts(config.prompts, config.text_encoder, config.adapter, loaded, device), info


def _decoder(config: GenerateConfig) -> Decoder:
    device = pick_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = "float16" if device.type == "cuda" else "float32"
    options = DrawOptions(
        device=device,
        dtype=_DTYPES[precision],
        steps=config.steps,
        guidance=config.guidance,
        size=config.size,
        noise_level=config.noise_level,
    )
    return load_decoder(config.decoder, config.prior, options)


def _check_frozen(config: GenerateConfig, info: AdapterInfo) -> None:
    """Refuse a run whose space is not that of its images' encoder."""
    kind = info.adapters[Modality.IMAGE].kind
    if kind != "identity":
        raise ConfigError(
            f"{config.adapter}: maps images too (by {kind}), into a space that no decoder knows; "
            "train with --image-adapter identity, or with --recipe text-to-image"
        )


def _check_width(config: GenerateConfig, decoder: Decoder, info: AdapterInfo) -> None:
    width = info.adapters[Modality.IMAGE].width
    if width != decoder.width:
        raise ShapeError(
            f"{config.decoder}: takes embeddings of width {decoder.width}, the run "
            f"{config.adapter} gives {width}; train it on images of the decoder's own encoder"
        )


def _scale(
    config: GenerateConfig, statistics: Statistics | None, info: AdapterInfo
) -> tuple[float, str]:
    """The norm to give the embeddings, and what told it.

    Adapters give unit rows, but decoders want what an image encoder gives, whose norms differ
    little from image to image and are far from 1.
    """
    trained_on = info.image_norm
    if trained_on is not None and abs(trained_on - 1) < UNIT:
        trained_on = None  # they were normalised before, so that nothing is known
    if config.scale != "auto":
        return config.scale, "--scale"
    if statistics is not None:
        norm = statistics.norm
        if trained_on is not None and not 1 / FACTOR < trained_on / norm < FACTOR:
            log.warning(
                "%s: was trained on images of norm %.4g, but the decoder on %.4g; are they of the "
                "decoder's own encoder?",
                *(config.adapter, trained_on, norm),
            )
        return norm, "the decoder's own training"
    if trained_on is not None:
        return trained_on, "the run's training images"
    raise ConfigError(
        "scale: neither the decoder nor the run tells the norm of its images' embeddings; name "
        "the decoder's --prior, whose statistics tell it, or give --scale"
    )


def _check_space(config: GenerateConfig, statistics: Statistics, embeddings: torch.Tensor) -> None:
    deviation = statistics.deviation(embeddings)
    if deviation > MOST_DEVIATION:
        log.warning(
            "%s: its embeddings are %.1f deviations off those of the decoder's training, where 1 "
            "is usual: was it trained on images of the decoder's own encoder?",
            *(config.adapter, deviation),
        )


@contextmanager
def _folder(config: GenerateConfig, job: Generation) -> Iterator[Path]:
    """The folder to write to, with the images of a stopped call of the same job.

    Raises:
        OutputError: another process writes there, or other images were begun.
    """
    out = config.out.resolve()
    folder = atomic.partial_path(out)
    atomic.refuse_other_work(folder, Generation.FORMAT)
    with atomic.translate_os_errors(out), locks.lock_folder(folder):
        path = folder / atomic.JOB
        found = read_job(path, Generation, restart=config.overwrite)
        if found != job:
            if found is not None and not config.overwrite and any((folder / IMAGES).glob("*.png")):
                raise OutputError(_difference(folder, found, job))
            atomic.empty_folder(folder)
            write_record(path, job)
        (folder / IMAGES).mkdir(exist_ok=True)
        yield folder
        atomic.commit(folder, out)
        (out / atomic.JOB).unlink()


def _difference(folder: Path, found: Generation, job: Generation) -> str:
    changes = [
        f"{name.replace('_', '-')} {found.options.get(name)}, not {value}"
        for name, value in job.options.items()
        if found.options.get(name) != value
    ]
    changes += ["another adapter"] * (found.adapter != job.adapter)
    changes += ["other prompts"] * (found.prompts != job.prompts)
    changes += [f"scale {found.scale:g}, not {job.scale:g}"] * (found.scale != job.scale)
    return (
        f"{folder}: holds images that were begun with {'; '.join(changes)}: go on with the same "
        "options, start anew with --overwrite, or choose another --out"
    )


def _draw(
    records: list[dict[str, Any]],
    embeddings: torch.Tensor,
    decoder: Decoder,
    folder: Path,
    batch_size: int,
    progress: Progress,
) -> int:
    """Make the images that are not there yet; returns how many were."""
    missing = [record for record in records if not _is_whole(folder / record["file"])]
    reused = len(records) - len(missing)
    progress("images", reused, len(records))
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        images = decoder.draw(
            embeddings[[record["number"] for record in batch]],
            [record["prompt"] for record in batch],
            [record["seed"] for record in batch],
        )
        for record, image in zip(batch, images, strict=True):
            with atomic.atomic_path(folder / record["file"]) as path:
                image.save(path, format="PNG")
        progress("images", reused + start + len(batch), len(records))
    return reused


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        read_image(path.read_bytes())
    except DataError:
        return False
    return True
