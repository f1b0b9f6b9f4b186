"""Images and captions -> a feature set, through frozen encoders."""

import os
import shutil
import warnings
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from csalign import files
from csalign.config import ExtractConfig
from csalign.devices import pick_device
from csalign.encoders.base import Embedded, Encoder, Floats
from csalign.encoders.openclip import TokenChoice, load_encoder
from csalign.enums import Modality
from csalign.errors import DataError
from csalign.progress import Progress, silent
from csalign.results import FeaturesResult
from csalign.sources.captions import CaptionSource, ImageRecord, TextRecord, read_captions
from csalign.sources.images import read_image
from csalign.sources.tables import Columns
from csalign.store import schema
from csalign.store.manifest import FAILURES, read_manifest
from csalign.store.writer import FeatureWriter, Rows

# Enough texts to find some of like length for a batch, few enough to hold their tokens.
_BATCHES_A_WINDOW = 8
_MAX_WORKERS = 16
_REASONS_SHOWN = 3


class _Refused(DataError):
    """Too much was left out; the list of it is worth keeping."""


def extract(config: ExtractConfig, progress: Progress = silent) -> FeaturesResult:
    """Embed the images and texts of a source and write them as a feature set.

    Images that cannot be read are left out together with their captions and listed in
    ``failures.jsonl``; where that makes the command fail, the list stays in ``OUT.partial``.

    Args:
        config: what to read, with which encoder, and where to write.
        progress: told of images and texts as they are done.

    Returns:
        What was written.

    Raises:
        OutputError: `config.out` must not be written.
        DataError: the source cannot be used, or too much of it had to be left out.
        EncoderError: the encoder cannot be loaded or does not give the tokens asked for.
        ConfigError: the device does not exist here.
    """
    inputs = (config.source, config.captions, Path(config.pretrained), Path(config.model))
    files.check_output(
        config.out,
        overwrite=config.overwrite,
        inputs=tuple(path for path in inputs if path is not None),
    )
    columns = Columns(config.image_column, config.caption_column, config.split_column)
    source = read_captions(config.source, captions=config.captions, columns=columns)
    encoder = _load_encoder(config)
    with _staged_folder(config.out) as folder:
        encoders = {side: encoder.info(side) for side in Modality}
        with FeatureWriter(folder, encoders, config.dtype) as writer:
            job = _Extraction(config, source, encoder, writer, folder / FAILURES, progress)
            job.write_images()
            job.write_texts()
        files.write_text(folder / "config.toml", config.to_toml())
    counts = read_manifest(config.out).counts
    return FeaturesResult(config.out, counts.images, counts.texts, counts.pairs, counts.failures)


def _load_encoder(config: ExtractConfig) -> Encoder:
    sides = [side for side in Modality if config.tokens in (side.value, "both")]
    return load_encoder(
        config.model,
        config.pretrained,
        device=pick_device(config.device),
        precision=config.precision,
        batch_size=None if config.batch_size == "auto" else config.batch_size,
        tokens=TokenChoice(sides, config.token_space),
    )


