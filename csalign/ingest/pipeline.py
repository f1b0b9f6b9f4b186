"""Embed the records of a part: read, decode and preprocess ahead while the network computes."""

import logging
from collections import Counter, deque
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from csalign.core.enums import Modality
from csalign.core.errors import CsalignError, DataError, EncoderError, reason_of
from csalign.core.figures import counted
from csalign.core.progress import show_figures, tick
from csalign.encoders.base import Embedded, Encoders
from csalign.features import schema
from csalign.features.checks import find_unusable
from csalign.features.writer import Rows
from csalign.ingest.job import DIGEST_BYTES, Failure, PartRecord
from csalign.ingest.partial_set import PartWriter
from csalign.sources.images import read_image
from csalign.sources.records import ImageInput, Record, TextInput

# Batches of texts that are sorted by length together: enough to fill batches of similar length,
# few enough to hold their tokens.
_BATCHES_PER_WINDOW = 16
_WRITES_AHEAD = 4
_MOST_LABELS = 1 << 20  # whose images are compared, which bounds the memory

logger = logging.getLogger(__name__)

T = TypeVar("T")
Columns = Mapping[str, Sequence[str | None]]
_END = object()


@dataclass
class Pipeline:
    """Both encoders with their threads; use under `contextlib.closing`."""

    encoders: Encoders  # without one for images, texts belong to no image
    dtype: str  # "float16" or "float32", as the rows are stored
    workers: int  # threads that decode images
    total: int | None = None  # records in all, if known
    done: Counter[str] = field(
        default_factory=Counter
    )  # records (once their image is), texts, failures
    notes: dict[str, list[str]] = field(default_factory=dict)  # on pixels, with their images
    labels: dict[int, bytes] = field(default_factory=dict)  # digest of the first image by hash

    def __post_init__(self) -> None:
        self.decoders = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self.report("records", 0)
        if self.encoders.text is not None:
            self.report("texts", 0)

    def close(self) -> None:
        """Stop the threads; waiting work is dropped. Warn of what was noticed in the pixels."""
        for executor in (self.reader, self.decoders, self.writer):
            executor.shutdown(cancel_futures=True)
        for what, images in self.notes.items():
            logger.warning("%s %s (such as %s)", counted(len(images), "image"), what, images[0])

    def embed(self, records: Iterable[Record], file: str, part: PartWriter) -> None:
        """Embed and write the records of a part, images first; failures name their `file`."""
        work = _Part(self, file, part)
        try:
            with closing(self._read_ahead(iter(records))) as ahead:
                work.embed_images(ahead)
            work.embed_texts()
            work.finish_writes(0)
        except BaseException:
            _cancel(work.writes)  # so that the files can be removed
            raise

    def report(self, what: str, count: int) -> None:
        """Add to a count and show it."""
        self.done[what] += count
        has_images = self.encoders.image is not None
        phase = (
            ("encoding images" if has_images else "reading")
            if what == "records"
            else "encoding texts"
        )
        tick(f"{phase}: {what}", self.done[what], self.total if what == "records" else None)
        show_figures({name: f"{n:,}" for name, n in self.done.items() if n and name != what})

    def count_again(self, record: PartRecord) -> PartRecord:
        """Report the counts of a part that was finished before."""
        self.done["failures"] += len(record.failures)
        self.report("records", record.records)
        self.report("texts", record.texts_seen)
        return record

    def _read_ahead(self, records: Iterator[Record]) -> Generator[Record]:
        """Yield the records, read in a thread while the caller is busy."""
        ahead = 2 * self.workers + 2
        pending = deque(self.reader.submit(next, records, _END) for _ in range(ahead))
        try:
            while (record := pending.popleft().result()) is not _END:
                pending.append(self.reader.submit(next, records, _END))
                assert isinstance(record, Record)
                yield record
        finally:
            _cancel(pending)  # nothing may read on after the file is closed


class _Decoding(NamedTuple):
    id: str
    source: str
    split: str | None
    may_join: bool  # an earlier image that equals it
    labels: Sequence[tuple[str, str]]
    # The pixels and the digest of `PartRecord`, or why there are none; holds the only image bytes.
    pixels: Future[tuple[torch.Tensor, bytes] | str]


