"""``csalign generate``: images from text with an unCLIP decoder."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from csalign.adapters.checkpoint import AdapterInfo, load_adapter, read_info
from csalign.core import atomic, locks, outputs
from csalign.core.arrays import Array
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError, ShapeError, Stopped
from csalign.core.progress import Progress, silent, tick
from csalign.core.records import Record, read_job, write_record
from csalign.core.results import GenerateResult
from csalign.encoders.base import EncoderOptions, is_trusted, load_encoders
from csalign.features.checks import check_directions
from csalign.features.join import load_side
from csalign.features.reader import FeatureSet
from csalign.generation.config import GenerateConfig, PromptOptions
from csalign.generation.unclip import Decoder, find_decoder
from csalign.report.page import Entry, Section, write_page
from csalign.report.thumbnails import Pictures
from csalign.runs.load import check_encoder, embed_rows, load_adapter_for
from csalign.sources.images import read_image
from csalign.sources.records.open import SourceOptions, open_source

log = logging.getLogger(__name__)

IMAGES = "images"
LINES = "generated.jsonl"
SHEET = "sheet.html"
THUMBNAIL = 256  # pixels
MOST_IMAGES = 100  # on a page
DESCRIPTION = "generation.json"
ENTRIES = frozenset({IMAGES, LINES, SHEET, DESCRIPTION, "config.toml"})
"""Names in the output folder."""
UNIT_TOLERANCE = 0.01  # norms this close to 1 are of rows that were normalised before
MAX_DEVIATION = 2.0
# Options that do not change the images, or whose content has a fingerprint.
_IGNORED = {"out", "overwrite", "batch_size", "report", "sheet", "device"}
_IGNORED |= PromptOptions.model_fields.keys()


@dataclass(frozen=True)
class Prompts:
    """Texts in the space of images."""

    ids: Sequence[str]
    texts: Sequence[str]  # "" where an embedding has none
    embeddings: Array  # (n, d) float32, unit rows
    fingerprint: str  # of the texts and of the encoder that embedded them


def load_prompts(options: PromptOptions) -> tuple[Prompts, AdapterInfo]:
    """Load the texts, and the description of the run that maps them.

    Raises:
        ConfigError: options do not go together, or the run maps images too or names no encoder.
        DataError: no such run, prompts or features, or a text that cannot be used.
        EncoderError: the text encoder cannot be loaded or run.
    """
    run, info = options.adapter, read_info(options.adapter)
    kind = info.adapters[Modality.IMAGE].kind
    if kind != "identity":
        raise ConfigError(
            f"{run}: maps images too (with {kind}), into a space that no decoder knows; train with "
            "--image-adapter identity, or with --recipe text-to-image"
        )
    if options.prompts is not None:
        return _embed_prompts(options, options.prompts, info), info
    assert options.features is not None
    features = FeatureSet.open(options.features)
    adapter, _ = load_adapter_for(features, run, options)
    rows = load_side(features, options.split, Modality.TEXT)
    if not len(rows.texts):
        raise DataError(f"{rows.name}: has no texts; name another --split")
    check_directions(rows.texts, rows.text_ids, f"{rows.name}: texts")
    texts = [caption or "" for caption in rows.captions.to_pylist()]
    embeddings = embed_rows(adapter, Modality.TEXT, rows, features)
    fingerprint = f"{features.manifest.fingerprint()} {options.split}"
    return Prompts(rows.text_ids.to_pylist(), texts, embeddings, fingerprint), info


def _embed_prompts(options: PromptOptions, file: Path, info: AdapterInfo) -> Prompts:
    run, shape, device = options.adapter, info.adapters[Modality.TEXT], pick_device(options.device)
    allow = () if options.allow_adapter is None else (options.allow_adapter,)
    adapter = load_adapter(run, allow=allow).to(device)
    if adapter.side(Modality.TEXT).embeds_with_tokens:
        raise ConfigError(
            f"{run}: embeds texts with their tokens; extract features of the prompts with "
            "csalign extract --tokens text, and pass them with --features"
        )
    spec = options.text_encoder or info.encoders[Modality.TEXT]
    if options.text_encoder is None and not is_trusted(spec):
        raise ConfigError(
            f"{run}: was trained on texts of {spec}, which is unknown or runs code from outside "
            "csalign; allow it with --text-encoder if you trust it, or pass --features"
        )
    ids, texts = _read_prompts(file)
    encoder: Any = load_encoders(None, spec, EncoderOptions(device=device)).text
    if encoder.info.width != shape.input_width:
        raise ShapeError(
            f"{spec}: gives embeddings of width {encoder.info.width}, the adapter {run} takes "
            f"{shape.input_width}; name the encoder that it was trained on with --text-encoder"
        )
    pairs = {Modality.TEXT: (encoder.info, info.encoder(Modality.TEXT))}
    remedy, insist = "name that encoder with --text-encoder", options.any_encoder
    check_encoder(pairs, str(file), f"{run} was trained on", remedy, any_encoder=insist)
    raw = encoder.embed(texts).embeddings
    bad = np.flatnonzero(~(np.isfinite(raw).all(1) & raw.any(1)))
    if len(bad):
        raise DataError(
            f"{file}: the embedding of prompt {texts[bad[0]]!r:.200} has no direction (it is 0 or "
            "not finite); rephrase or remove it"
        )
    content = json.dumps([encoder.info.model_dump(mode="json"), ids, texts])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    return Prompts(ids, texts, adapter.embed(Modality.TEXT, raw), fingerprint)


def _read_prompts(file: Path) -> tuple[list[str], list[str]]:
    source = open_source(str(file), SourceOptions(kind="captions"))
    ids: list[str] = []
    texts: list[str] = []
    for position in range(len(source.files)):
        with source.open(position) as opened:
            for record in opened.records(0, len(opened)):
                if record.error is not None:
                    where = "" if record.row is None else f", row {record.row}"
                    raise DataError(f"{opened.name}{where}: {record.error}; correct or remove it")
                ids += [text.id for text in record.texts]
                texts += [text.caption for text in record.texts]
    if not texts:
        raise DataError(f"{file}: has no prompts; write one per line")
    return ids, texts


class Generation(Record):
    """All that determines the images."""

    FORMAT: ClassVar[str] = "csalign-generation"

    format: str = FORMAT
    options: dict[str, Any]
    adapter: str  # SHA-256 of its weights
    prompts: str  # fingerprint of the texts and their encoder
    scale: float


def generate(config: GenerateConfig, progress: Progress = silent) -> GenerateResult:
    """Map texts into the space of a decoder's images and draw an image of each.

    Finished images stay in ``OUT.partial`` when the call is stopped, and the same call resumes from
    there. An image depends on its embedding, its seed and the options, not on its batch.

    Raises:
        ConfigError: options do not go together, the run maps images too, or no norm is known.
        DataError: no such run, prompts or features, or they cannot be used.
        DecoderError, EncoderError: a network cannot be loaded or run.
        OutputError: ``config.out`` or ``OUT.partial`` exists and is not to be replaced.
        ShapeError: the widths of decoder, adapter and features do not fit.

    >>> import csalign
    >>> csalign.generate(prompts="p.txt", adapter="run", decoder="nowhere", out="images")
    Traceback (most recent call last):
    csalign.core.errors.DecoderError: ...
    """
    began = time.monotonic()
    config.check()
    if config.report is not None:
        outputs.check_page(config.report)
    inputs = tuple(path for path in (config.adapter, config.prompts, config.features) if path)
    outputs.check_output(config.out, ENTRIES, overwrite=config.overwrite, inputs=inputs)
    folder, family = find_decoder(config.decoder)  # fails before the prompts are embedded
    prompts, info = load_prompts(config)
    tick("loading the decoder")
    decoder = family(folder, config)
    width = info.adapters[Modality.IMAGE].width
    if width != decoder.width:
        raise ShapeError(
            f"{config.decoder}: takes embeddings of width {decoder.width}, the run "
            f"{config.adapter} gives {width}; train it on images of the decoder's own encoder"
        )
    scale, scale_from = _choose_scale(config, decoder, info)
    embeddings = scale * torch.from_numpy(prompts.embeddings)
    deviation = 1.0 if decoder.statistics is None else decoder.statistics.deviation(embeddings)
    if deviation > MAX_DEVIATION:
        log.warning(
            "%s: its embeddings are %.1f standard deviations from those that the decoder was "
            "trained on, where 1 is usual: was it trained on images of the decoder's own encoder?",
            *(config.adapter, deviation),
        )
    job = Generation(
        options=config.model_dump(mode="json", exclude=_IGNORED),
        adapter=info.weights_sha256,
        prompts=prompts.fingerprint,
        scale=scale,
    )
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
    with _open_folder(config, job) as folder:
        reused = _draw(records, embeddings, decoder, folder, config.batch_size)
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        atomic.write_text(folder / LINES, "".join(lines))
        if config.sheet:
            _write_page(folder / SHEET, config.out.name, folder, records)
        atomic.write_text(folder / "config.toml", config.to_toml())
        rest = {"images": len(records), "family": decoder.family, "scale_from": scale_from}
        atomic.write_json(folder / DESCRIPTION, job.model_dump(mode="json") | rest)
    if config.report is not None:
        _write_page(config.report, config.out.name, config.out, records)
    return GenerateResult(
        out=config.out,
        images=len(records),
        reused=reused,
        decoder=decoder.family,
        scale=scale,
        scale_from=scale_from,
        seconds=round(time.monotonic() - began, 3),
    )


def _write_page(page: Path, title: str, folder: Path, records: list[dict[str, Any]]) -> None:
    """Write a page of the first images in a folder and their prompts."""
    shown = Pictures(THUMBNAIL)
    pictures = [
        Entry(
            record["prompt"] or record["id"],
            f"{record['number']}.  seed {record['seed']}",
            shown.thumbnail(str(folder / record["file"])),
        )
        for record in records[:MOST_IMAGES]
    ]
    note = f"{len(pictures):,} of {len(records):,} images."
    write_page(page, title, [Section(title, note, pictures=pictures)])


def _choose_scale(config: GenerateConfig, decoder: Decoder, info: AdapterInfo) -> tuple[float, str]:
    """Choose the norm of the embeddings, as of the decoder's image encoder; and its source."""
    if config.scale != "auto":
        return config.scale, "--scale"
    if decoder.statistics is not None:
        return decoder.statistics.norm, "the decoder's training data"
    trained_on = info.image_norm
    if trained_on is not None and abs(trained_on - 1) > UNIT_TOLERANCE:
        return trained_on, "the run's training images"
    raise ConfigError(
        "--scale: neither the decoder nor the run has the norm of its images' embeddings; name the "
        "decoder's --prior, or pass --scale"
    )


