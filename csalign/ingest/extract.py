"""``csalign extract``: images and captions into a feature set, through frozen encoders."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from PIL import Image
from rich.filesize import decimal

from csalign.core import atomic, outputs
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError
from csalign.core.figures import counted
from csalign.core.paths import is_remote, parse_location
from csalign.core.progress import Progress, reported_to, silent
from csalign.core.results import FeaturesResult
from csalign.encoders.base import EncoderOptions, Encoders, ImageEncoder, TextEncoder, load_encoders
from csalign.features import schema
from csalign.features.checks import warn_of_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ExtractConfig
from csalign.ingest.extract_sides import extract_sides
from csalign.ingest.job import Job, PartRecord, WorkShard, assigned_parts, check_array, parse_shard
from csalign.ingest.locks import open_partial_set, sole_owner
from csalign.ingest.partial_set import PartialSet
from csalign.ingest.pipeline import Pipeline
from csalign.ingest.split import split_settings
from csalign.sources.records import Source, SourceFile, UnreadableFile
from csalign.sources.records.open import STDIN, open_source

logger = logging.getLogger(__name__)

SKIP = "none"  # in place of an encoder: skip that side of the source

_MAX_WORKERS = 16
_REASONS_SHOWN = 3
# With fewer records a share of failures says little, where their total is not known.
_ENOUGH_RECORDS = 10_000
_TOKENS_PER_CAPTION = 16  # estimate


def extract(config: ExtractConfig, progress: Progress = silent) -> FeaturesResult:
    """Embed the images and texts of a source, write a feature set and return its counts.

    A set that the same extraction has written already is left as it is.

    Finished parts stay in ``OUT.partial``, and the same call resumes after them; several processes
    share the parts, and the last of them completes the feature set, while the others return the
    counts of their share.

    Raises:
        OutputError: `config.out` must not be written, or contains another unfinished extraction.
        DataError: the source cannot be used, or too much of it is unusable.
        EncoderError: an encoder cannot be loaded or does not return the requested tokens.
        ConfigError: a side of the source has no encoder, or the device does not exist.

    >>> import csalign
    >>> csalign.extract("photos", "features")
    Traceback (most recent call last):
    csalign.core.errors.DataError: photos: no such file or folder
    >>> csalign.extract(
    ...     "photos", "features", captions="captions.csv", encoder="open_clip:ViT-B-32/openai"
    ... )  # doctest: +SKIP
    """
    config.check()
    if config.side is not None:
        return extract_sides(config, progress, extract)
    if config.max_tokens is not None and config.tokens == "none":
        raise ConfigError("--max-tokens: no tokens are stored; add --tokens image, text or both")
    shard, splits = parse_shard(config.shard), split_settings(config)
    searched = None if "::" in config.source else parse_location(config.source)  # or several
    inputs = tuple(path for path in (searched, config.captions, config.images) if path is not None)
    out, may_exist = config.out, config.may_replace()
    outputs.check_output(out, schema.ENTRIES, overwrite=may_exist, inputs=inputs, searched=searched)
    progress("scanning the source", 0, None)
    source = open_source(config.source, config)
    logger.info("%s: %s", config.source, source.description)
    if shard.count > 1:
        logger.info("processing shard %s (%s)", shard, shard.origin)
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
        splits=splits,
    )
    restart, retry = config.overwrite, config.retry_failures
    if not restart and (out / schema.MANIFEST).is_file():
        done = schema.read_manifest(out)
        is_lacking = (retry and done.counts.failures) or (splits and done.splits is None)
        if is_lacking or done.job != job.digest():
            raise OutputError(
                f"{out}: exists, but its source or encoders have changed, or failures or splits "
                "are left to do; choose another --out, or replace it with --overwrite"
            )
        return FeaturesResult(out, **dict(done.counts), joined=done.joined, existed=True)
    with (
        atomic.translate_os_errors(out),
        open_partial_set(
            out, job, shard, config=config.to_toml(), restart=restart, retry=retry
        ) as partial,
    ):
        check_array(shard, config.shard, partial.shard_counts())
        extraction = _Extraction(config, source, encoders, partial, shard, progress)
        if not partial.is_complete:
            extraction.run()
            missing = [] if partial.is_gone else partial.missing()
            if missing:
                others = f"{len(missing)} shards" if len(missing) > 1 else f"shard {missing[0]}"
                folder = partial.folder
                logger.info("%s: shard %s is done; waiting for %s", folder, shard, others)
                return extraction.result()
    progress("completing the feature set", 0, None)
    with atomic.translate_os_errors(out):
        with sole_owner(partial) as is_owner:
            if is_owner:
                if not partial.is_complete:
                    records = partial.part_records()
                    _check_failures(config, partial, records)
                    _warn_of_cut_texts(records, encoders.text)
                partial.complete_and_commit()
        if is_owner:
            warn_of_rows(FeatureSet.open(config.out))
        else:
            progress("waiting for the process that completes the set", 0, None)
            partial.wait_until_committed()
        manifest = schema.read_manifest(out)
        return FeaturesResult(out, **manifest.counts.model_dump(), joined=manifest.joined)


def _load_encoders(config: ExtractConfig, source: Source) -> Encoders:
    specs = {side: getattr(config, f"{side}_encoder") or config.encoder for side in Modality}
    if all(spec == SKIP for spec in specs.values()):
        raise ConfigError("--image-encoder, --text-encoder: at least one must be an encoder")
    for side in Modality:
        if side not in source.sides or specs[side] == SKIP:
            specs[side] = None
        elif specs[side] is None:
            raise ConfigError(
                f"--{side}-encoder is required, since the source contains {side.plural}; pass "
                f"--encoder for both sides, or --{side}-encoder {SKIP} to skip them"
            )
    options = EncoderOptions(
        device=pick_device(config.device),
        precision=config.precision,
        batch_size=None if config.batch_size == "auto" else config.batch_size,
        tokens=[side for side in Modality if config.tokens in (side.value, "both")],
        token_space=config.token_space,
        max_tokens=config.max_tokens,
        compile=config.compile,
    )
    return load_encoders(specs[Modality.IMAGE], specs[Modality.TEXT], options)


def _location(config: ExtractConfig) -> str:
    """Return the paths of the source, whose fingerprint contains relative names only."""
    places = [str(place) for place in (config.source, config.captions, config.images) if place]
    return " ".join(
        place if "://" in place or place == STDIN else str(Path(place).absolute())
        for place in places
    )


@dataclass
class _Extraction:
    """One process's share of a job."""

    config: ExtractConfig
    source: Source
    encoders: Encoders
    partial: PartialSet
    shard: WorkShard
    progress: Progress
    records: list[PartRecord] = field(default_factory=list)

    def run(self) -> None:
        """Process the unfinished parts of this shard; raises as `_check_failures` does."""
        _check_disk_space(self.config, self.source, self.encoders, self.partial)
        self.partial.mark_begun()
        files, total, is_alone = len(self.source.files), self.source.total, self.shard.count == 1
        # The cores that a container or batch system allows.
        workers = self.config.workers or min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
        shown, dtype = total if is_alone else None, self.config.dtype
        with (
            reported_to(self.progress),
            closing(Pipeline(self.encoders, dtype, workers, shown)) as pipeline,
        ):
            for file in range(files):
                for record in self._parts(file, pipeline):
                    self.records.append(record)
                    if is_alone:
                        _check_failures(self.config, self.partial, self.records, files, total)
        if not self.records:
            logger.warning(
                "shard %s has nothing to do: there are fewer parts than shards; use fewer shards "
                "or a smaller --part-rows",
                self.shard,
            )
        self.partial.mark_finished([record.name for record in self.records])

    def result(self) -> FeaturesResult:
        """Return the counts of this process's share."""
        return FeaturesResult(
            self.partial.folder,
            sum(record.images.rows for record in self.records if record.images),
            sum(record.texts.rows for record in self.records if record.texts),
            sum(record.pairs for record in self.records),
            sum(len(record.failures) for record in self.records),
            complete=False,
        )

    def _parts(self, file: int, pipeline: Pipeline) -> Iterator[PartRecord]:
        """Yield the records of this shard's parts of a source file."""
        files, rows, total = len(self.source.files), self.config.part_rows, self.source.total
        first = next(iter(assigned_parts(self.shard, files, file, self.shard.count)), None)
        if first is None:
            return
        known = self._finished(file, first)
        # A finished part says how many there are; without it the file has to be opened.
        if known is not None and total is None:
            parts = assigned_parts(self.shard, files, file, -(-known.file_records // rows))
            finished = [record for part in parts if (record := self._finished(file, part))]
            if len(finished) == len(parts):
                yield from map(pipeline.count_again, finished)
                return
        with self.source.open(file) as opened:
            for part in assigned_parts(self.shard, files, file, -(-len(opened) // rows)):
                record = self._finished(file, part)
                # A fingerprint of the whole file leaves open whether its records were recounted.
                if record is None or (total is None and record.file_records != len(opened)):
                    yield self._process(file, part, opened, pipeline)
                else:
                    yield pipeline.count_again(record)

    def _finished(self, file: int, part: int) -> PartRecord | None:
        """Return the record of a part that need not be processed again."""
        record = self.partial.part_record(self._name(file, part))
        if record is None or record.fingerprint != self._fingerprint(file, part):
            return None
        return None if record.failures and self.config.retry_failures else record

    def _fingerprint(self, file: int, part: int) -> str:
        rows = self.config.part_rows
        return self.source.fingerprint_of(file, part * rows, (part + 1) * rows)

    def _name(self, file: int, part: int) -> str:
        return f"part-{part:05d}" if len(self.source.files) == 1 else f"part-{file:05d}-{part:05d}"

    def _process(
        self, file: int, number: int, opened: SourceFile, pipeline: Pipeline
    ) -> PartRecord:
        start = number * self.config.part_rows
        stop = min(len(opened), start + self.config.part_rows)
        name = self._name(file, number)
        with self.partial.part(name) as part:
            pipeline.embed(opened.records(start, stop), opened.name, part)
            record = PartRecord(
                name=name,
                fingerprint=self._fingerprint(file, number),
                file_records=len(opened),
                is_unreadable=isinstance(opened, UnreadableFile),
            )
            return self.partial.finish_part(part, record)


def _check_failures(
    config: ExtractConfig,
    partial: PartialSet,
    records: list[PartRecord],
    files: int | None = None,
    total: int | None = None,
) -> None:
    """Raise DataError if more is unusable than allowed; `files` is None if these are all parts."""
    limit, is_all = config.max_failures, files is None
    files = files or len({record.name.rpartition("-")[0] for record in records})
    seen = sum(record.records for record in records)
    failed = sum(record.failed_records for record in records)
    unreadable = sum(record.is_unreadable for record in records)
    texts = sum(record.texts_seen for record in records)
    failed_texts = sum(record.failed_texts for record in records)
    problem = None
    if (is_all or total or seen >= _ENOUGH_RECORDS) and failed > limit * max(total or 0, seen):
        problem = f"{failed} of {seen} records are unusable"
    elif unreadable > limit * files:
        problem = f"{unreadable} of {files} files are unreadable"
    elif (is_all or texts >= _ENOUGH_RECORDS) and failed_texts > limit * texts:
        problem = f"{failed_texts} of {texts} texts are unusable"
    if problem is not None:
        problem += f" (limit: {100 * limit:g} %)"
        advice = ", or with a higher --max-failures"
        is_table = Path(config.source).suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet")
        if failed == seen and is_table and config.images is None:
            advice += (
                "; if the images are in another folder, run csalign extract FOLDER --captions "
                f"{config.source}"
            )
        raise _too_many(partial, records, problem, advice)
    if not is_all:
        return
    skipped = sum(len(record.failures) for record in records)
    if config.strict and skipped:
        problem = f"{skipped} inputs were skipped (--strict)"
        raise _too_many(partial, records, problem, ", or without --strict")
    if not seen:
        raise DataError(f"{config.source}: contains nothing to embed")
    if not any(record.images or record.texts for record in records):
        raise _too_many(partial, records, "none of the records is usable")


def _warn_of_cut_texts(records: list[PartRecord], encoder: TextEncoder | None) -> None:
    cut, texts = (sum(getattr(r, name) for r in records) for name in ("cut_texts", "texts_seen"))
    if cut and encoder is not None:
        known = encoder.info.preprocessing
        logger.warning(
            "%s of %s captions (%.1f %%) are longer than the %s tokens that %s encodes, and were "
            "cut there (the longest has %s tokens); shorten them, or choose an encoder with a "
            "longer context",
            *(f"{cut:,}", f"{texts:,}", 100 * cut / texts),
            *(known.get("context_length") or known.get("max_length"), encoder.info.spec),
            max(record.longest_text for record in records),
        )


def _too_many(
    partial: PartialSet, records: list[PartRecord], problem: str, alternative: str = ""
) -> DataError:
    failures = partial.list_failures(records)
    examples = "; ".join(
        f"{failure.source}{'' if failure.row is None else f', row {failure.row}'} {failure.reason}"
        for failure in failures[:_REASONS_SHOWN]
    )
    return DataError(
        f"{problem}: {examples}. Repair what {partial.folder / schema.FAILURES} lists, then "
        f"resume with --retry-failures{alternative}"
    )


def _check_disk_space(
    config: ExtractConfig, source: Source, encoders: Encoders, partial: PartialSet
) -> None:
    """Log the size of the feature set; raise OutputError if its images do not fit on the disk."""
    item = schema.DTYPES[config.dtype].itemsize
    sizes = {
        side: item * _row_width(encoder)
        for side in Modality
        if (encoder := encoders.side(side)) is not None
    }
    rows = [f"{decimal(size)} per {side}" for side, size in sizes.items()]
    if len(set(sizes.values())) == 1:
        rows = [f"{decimal(size)} per {' and per '.join(sizes)}" for size in set(sizes.values())]
    images = source.total_images
    needed = (images or 0) * sizes.get(Modality.IMAGE, 0)
    of_images = f", {decimal(needed)} for {counted(images, 'image')}" if images and needed else ""
    logger.info("size on disk: about %s%s", " and ".join(rows), of_images)
    if not needed:
        return
    if is_remote(partial.folder) or partial.has_parts:
        return
    free = shutil.disk_usage(partial.folder).free
    if needed > free:
        raise OutputError(
            f"{partial.folder}: {images} images need {decimal(needed)}, {decimal(free)} are free; "
            "free some space, choose another --out, or store fewer tokens with --max-tokens"
        )


def _row_width(encoder: ImageEncoder | TextEncoder) -> int:
    """Return the count of numbers in a row, where that of a text's tokens is an estimate."""
    info = encoder.info
    if info.token_width is None:
        return info.width
    count = _TOKENS_PER_CAPTION
    if hasattr(encoder, "preprocess"):
        images = cast(ImageEncoder, encoder)
        blank = images.preprocess(Image.new("RGB", (64, 64)))
        tokens = images.embed(blank.unsqueeze(0)).tokens
        count = len(tokens[0]) if tokens else 0
    return info.width + count * info.token_width