class _OwnedText(NamedTuple):
    text: TextInput
    image_id: str | None
    split: str | None


@dataclass
class _Part:
    """One part on its way through a `Pipeline`."""

    pipeline: Pipeline
    file: str
    part: PartWriter
    _texts: list[_OwnedText] = field(default_factory=list)
    _skipped: dict[str, str] = field(default_factory=dict)  # reasons by image id
    _known: dict[Any, str] = field(default_factory=dict)  # image ids by digest and split
    _joined: dict[str, str] = field(default_factory=dict)  # id of the image that another equals
    writes: deque[Future[None]] = field(default_factory=deque)

    def embed_images(self, records: Iterable[Record]) -> None:
        encoder = self.pipeline.encoders.image
        for batch in _groups(self._decoded(records), encoder.batch_size if encoder else 1):
            assert encoder is not None
            images, pixels, digests = zip(*batch, strict=True)
            embedded = embed_in_halves(encoder.embed, torch.stack(pixels))
            defects = self._defects(embedded)
            for row, reason in defects.items():
                self._skip(images[row], reason)
            self.part.digests += b"".join(
                digest for row, digest in enumerate(digests) if row not in defects
            )
            columns: Columns = {
                schema.ID: [image.id for image in images],
                schema.SOURCE: [image.source for image in images],
                schema.SPLIT: [image.split for image in images],
            }
            self._write(Modality.IMAGE, columns, embedded, defects)
            self.pipeline.report("records", len(batch))

    def embed_texts(self) -> None:
        encoder = self.pipeline.encoders.text
        if encoder is None:
            return
        cut: list[int] = getattr(encoder, "cut", [])
        for window in _groups(self._kept_texts(), encoder.batch_size * _BATCHES_PER_WINDOW):
            cut.clear()
            embedded = embed_in_halves(encoder.embed, [owned.text.caption for owned in window])
            self.part.counts["cut_texts"] += len(cut)
            self.part.counts["longest_text"] = max(self.part.counts["longest_text"], *cut, 0)
            defects = self._defects(embedded)
            for row, reason in defects.items():
                self.part.counts["failed_texts"] += 1
                self._fail(self.file, window[row].text.row, reason)
            columns: Columns = {
                schema.ID: [owned.text.id for owned in window],
                schema.IMAGE_ID: [owned.image_id for owned in window],
                schema.CAPTION: [owned.text.caption for owned in window],
                schema.SPLIT: [owned.split for owned in window],
            }
            self._write(Modality.TEXT, columns, embedded, defects)
            self.pipeline.report("texts", len(window))

    def _decoded(self, records: Iterable[Record]) -> Iterator[tuple[_Decoding, Any, bytes]]:
        """Yield the usable images in order, decoded ahead: the next batch during this one."""
        encoder = self.pipeline.encoders.image
        ahead = 2 * self.pipeline.workers + (encoder.batch_size if encoder else 1)
        for image in _run_ahead(self._decoding(records), ahead):
            result = image.pixels.result()
            if isinstance(result, str):
                self._skip(image, result)
            elif image.may_join and (key := (result[1], image.split)) in self._known:
                self._joined[image.id] = self._known[key]
                self.part.counts["joined"] += 1
            else:
                self._compare_labels(image, result[1])
                self._known.setdefault((result[1], image.split), image.id)
                yield image, *result
                continue
            self.pipeline.report("records", 1)

    def _compare_labels(self, image: _Decoding, digest: bytes) -> None:
        """Note an image that has a label of an earlier one of other bytes."""
        seen, labels = self.pipeline.labels, {hash(own): own[0] for own in image.labels}
        name = next((labels[own] for own in labels if seen.get(own, digest) != digest), None)
        if name is not None:
            what = (
                f"with the {name} of an earlier one but other bytes, kept apart, which evaluation "
                f"counts as wrong answers for each other; if they are one, pass --id-column {name}"
            )
            self.pipeline.notes.setdefault(what, []).append(image.source)
        if len(seen) < _MOST_LABELS:
            seen |= {own: seen.get(own, digest) for own in labels}

    def _decoding(self, records: Iterable[Record]) -> Iterator[_Decoding]:
        """Count records and start decoding their images."""
        for record in records:
            self.part.counts["records"] += 1
            image = record.image if self.pipeline.encoders.image else None
            owner = image.id if image else None
            self._texts += [_OwnedText(text, owner, record.split) for text in record.texts]
            if record.error is not None:
                self.part.counts["failed_records"] += 1
                self._fail(self.file, record.row, record.error)
            if image is None:
                self.pipeline.report("records", 1)
            else:
                pixels = self.pipeline.decoders.submit(self._decode, image)
                self.part.is_named |= image.is_named
                may_join = not image.is_named and self.pipeline.encoders.text is not None
                may_join = may_join and bool(record.texts)
                labels = image.labels if may_join and image.key is None else ()
                yield _Decoding(image.id, image.source, record.split, may_join, labels, pixels)

    def _decode(self, image: ImageInput) -> tuple[torch.Tensor, bytes] | str:
        encoder = self.pipeline.encoders.image
        assert encoder is not None
        try:

            def note(what: str) -> None:
                self.pipeline.notes.setdefault(what, []).append(image.source)

            data = image.read()
            pixels = encoder.preprocess(read_image(data, note))
        except DataError as error:
            return str(error)
        key = data if image.key is None else image.key.encode(errors="surrogatepass")
        return pixels, blake2b(key, digest_size=DIGEST_BYTES).digest()

    def _kept_texts(self) -> Iterator[_OwnedText]:
        for text in self._texts:
            owner = self._joined.get(text.image_id or "")
            owned = text if owner is None else text._replace(image_id=owner)
            reason = None if owned.image_id is None else self._skipped.get(owned.image_id)
            if reason is None:
                self.part.counts["texts_seen"] += 1
                yield owned
            else:
                self._fail(self.file, owned.text.row, f"its image {owned.image_id:.200} {reason}")

    def _skip(self, image: _Decoding, reason: str) -> None:
        self.part.counts["failed_records"] += 1
        self._skipped[image.id] = reason
        self._fail(image.source, None, reason)

    def _fail(self, source: str, row: int | None, reason: str) -> None:
        self.pipeline.done["failures"] += 1
        self.part.failures.append(Failure(source=source, row=row, reason=reason))

    def _defects(self, embedded: Embedded) -> dict[int, str]:
        """Return why rows cannot be stored, by position."""
        dtype = self.pipeline.dtype
        unusable = find_unusable(embedded.embeddings, dtype)
        defects = {row: f"has an embedding that {reason}" for row, reason in unusable.items()}
        with np.errstate(over="ignore"):  # looking for overflows
            for row, tokens in enumerate(embedded.tokens or ()):
                if row not in defects and not np.isfinite(tokens.astype(dtype)).all():
                    defects[row] = f"has tokens that are not finite in {dtype}"
        return defects

    def _write(
        self, side: Modality, columns: Columns, embedded: Embedded, defects: Collection[int]
    ) -> None:
        """Write the rows without defects in a thread, in order, a few calls behind."""
        kept = [row for row in range(len(embedded.embeddings)) if row not in defects]
        if kept:
            rows = Rows(
                {name: [values[row] for row in kept] for name, values in columns.items()},
                embedded.embeddings[kept],
                None if embedded.tokens is None else [embedded.tokens[row] for row in kept],
            )
            self.writes.append(self.pipeline.writer.submit(self.part.write, side, rows))
            self.finish_writes(_WRITES_AHEAD)

    def finish_writes(self, ahead: int) -> None:
        """Wait until at most `ahead` calls are unfinished."""
        while len(self.writes) > ahead:
            self.writes.popleft().result()


def _cancel(futures: Collection[Future[Any]]) -> None:
    """Cancel what has not begun, and wait for the rest."""
    for future in futures:
        future.cancel()
    wait(futures)


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
        raise EncoderError(f"the encoder failed ({reason_of(error)})") from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    first, second = embed_in_halves(embed, batch[:half]), embed_in_halves(embed, batch[half:])
    tokens = None if first.tokens is None else [*first.tokens, *(second.tokens or ())]
    return Embedded(np.concatenate([first.embeddings, second.embeddings]), tokens)


def _run_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield items after `count` more have been taken."""
    pending: deque[T] = deque()
    for item in items:
        pending.append(item)
        if len(pending) > count:
            yield pending.popleft()
    yield from pending


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
