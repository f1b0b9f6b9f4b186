"""Images and captions -> a feature set, through frozen encoders."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from PIL import Image

from csalign.core import atomic
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError
from csalign.core.paths import is_remote, parse_location
from csalign.core.progress import Progress, silent
from csalign.core.results import FeaturesResult
from csalign.encoders.base import EncoderOptions, Encoders, ImageEncoder, TextEncoder
from csalign.encoders.spec import load_encoders
from csalign.features import schema
from csalign.ingest.config import ExtractConfig
from csalign.ingest.job import Job, Receipt, Turn
from csalign.ingest.locks import alone, open_workspace
from csalign.ingest.partial_set import Workspace
from csalign.ingest.pipeline import Embedder
from csalign.ingest.sharding import check_array, device_of, own_volumes, owns, turn_of
from csalign.sources.records.base import Source, Volume
from csalign.sources.records.open import SourceOptions, open_source
from csalign.sources.unreadable import LostVolume

logger = logging.getLogger(__name__)

LEFT_OUT = "none"
"""In place of an encoder: leave that side of the source out."""

_MAX_WORKERS = 16
_REASONS_SHOWN = 3
STDIN = "-"
# Before so many records a share of failures says little, where their number is not known.
_ENOUGH_RECORDS = 10_000
_TOKENS_A_CAPTION = 16  # about, for the estimate of the size


def extract(config: ExtractConfig, progress: Progress = silent) -> FeaturesResult:
    """Embed the images and texts of a source and write them as a feature set.

    The source is divided into parts of `config.part_rows` records. What is finished stays in
    ``OUT.partial`` whatever happens, and the same call goes on from there; several processes
    share the parts by `config.shard`, and the last of them makes the feature set.

    Images that cannot be read are left out together with their captions and listed in
    ``failures.jsonl``; where that makes the command fail, the list is in ``OUT.partial``.

    Args:
        config: what to read, with which encoders, and where to write.
        progress: told of images and texts as they are done.

    Returns:
        What was written: by this process, if others are not done yet.

    Raises:
        OutputError: `config.out` must not be written, or holds another unfinished extraction.
        DataError: the source cannot be used, or too much of it had to be left out.
        EncoderError: an encoder cannot be loaded or does not give the tokens asked for.
        ConfigError: no encoder is named for a side of the source, or the device does not exist.
    """
    if config.max_tokens is not None and config.tokens == "none":
        raise ConfigError("max-tokens: no tokens are stored; add --tokens image, text or both")
    turn = turn_of(config.shard)
    inputs = [path for path in (config.captions, config.images) if path is not None]
    searched = None if "::" in config.source else parse_location(config.source)
    if searched is not None:  # not several that are joined
        inputs.append(searched)
    atomic.check_output(
        config.out, overwrite=config.overwrite, inputs=tuple(inputs), searched=searched
    )
    source = open_source(config.source, _source_options(config))
    logger.info("%s: %s", config.source, source.description)
    if turn.count > 1:
        logger.info("shard %s of the work", turn)
    encoders = _load_encoders(config, source)
    job = Job(
        location=_location(config),
        source=source.fingerprint,
        part_rows=config.part_rows,
        dtype=config.dtype,
        encoders=schema.Encoders(
            image=encoders.image.info if encoders.image else None,
            text=encoders.text.info if encoders.text else None,
        ),
    )
    with (
        atomic.translate_os_errors(config.out),
        open_workspace(
            config.out,
            job,
            turn,
            config=config.to_toml(),
            restart=config.overwrite,
            retry=config.retry_failures,
        ) as workspace,
    ):
        check_array(turn, config.shard, workspace.counts())
        extraction = _Extraction(config, source, encoders, workspace, turn, progress)
        missing: list[Turn] = []
        if not workspace.is_whole:
            extraction.run()
            missing = [] if workspace.is_gone else workspace.missing()
    if missing:
        logger.info(
            "%s: shard %s is done; the feature set appears when %s",
            *(workspace.folder, turn),
            f"{len(missing)} others are" if len(missing) > 1 else f"{missing[0]} is",
        )
        return extraction.result(workspace.folder)
    with atomic.translate_os_errors(config.out):
        return _complete(config, workspace)


def _source_options(config: ExtractConfig) -> SourceOptions:
    return SourceOptions(
        kind=config.kind,
        captions=config.captions,
        images=config.images,
        image_column=config.image_column,
        caption_column=config.caption_column,
        split_column=config.split_column,
        id_column=config.id_column,
        caption_lines=config.caption_lines,
    )


def _load_encoders(config: ExtractConfig, source: Source) -> Encoders:
    specs = {
        Modality.IMAGE: config.image_encoder or config.encoder,
        Modality.TEXT: config.text_encoder or config.encoder,
    }
    if all(spec == LEFT_OUT for spec in specs.values()):
        raise ConfigError("image-encoder, text-encoder: one of them has to be an encoder")
    wanted: dict[Modality, str | None] = dict.fromkeys(Modality)
    for side in Modality:
        if side not in source.sides or specs[side] == LEFT_OUT:
            continue
        if specs[side] is None:
            raise ConfigError(
                f"{side}-encoder: is required, since the source holds {side.plural}; give "
                f"--encoder for both sides, or --{side}-encoder {LEFT_OUT} to leave them out"
            )
        wanted[side] = specs[side]
    options = EncoderOptions(
        device=pick_device(device_of(config.device)),
        precision=config.precision,
        batch_size=None if config.batch_size == "auto" else config.batch_size,
        tokens=[side for side in Modality if config.tokens in (side.value, "both")],
        token_space=config.token_space,
        max_tokens=config.max_tokens,
        compile=config.compile,
    )
    return load_encoders(wanted[Modality.IMAGE], wanted[Modality.TEXT], options)


def _location(config: ExtractConfig) -> str:
    """Where the source lies, since its fingerprint says what it holds by names alone."""
    places = [config.source, config.captions, config.images]
    return " ".join(
        str(place) if "://" in str(place) or str(place) == STDIN else str(Path(place).absolute())
        for place in places
        if place is not None
    )


def _complete(config: ExtractConfig, workspace: Workspace) -> FeaturesResult:
    """Make the feature set, now that all processes are done, or wait for the one that does.

    Raises:
        DataError: more than the allowed share of the whole could not be used.
    """
    with alone(workspace) as is_mine:
        if is_mine:
            if not workspace.is_whole:
                _check(config, workspace, workspace.receipts())
            workspace.complete_and_publish()
    if not is_mine:
        workspace.wait_until_complete()
    counts = schema.read_manifest(config.out).counts
    return FeaturesResult(config.out, counts.images, counts.texts, counts.pairs, counts.failures)


@dataclass
class _Extraction:
    """What one process does for a job."""

    config: ExtractConfig
    source: Source
    encoders: Encoders
    workspace: Workspace
    turn: Turn
    progress: Progress
    receipts: list[Receipt] = field(default_factory=list)

    def run(self) -> None:
        """Make the parts of this process that are not there yet.

        Raises:
            DataError: more than the allowed share could not be used, or all of it.
        """
        self._check_room()
        self.workspace.begin()
        total = self.source.total if self.turn.count == 1 else None
        workers = self.config.workers or min(_cores(), _MAX_WORKERS)
        embedder = Embedder(
            self.encoders.image,
            self.encoders.text,
            self.config.dtype,
            workers,
            self.progress,
            total,
        )
        with closing(embedder):
            embedder.begin()
            for volume in own_volumes(self.turn, len(self.source.volumes)):
                for receipt, is_new in self._parts(volume, embedder):
                    self._count(receipt, embedder, is_new=is_new)
        if not self.receipts:
            logger.warning(
                "shard %s has nothing to do: there are fewer parts than shards; take fewer shards, "
                "or a smaller --part-rows",
                self.turn,
            )
        self.workspace.finish([receipt.name for receipt in self.receipts])

    def result(self, folder: Path) -> FeaturesResult:
        """What this process did."""
        return FeaturesResult(
            folder,
            sum(receipt.images.rows for receipt in self.receipts if receipt.images),
            sum(receipt.texts.rows for receipt in self.receipts if receipt.texts),
            sum(receipt.pairs for receipt in self.receipts),
            sum(len(receipt.failures) for receipt in self.receipts),
            complete=False,
        )

    def _parts(self, volume: int, embedder: Embedder) -> Iterator[tuple[Receipt, bool]]:
        """The receipts of this process's parts of a volume, and whether they are new."""
        volumes = len(self.source.volumes)
        rows = self.config.part_rows
        first = next(
            part for part in range(self.turn.count) if owns(self.turn, volumes, volume, part)
        )
        known = self._receipt(volume, first)
        # Then the volume need not be opened to know its parts; the others cost nothing to open.
        if known is not None and self.source.total is None:
            own = self._own_parts(volume, known.volume_records)
            there = [self._receipt(volume, part) for part in own]
            if all(there):
                yield from ((receipt, False) for receipt in there if receipt is not None)
                return
        with self.source.open(volume) as opened:
            records = len(opened)
            for part in self._own_parts(volume, records):
                receipt = self._receipt(volume, part)
                # Where the stamp is of the whole volume, the number of records must be the same.
                if receipt is not None and (
                    self.source.total is not None or receipt.volume_records == records
                ):
                    yield receipt, False
                else:
                    stop = min(records, (part + 1) * rows)
                    yield self._make(volume, part, opened, stop, embedder), True

    def _own_parts(self, volume: int, records: int) -> list[int]:
        volumes = len(self.source.volumes)
        count = -(-records // self.config.part_rows)
        return [part for part in range(count) if owns(self.turn, volumes, volume, part)]

    def _receipt(self, volume: int, part: int) -> Receipt | None:
        receipt = self.workspace.receipt(self._name(volume, part))
        if receipt is None or receipt.stamp != self._stamp(volume, part):
            return None
        return None if receipt.failures and self.config.retry_failures else receipt

    def _stamp(self, volume: int, part: int) -> str:
        rows = self.config.part_rows
        return self.source.stamp(volume, part * rows, (part + 1) * rows)

    def _name(self, volume: int, part: int) -> str:
        if len(self.source.volumes) == 1:
            return f"part-{part:05d}"
        return f"part-{volume:05d}-{part:05d}"

    def _make(
        self, position: int, number: int, volume: Volume, stop: int, embedder: Embedder
    ) -> Receipt:
        name = self._name(position, number)
        start = number * self.config.part_rows
        with self.workspace.part(name) as part:
            tally = embedder.embed(volume.records(start, stop), volume.name, part)
            receipt = Receipt(
                name=name,
                stamp=self._stamp(position, number),
                volume_records=len(volume),
                is_lost=isinstance(volume, LostVolume),
                **asdict(tally),
            )
            return self.workspace.seal(part, receipt)

    def _count(self, receipt: Receipt, embedder: Embedder, *, is_new: bool) -> None:
        self.receipts.append(receipt)
        if not is_new:
            embedder.report("records", receipt.records)
            embedder.report("texts", receipt.texts_seen)
        if self.turn.count == 1:
            known = (self.source.total, len(self.source.volumes))
            _check(self.config, self.workspace, self.receipts, *known)

    def _check_room(self) -> None:
        """Tell how large the feature set will be, and refuse if the disk is too small for it.

        Raises:
            OutputError: the images alone would not fit.
        """
        sizes = {
            side: _row_bytes(encoder, self.config.dtype)
            for side in Modality
            if (encoder := self.encoders.side(side)) is not None
        }
        each = ", ".join(
            f"{_readable(size)} {'an' if side is Modality.IMAGE else 'about, a'} {side}"
            for side, size in sizes.items()
        )
        images = self.source.total_images
        if images is None or Modality.IMAGE not in sizes:
            logger.info("size on disk: %s", each)
            return
        needed = images * sizes[Modality.IMAGE]
        logger.info("size on disk: %s; %s in all for images", each, _readable(needed))
        folder = self.workspace.folder
        if is_remote(folder) or self.workspace.is_begun:
            return
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OutputError(
                f"{folder}: {images} images need {_readable(needed)}, {_readable(free)} are free; "
                "free some space, choose another --out, or store fewer tokens with --max-tokens"
            )


def _check(
    config: ExtractConfig,
    workspace: Workspace,
    receipts: list[Receipt],
    of: int | None = -1,
    volumes: int | None = None,
) -> None:
    """Raise if what was left out is more than the user allows.

    Args:
        config: says what is allowed.
        workspace: where the list of failures goes then.
        receipts: of the parts so far.
        of: records that there will be in all, None if that is not known; -1 if this is all.
        volumes: likewise; None for those of the receipts.

    Raises:
        DataError: it is more.
    """
    is_all = of == -1
    records = sum(receipt.records for receipt in receipts)
    limit = config.max_failures
    failed = sum(receipt.failed_records for receipt in receipts)
    if (is_all or of or records >= _ENOUGH_RECORDS) and failed > limit * max(of or 0, records):
        raise _refusal(
            workspace, receipts, f"{failed} of {records} records could not be used", limit
        )
    lost = sum(receipt.is_lost for receipt in receipts)
    count = volumes or len({receipt.name.rpartition("-")[0] for receipt in receipts})
    if lost > limit * count:
        problem = f"{lost} of {count} files could not be read"
        raise _refusal(workspace, receipts, problem, limit)
    texts = sum(receipt.texts_seen for receipt in receipts)
    failed = sum(receipt.failed_texts for receipt in receipts)
    if (is_all or texts >= _ENOUGH_RECORDS) and failed > limit * texts:
        raise _refusal(workspace, receipts, f"{failed} of {texts} texts could not be used", limit)
    if not is_all:
        return
    left_out = sum(len(receipt.failures) for receipt in receipts)
    if config.strict and left_out:
        problem = f"{left_out} inputs were left out, which --strict forbids"
        raise _refusal(workspace, receipts, problem, None)
    if not records:
        raise DataError(f"{config.source}: holds nothing to embed")
    if not any(receipt.images or receipt.texts for receipt in receipts):
        raise _refusal(workspace, receipts, f"0 of {records} records could be used", None)


def _refusal(
    workspace: Workspace, receipts: list[Receipt], problem: str, limit: float | None
) -> DataError:
    failures = [failure for receipt in receipts for failure in receipt.failures]
    path = workspace.list_failures(failures)
    examples = "; ".join(
        f"{failure.source}{'' if failure.row is None else f', row {failure.row}'} {failure.reason}"
        for failure in failures[:_REASONS_SHOWN]
    )
    remedy = "repair them and go on with --retry-failures"
    if limit is not None:
        problem += f", the share allowed is {limit:g}"
        remedy += ", or with a higher --max-failures"
    return DataError(f"{problem}: {examples}; {path} lists those so far: {remedy}")


def _row_bytes(encoder: ImageEncoder | TextEncoder, dtype: str) -> int:
    """Bytes of numbers in a row; those of texts with tokens are a guess at their length."""
    info = encoder.info
    count = 0
    if info.token_width is not None:
        count = _TOKENS_A_CAPTION
        if hasattr(encoder, "preprocess"):
            images = cast(ImageEncoder, encoder)
            blank = images.preprocess(Image.new("RGB", (64, 64)))
            tokens = images.embed(blank.unsqueeze(0)).tokens
            count = len(tokens[0]) if tokens else 0
    item: int = schema.DTYPES[dtype].itemsize
    return item * (info.width + count * (info.token_width or 0))


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # what a container or batch system allows
    return os.cpu_count() or 1
