"""Embed the records of a part: read, decode and preprocess ahead while the network computes."""

from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from csalign.core.enums import Modality
from csalign.core.errors import CsalignError, DataError, EncoderError
from csalign.core.progress import Progress
from csalign.encoders.base import Embedded, Floats, ImageEncoder, TextEncoder
from csalign.features import schema
from csalign.features.shard import Rows
from csalign.ingest.job import Failure
from csalign.ingest.partial_set import PartWriter
from csalign.sources.images import read_image
from csalign.sources.records import ImageInput, Record, TextInput

# Batches of texts that are sorted by length together: enough to fill batches of similar length,
# few enough to hold their tokens.
_BATCHES_PER_WINDOW = 16
_WRITES_AHEAD = 4

T = TypeVar("T")
_END = object()


class OwnedText(NamedTuple):
    """A text with the image and the split of its record."""

    text: TextInput
    image_id: str | None
    split: str | None


@dataclass
class Tally:
    """Counts of a part's records; see `job.PartRecord`."""

    records: int = 0
    failed_records: int = 0
    failed_texts: int = 0
    texts_seen: int = 0


@dataclass
class Pipeline:
    """Both encoders with their threads; use under `contextlib.closing`.

    Attributes:
        image: None skips images; their texts are then on their own.
        text: None skips texts.
        dtype: "float16" or "float32", as the rows are stored.
        workers: threads that decode images.
        progress: called with counts of records (once their image is done) and of texts.
        total: records in all, if known.
    """

    image: ImageEncoder | None
    text: TextEncoder | None
    dtype: str
    workers: int
    progress: Progress
    total: int | None = None
    done: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._decoders = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self.report("records", 0)
        if self.text is not None:
            self.report("texts", 0)

    def close(self) -> None:
        """Stop the threads; waiting work is dropped."""
        for executor in (self._reader, self._decoders, self._writer):
            executor.shutdown(cancel_futures=True)

    def embed(self, records: Iterable[Record], file: str, part: PartWriter) -> Tally:
        """Embed and write the records of a part, images first.

        Args:
            records: of one part.
            file: name of their source file, for the list of failures.
            part: receives the rows and the failures.
        """
        work = _Part(self, file, part, _Writes(self._writer, part))
        try:
            with closing(self._read_ahead(iter(records))) as ahead:
                work.embed_images(ahead)
            work.embed_texts()
            work.writes.drain()
        except BaseException:
            work.writes.cancel()
            raise
        return work.tally

    def report(self, what: str, count: int) -> None:
        """Add to a count and show it."""
        self.done[what] = self.done.get(what, 0) + count
        self.progress(what, self.done[what], self.total if what == "records" else None)

    def _read_ahead(self, records: Iterator[Record]) -> Generator[Record]:
        """Yield the records, read in a thread while the caller is busy."""
        ahead = 2 * self.workers + 2
        pending = deque(self._reader.submit(next, records, _END) for _ in range(ahead))
        try:
            while (record := pending.popleft().result()) is not _END:
                pending.append(self._reader.submit(next, records, _END))
                assert isinstance(record, Record)
                yield record
        finally:
            for future in pending:
                future.cancel()
            wait(pending)  # nothing may read on after the file is closed

    @property
    def decode_ahead(self) -> int:
        """Images to decode ahead: the next batch while this one is computed."""
        return 2 * self.workers + (self.image.batch_size if self.image else 1)

    def decode(self, image: ImageInput) -> Future[torch.Tensor | str]:
        """Start reading and preprocessing an image; the result is pixels, or why it has none."""
        return self._decoders.submit(self._decode, image)

    def _decode(self, image: ImageInput) -> torch.Tensor | str:
        assert self.image is not None
        try:
            return self.image.preprocess(read_image(image.read()))
        except DataError as error:
            return str(error)