@contextmanager
def _open_folder(config: GenerateConfig, job: Generation) -> Iterator[Path]:
    """Open the folder to write to, with the images of a stopped call, and commit it afterwards."""
    out = config.out.resolve()
    folder = outputs.partial_path(out)
    outputs.refuse_other_work(folder, Generation.FORMAT)
    with atomic.translate_os_errors(out), locks.lock_folder(folder):
        path = folder / outputs.JOB
        found = read_job(path, Generation, restart=config.overwrite)
        if found != job:
            if found is not None and not config.overwrite and any((folder / IMAGES).glob("*.png")):
                before, now = ({**each.options, **dict(each)} for each in (found, job))
                changes = [
                    f"{name} {before.get(name)!s:.12}, not {value!s:.12}"
                    for name, value in now.items()
                    if name != "options" and before.get(name) != value
                ]
                raise OutputError(
                    f"{folder}: has images generated with {'; '.join(changes)}: rerun with the "
                    "same options, discard them with --overwrite, or choose another --out"
                )
            outputs.empty_folder(folder)
            write_record(path, job)
        (folder / IMAGES).mkdir(exist_ok=True)
        try:
            yield folder
        except Stopped as stopped:
            stopped.resumes = True
            raise
        outputs.commit(folder, out)
        (out / outputs.JOB).unlink()


def _draw(
    records: list[dict[str, Any]],
    embeddings: torch.Tensor,
    decoder: Decoder,
    folder: Path,
    batch_size: int,
) -> int:
    """Draw the images that are missing; returns the number of those that were there."""
    missing = [record for record in records if not _is_complete(folder / record["file"])]
    reused = len(records) - len(missing)
    tick("generating: images", reused, len(records))
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
        tick("generating: images", reused + start + len(batch), len(records))
    return reused


def _is_complete(path: Path) -> bool:
    try:
        return read_image(path.read_bytes()) is not None
    except (FileNotFoundError, DataError):
        return False
