"""Embed the records of one part: read, decode and preprocess ahead while the network computes."""

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
from csalign.features.writer import Rows
from csalign.ingest.job import Failure
from csalign.ingest.partial_set import PartWriter
from csalign.sources.images import read_image
from csalign.sources.records.base import ImageInput, Record, TextInput

# Enough texts to find some of like length for a batch, few enough to hold their tokens.
_BATCHES_A_WINDOW = 16
_WRITES_AHEAD = 4

T = TypeVar("T")
_END = object()


class OwnedText(NamedTuple):
    """A text with what its record says of it."""

    text: TextInput
    image_id: str | None
    split: str | None


@dataclass
class Tally:
    """What became of a part's records; see `store.documents.Receipt`."""

    records: int = 0
    failed_records: int = 0
    failed_texts: int = 0
    texts_seen: int = 0


@dataclass
class Embedder:
    """Both encoders at work, with their threads; use `closing`, or `close` it.

    Attributes:
        image: None leaves images out, and their texts are on their own.
        text: None leaves texts out.
        dtype: "float16" or "float32", as the rows will be stored.
        workers: threads that decode.
        progress: told of records, once their image is done, and of texts.
        total: records in all, if that is known.
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

    def close(self) -> None:
        """Stop the threads; what waits is dropped."""
        for executor in (self._reader, self._decoders, self._writer):
            executor.shutdown(cancel_futures=True)

    def embed(self, records: Iterable[Record], volume: str, part: PartWriter) -> Tally:
        """Embed records, images first, and write them.

        Args:
            records: of one part.
            volume: name of the volume that they are from, for the list of failures.
            part: takes the rows, and what had to be left out.
        """
        work = _Part(self, volume, part, _Writes(self._writer, part))
        try:
            with closing(self._ahead(iter(records))) as ahead:
                work.embed_images(ahead)
            work.embed_texts()
            work.writes.drain()
        except BaseException:
            work.writes.cancel()
            raise
        return work.tally

    def begin(self) -> None:
        """Show what will be counted."""
        self.report("records", 0)
        if self.text is not None:
            self.report("texts", 0)

    def report(self, what: str, count: int) -> None:
        """Count what is done."""
        self.done[what] = self.done.get(what, 0) + count
        self.progress(what, self.done[what], self.total if what == "records" else None)

    def _ahead(self, records: Iterator[Record]) -> Generator[Record]:
        """The same records, read in a thread while the caller is busy."""
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
            wait(pending)  # nobody may read on when the volume is closed

    @property
    def queue(self) -> int:
        """Images that are decoded ahead: the next batch while this one is computed."""
        return 2 * self.workers + (self.image.batch_size if self.image else 1)

    def decode(self, image: ImageInput) -> Future[torch.Tensor | str]:
        """Begin to read and preprocess an image; gives the reason if it cannot be used."""
        return self._decoders.submit(self._decode, image)

    def _decode(self, image: ImageInput) -> torch.Tensor | str:
        assert self.image is not None
        try:
            return self.image.preprocess(read_image(image.read()))
        except DataError as error:
            return str(error)


@dataclass
class _Writes:
    """Rows on their way to the part, in order, a few at a time."""

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
    pixels: Future[torch.Tensor | str]  # this alone holds on to the image's bytes, until it is done


@dataclass
class _Part:
    """One part on its way through an `Embedder`."""

    embedder: Embedder
    volume: str
    part: PartWriter
    writes: _Writes
    tally: Tally = field(default_factory=Tally)
    _texts: list[OwnedText] = field(default_factory=list)
    _lost: dict[str, str] = field(default_factory=dict)  # images that were left out, and why

    def embed_images(self, records: Iterable[Record]) -> None:
        for batch in _groups(self._decoded(records), self._batch_size):
            assert self.embedder.image is not None
            pixels = torch.stack([item[1] for item in batch])
            embedded = _embedded(self.embedder.image.embed, pixels)
            self._write_images([item[0] for item in batch], embedded)
            self.embedder.report("records", len(batch))

    @property
    def _batch_size(self) -> int:
        return self.embedder.image.batch_size if self.embedder.image else 1

    def embed_texts(self) -> None:
        encoder = self.embedder.text
        if encoder is None:
            return
        for window in _groups(self._kept_texts(), encoder.batch_size * _BATCHES_A_WINDOW):
            embedded = _embedded(encoder.embed, [owned.text.caption for owned in window])
            self._write_texts(window, embedded)
            self.embedder.report("texts", len(window))

    def _decoded(self, records: Iterable[Record]) -> Iterator[tuple[_Decoding, torch.Tensor]]:
        """The images that can be used, decoded ahead, in order."""
        pending: deque[_Decoding] = deque()
        for record in records:
            self._take_in(record, pending)
            while len(pending) > self.embedder.queue:
                yield from self._usable(pending.popleft())
        while pending:
            yield from self._usable(pending.popleft())

    def _take_in(self, record: Record, pending: deque[_Decoding]) -> None:
        self.tally.records += 1
        if record.flaw is not None:
            self.tally.failed_records += 1
            self._fail(self.volume, record.row, record.flaw)
            self.embedder.report("records", 1)
            return
        image = record.image if self.embedder.image else None
        if image is not None:
            pixels = self.embedder.decode(image)
            pending.append(_Decoding(image.id, image.source, record.split, pixels))
        else:
            self.embedder.report("records", 1)
        owner = image.id if image else None
        self._texts += [OwnedText(text, owner, record.split) for text in record.texts]

    def _usable(self, decoding: _Decoding) -> Iterator[tuple[_Decoding, torch.Tensor]]:
        result = decoding.pixels.result()
        if isinstance(result, str):
            self._lose(decoding, result)
            self.embedder.report("records", 1)
        else:
            yield decoding, result

    def _lose(self, image: _Decoding, reason: str) -> None:
        self.tally.failed_records += 1
        self._lost[image.id] = reason
        self._fail(image.source, None, reason)

    def _fail(self, source: str, row: int | None, reason: str) -> None:
        self.part.failures.append(Failure(source=source, row=row, reason=reason))

    def _kept_texts(self) -> Iterator[OwnedText]:
        for owned in self._texts:
            reason = None if owned.image_id is None else self._lost.get(owned.image_id)
            if reason is None:
                self.tally.texts_seen += 1
                yield owned
            else:
                self._fail(self.volume, owned.text.row, f"its image {owned.image_id:.200} {reason}")

    def _write_images(self, batch: list[_Decoding], embedded: Embedded) -> None:
        flaws = _flaws(embedded, self.embedder.dtype)
        for position, reason in flaws.items():
            self._lose(batch[position], reason)
        columns: dict[str, Sequence[str | None]] = {
            schema.ID: [item.id for item in batch],
            schema.SOURCE: [item.source for item in batch],
            schema.SPLIT: [item.split for item in batch],
        }
        self._write(Modality.IMAGE, columns, embedded, flaws)

    def _write_texts(self, window: list[OwnedText], embedded: Embedded) -> None:
        flaws = _flaws(embedded, self.embedder.dtype)
        for position, reason in flaws.items():
            self.tally.failed_texts += 1
            self._fail(self.volume, window[position].text.row, reason)
        columns: dict[str, Sequence[str | None]] = {
            schema.ID: [owned.text.id for owned in window],
            schema.IMAGE_ID: [owned.image_id for owned in window],
            schema.CAPTION: [owned.text.caption for owned in window],
            schema.SPLIT: [owned.split for owned in window],
        }
        self._write(Modality.TEXT, columns, embedded, flaws)

    def _write(
        self,
        side: Modality,
        columns: Mapping[str, Sequence[str | None]],
        embedded: Embedded,
        flaws: Collection[int],
    ) -> None:
        kept = [row for row in range(len(embedded.embeddings)) if row not in flaws]
        if kept:
            rows = Rows(
                {name: [values[row] for row in kept] for name, values in columns.items()},
                embedded.embeddings[kept],
                None if embedded.tokens is None else [embedded.tokens[row] for row in kept],
            )
            self.writes.add(side, rows)


def _embedded(embed: Any, batch: Any) -> Embedded:
    """Embed a batch, in halves if the device has not the memory for the whole.

    Raises:
        EncoderError: it has not even the memory for a single item, or the network fails.
    """
    try:
        result: Embedded = embed(batch)
        return result
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise EncoderError(
                "the device has not the memory for a single item; choose a smaller model, "
                "--precision bfloat16 or another --device"
            ) from error
    except CsalignError:
        raise
    except RuntimeError as error:
        raise EncoderError(f"the encoder failed ({str(error).splitlines()[0]})") from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    first, second = _embedded(embed, batch[:half]), _embedded(embed, batch[half:])
    tokens = None if first.tokens is None else [*first.tokens, *(second.tokens or ())]
    return Embedded(np.concatenate([first.embeddings, second.embeddings]), tokens)


def _flaws(embedded: Embedded, dtype: str) -> dict[int, str]:
    """What the store would refuse, by position: values not finite once stored, or all of them 0."""
    flaws = {}
    for position, embedding in enumerate(embedded.embeddings):
        if not _is_finite(embedding, dtype):
            flaws[position] = f"has an embedding that is not finite in {dtype}"
        elif not embedding.astype(dtype).any():
            flaws[position] = "has an embedding of norm 0"
        elif not schema.LEAST_NORM < np.linalg.norm(embedding) < schema.MOST_NORM:
            flaws[position] = f"has an embedding of norm {np.linalg.norm(embedding):.3g}"
    for position, tokens in enumerate(embedded.tokens or ()):
        if position not in flaws and not _is_finite(tokens, dtype):
            flaws[position] = f"has tokens that are not finite in {dtype}"
    return flaws


def _is_finite(values: Floats, dtype: str) -> bool:
    with np.errstate(over="ignore"):  # an overflow is what is looked for
        return bool(np.isfinite(values.astype(dtype)).all())


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