@contextmanager
def _staged_folder(out: Path) -> Iterator[Path]:
    """A staged folder that leaves the list of failures if refused, nothing if it fails else."""
    with files.staged_folder(out, keep_on_failure=True) as folder:
        try:
            yield folder
        except _Refused:
            for side in Modality:
                shutil.rmtree(folder / side.plural, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(folder)
            raise


@dataclass
class _Extraction:
    """One run of `extract`, from a loaded encoder to what the writer got.

    Attributes:
        failure_list: where the writer lists what is left out, for messages.
        left_out: images that were left out, and why.
    """

    config: ExtractConfig
    source: CaptionSource
    encoder: Encoder
    writer: FeatureWriter
    failure_list: Path
    progress: Progress
    left_out: dict[str, str] = field(default_factory=dict)
    _examples: list[str] = field(default_factory=list)

    def write_images(self) -> None:
        """Decode, embed and write the images.

        Raises:
            _Refused: more than the allowed share could not be used, or all of them.
        """
        total = len(self.source.image_ids)
        kept = 0
        self.progress("images", 0, total)
        # Pillow warns at one size and raises at twice that; here its first limit is the limit.
        with warnings.catch_warnings(), closing(self._image_batches()) as batches:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for records, pixels in batches:
                kept += self._write_image_batch(records, self.encoder.embed_images(pixels))
                self.progress("images", kept + len(self.left_out), total)
        if not kept:
            raise self._refusal(f"0 of {total} images could be used")

    def write_texts(self) -> None:
        """Embed and write the texts whose image was not left out.

        Raises:
            _Refused: more than the allowed share of the others could not be used, or anything
                was left out although the command is strict.
        """
        total = len(self.source.captions)
        done = failed = 0
        self.progress("texts", 0, total)
        for window in _groups(self.source.texts(), self.encoder.batch_size * _BATCHES_A_WINDOW):
            records = [record for record in window if not self._lost_its_image(record)]
            if records:
                embedded = self.encoder.embed_texts([record.caption for record in records])
                failed += len(records) - self._write_text_window(records, embedded)
            self._check_share("texts", failed, total)
            done += len(window)
            self.progress("texts", done, total)
        if self.config.strict and self.writer.failures:
            raise self._refusal(
                f"{self.writer.failures} inputs were left out, which --strict forbids"
            )

    def _image_batches(self) -> Generator[tuple[list[ImageRecord], torch.Tensor]]:
        """Batches of readable images, (n, 3, h, w); those that are not are left out on the way."""
        records: list[ImageRecord] = []
        pixels: list[torch.Tensor] = []
        with closing(self._decoded_images()) as decoded:
            for record, result in decoded:
                if isinstance(result, str):
                    self._leave_out(record, result)
                    continue
                records.append(record)
                pixels.append(result)
                if len(records) == self.encoder.batch_size:
                    yield records, torch.stack(pixels)
                    records, pixels = [], []
        if records:
            yield records, torch.stack(pixels)

    def _decoded_images(self) -> Generator[tuple[ImageRecord, torch.Tensor | str]]:
        """Each image in order, preprocessed or the reason why not, decoded ahead in threads."""
        workers = self.config.workers or min(_cores(), _MAX_WORKERS)
        ahead = 2 * self.encoder.batch_size + workers
        pending: deque[tuple[ImageRecord, Future[torch.Tensor | str]]] = deque()
        executor = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        try:
            for record in self.source.images():
                pending.append((record, executor.submit(self._load, record.path)))
                if len(pending) > ahead:
                    first, future = pending.popleft()
                    yield first, future.result()
            for record, future in pending:
                yield record, future.result()
        finally:
            executor.shutdown(cancel_futures=True)

    def _load(self, path: Path) -> torch.Tensor | str:
        try:
            return self.encoder.preprocess(read_image(path))
        except DataError as error:
            return str(error)

    def _write_image_batch(self, records: list[ImageRecord], embedded: Embedded) -> int:
        flaws = _flaws(embedded, self.config.dtype)
        for position, reason in flaws.items():
            self._leave_out(records[position], reason)
        columns: dict[str, Sequence[str | None]] = {
            schema.ID: [record.id for record in records],
            schema.SOURCE: [record.path.as_posix() for record in records],
            schema.SPLIT: [record.split for record in records],
        }
        return self._write(Modality.IMAGE, columns, embedded, flaws)

    def _write_text_window(self, records: list[TextRecord], embedded: Embedded) -> int:
        flaws = _flaws(embedded, self.config.dtype)
        for position, reason in flaws.items():
            self._fail(self.source.table, records[position].row, reason)
        columns: dict[str, Sequence[str | None]] = {
            schema.ID: [record.id for record in records],
            schema.IMAGE_ID: [record.image_id for record in records],
            schema.CAPTION: [record.caption for record in records],
            schema.SPLIT: [record.split for record in records],
        }
        return self._write(Modality.TEXT, columns, embedded, flaws)

    def _write(
        self,
        side: Modality,
        columns: Mapping[str, Sequence[str | None]],
        embedded: Embedded,
        flaws: Collection[int],
    ) -> int:
        """Write the rows without a flaw and return how many they are."""
        kept = [row for row in range(len(embedded.embeddings)) if row not in flaws]
        if kept:
            rows = Rows(
                {name: [values[row] for row in kept] for name, values in columns.items()},
                embedded.embeddings[kept],
                None if embedded.tokens is None else [embedded.tokens[row] for row in kept],
            )
            self.writer.write(side, rows)
        return len(kept)

    def _lost_its_image(self, record: TextRecord) -> bool:
        reason = None if record.image_id is None else self.left_out.get(record.image_id)
        if reason is None:
            return False
        self._fail(self.source.table, record.row, f"its image {record.image_id} {reason}")
        return True

    def _leave_out(self, record: ImageRecord, reason: str) -> None:
        self.left_out[record.id] = reason
        self._fail(record.path, None, reason)
        self._check_share("images", len(self.left_out), len(self.source.image_ids))

    def _fail(self, source: Path, row: int | None, reason: str) -> None:
        self.writer.fail(source.as_posix(), row, reason)
        if len(self._examples) < _REASONS_SHOWN:
            where = f"{source}" if row is None else f"{source}, row {row}"
            self._examples.append(f"{where} {reason}")

    def _check_share(self, what: str, failed: int, total: int) -> None:
        # Asked at each failure, so that a run that cannot succeed does not go on.
        limit = self.config.max_failures
        if failed > limit * total:
            raise self._refusal(
                f"{failed} of {total} {what} could not be used so far, the share allowed is "
                f"{limit:g} (--max-failures)"
            )

    def _refusal(self, problem: str) -> _Refused:
        examples = "; ".join(self._examples)
        return _Refused(f"{problem}: {examples}; repair or remove what {self.failure_list} lists")


def _flaws(embedded: Embedded, dtype: str) -> dict[int, str]:
    """What the store would refuse, by position: values not finite once stored, or all of them 0."""
    flaws = {}
    for position, embedding in enumerate(embedded.embeddings):
        if not _is_finite(embedding, dtype):
            flaws[position] = f"has an embedding that is not finite in {dtype}"
        elif not embedding.astype(dtype).any():
            flaws[position] = "has an embedding of norm 0"
    for position, tokens in enumerate(embedded.tokens or ()):
        if position not in flaws and not _is_finite(tokens, dtype):
            flaws[position] = f"has tokens that are not finite in {dtype}"
    return flaws


def _is_finite(values: Floats, dtype: str) -> bool:
    with np.errstate(over="ignore"):  # an overflow is what is looked for
        return bool(np.isfinite(values.astype(dtype)).all())


def _groups(records: Iterable[TextRecord], size: int) -> Iterator[list[TextRecord]]:
    rest = iter(records)
    while group := list(islice(rest, size)):
        yield group


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # what a container or batch system allows
    return os.cpu_count() or 1