@dataclass
class _Writes:
    """Rows that wait to be written in order, a few at a time."""

    executor: ThreadPoolExecutor
    part: PartWriter
    _pending: deque[Future[None]] = field(default_factory=deque)

    def add(self, side: Modality, rows: Rows) -> None:
        self._pending.append(self.executor.submit(self.part.write, side, rows))
        if len(self._pending) > _WRITES_AHEAD:
            self._pending.popleft().result()

    def drain(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def cancel(self) -> None:
        """Wait until nothing writes any more, so that the files can be removed."""
        for future in self._pending:
            future.cancel()
        wait(self._pending)


class _Decoding(NamedTuple):
    id: str
    source: str
    split: str | None
    pixels: Future[torch.Tensor | str]  # holds the only reference to the image's bytes


@dataclass
class _Part:
    """One part on its way through a `Pipeline`."""

    pipeline: Pipeline
    file: str
    part: PartWriter
    writes: _Writes
    tally: Tally = field(default_factory=Tally)
    _texts: list[OwnedText] = field(default_factory=list)
    _skipped: dict[str, str] = field(default_factory=dict)  # reasons by image id

    def embed_images(self, records: Iterable[Record]) -> None:
        encoder = self.pipeline.image
        for batch in _groups(self._decoded(records), encoder.batch_size if encoder else 1):
            assert encoder is not None
            embedded = embed_in_halves(encoder.embed, torch.stack([item[1] for item in batch]))
            self._write_images([item[0] for item in batch], embedded)
            self.pipeline.report("records", len(batch))

    def embed_texts(self) -> None:
        encoder = self.pipeline.text
        if encoder is None:
            return
        for window in _groups(self._kept_texts(), encoder.batch_size * _BATCHES_PER_WINDOW):
            embedded = embed_in_halves(encoder.embed, [owned.text.caption for owned in window])
            self._write_texts(window, embedded)
            self.pipeline.report("texts", len(window))

    def _decoded(self, records: Iterable[Record]) -> Iterator[tuple[_Decoding, torch.Tensor]]:
        """Yield the usable images in order, decoded ahead."""
        pending: deque[_Decoding] = deque()
        for record in records:
            self._accept(record, pending)
            while len(pending) > self.pipeline.decode_ahead:
                yield from self._usable(pending.popleft())
        while pending:
            yield from self._usable(pending.popleft())

    def _accept(self, record: Record, pending: deque[_Decoding]) -> None:
        self.tally.records += 1
        if record.error is not None:
            self.tally.failed_records += 1
            self._fail(self.file, record.row, record.error)
            self.pipeline.report("records", 1)
            return
        image = record.image if self.pipeline.image else None
        if image is not None:
            pixels = self.pipeline.decode(image)
            pending.append(_Decoding(image.id, image.source, record.split, pixels))
        else:
            self.pipeline.report("records", 1)
        owner = image.id if image else None
        self._texts += [OwnedText(text, owner, record.split) for text in record.texts]

    def _usable(self, decoding: _Decoding) -> Iterator[tuple[_Decoding, torch.Tensor]]:
        result = decoding.pixels.result()
        if isinstance(result, str):
            self._skip(decoding, result)
            self.pipeline.report("records", 1)
        else:
            yield decoding, result

    def _skip(self, image: _Decoding, reason: str) -> None:
        self.tally.failed_records += 1
        self._skipped[image.id] = reason
        self._fail(image.source, None, reason)

    def _fail(self, source: str, row: int | None, reason: str) -> None:
        self.part.failures.append(Failure(source=source, row=row, reason=reason))

    def _kept_texts(self) -> Iterator[OwnedText]:
        for owned in self._texts:
            reason = None if owned.image_id is None else self._skipped.get(owned.image_id)
            if reason is None:
                self.tally.texts_seen += 1
                yield owned
            else:
                self._fail(self.file, owned.text.row, f"its image {owned.image_id:.200} {reason}")

    def _write_images(self, batch: list[_Decoding], embedded: Embedded) -> None:
        defects = _defects(embedded, self.pipeline.dtype)
        for position, reason in defects.items():
            self._skip(batch[position], reason)
        columns: dict[str, Sequence[str | None]] = {
            schema.ID: [item.id for item in batch],
            schema.SOURCE: [item.source for item in batch],
            schema.SPLIT: [item.split for item in batch],
        }
        self._write(Modality.IMAGE, columns, embedded, defects)

    def _write_texts(self, window: list[OwnedText], embedded: Embedded) -> None:
        defects = _defects(embedded, self.pipeline.dtype)
        for position, reason in defects.items():
            self.tally.failed_texts += 1
            self._fail(self.file, window[position].text.row, reason)
        columns: dict[str, Sequence[str | None]] = {
            schema.ID: [owned.text.id for owned in window],
            schema.IMAGE_ID: [owned.image_id for owned in window],
            schema.CAPTION: [owned.text.caption for owned in window],
            schema.SPLIT: [owned.split for owned in window],
        }
        self._write(Modality.TEXT, columns, embedded, defects)

    def _write(
        self,
        side: Modality,
        columns: Mapping[str, Sequence[str | None]],
        embedded: Embedded,
        defects: Collection[int],
    ) -> None:
        kept = [row for row in range(len(embedded.embeddings)) if row not in defects]
        if kept:
            rows = Rows(
                {name: [values[row] for row in kept] for name, values in columns.items()},
                embedded.embeddings[kept],
                None if embedded.tokens is None else [embedded.tokens[row] for row in kept],
            )
            self.writes.add(side, rows)


def embed_in_halves(embed: Any, batch: Any) -> Embedded:
    """Embed a batch, in halves if it does not fit into device memory.

    Raises:
        EncoderError: not even a single item fits, or the network fails.
    """
    try:
        result: Embedded = embed(batch)
        return result
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise EncoderError(
                "a single item does not fit into device memory; choose a smaller model, "
                "--precision bfloat16 or another --device"
            ) from error
    except CsalignError:
        raise
    except RuntimeError as error:
        raise EncoderError(f"the encoder failed ({str(error).splitlines()[0]})") from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    first, second = embed_in_halves(embed, batch[:half]), embed_in_halves(embed, batch[half:])
    tokens = None if first.tokens is None else [*first.tokens, *(second.tokens or ())]
    return Embedded(np.concatenate([first.embeddings, second.embeddings]), tokens)


def _defects(embedded: Embedded, dtype: str) -> dict[int, str]:
    """Return why rows cannot be stored, by position: not finite once stored, or of norm 0."""
    defects = {}
    for position, embedding in enumerate(embedded.embeddings):
        if not _is_finite(embedding, dtype):
            defects[position] = f"has an embedding that is not finite in {dtype}"
        elif not embedding.astype(dtype).any():
            defects[position] = "has an embedding of norm 0"
        elif not schema.LEAST_NORM < np.abs(embedding).max() < schema.MOST_VALUE:
            defects[position] = f"has an embedding of norm {np.linalg.norm(embedding):.3g}"
    for position, tokens in enumerate(embedded.tokens or ()):
        if position not in defects and not _is_finite(tokens, dtype):
            defects[position] = f"has tokens that are not finite in {dtype}"
    return defects


def _is_finite(values: Floats, dtype: str) -> bool:
    with np.errstate(over="ignore"):  # looking for overflows
        return bool(np.isfinite(values.astype(dtype)).all())


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
