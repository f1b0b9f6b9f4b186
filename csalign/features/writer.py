"""Write a whole feature set in one go: shards of both sides, the manifest last."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.version import __version__
from csalign.features import schema
from csalign.features.manifest import (
    FAILURES,
    Counts,
    EncoderInfo,
    Encoders,
    Manifest,
    Shard,
    Shards,
    write_manifest,
)
from csalign.features.shard import Rows, ShardWriter

SHARD_BYTES = 512 << 20


class FeatureWriter:
    """Writes both sides of a feature set into a folder; use as a context manager.

    Leaving the block without an exception completes the set with its manifest.

    Args:
        folder: an empty folder, as `files.staged_folder` gives.
        encoders: what made each side; a side that is not in it is not there.
        dtype: "float16" or "float32".
        names: what the sides are called, if not image and text.
    """

    def __init__(
        self,
        folder: Path,
        encoders: Mapping[Modality, EncoderInfo],
        dtype: str,
        names: Mapping[Modality, str] | None = None,
    ) -> None:
        self._names = None if names is None else dict(names)
        self._folder = folder
        self._encoders = dict(encoders)
        self._dtype = dtype
        (folder / FAILURES).touch()
        self._sides = {
            side: _SideWriter(folder, side, info, dtype) for side, info in encoders.items()
        }

    def write(self, modality: Modality, rows: Rows) -> None:
        """Append rows to one side.

        Raises:
            DataError: an id is missing or was written before; an embedding or token is not finite
                (as given, or after the cast to the stored dtype), or an embedding has norm 0.
            ShapeError: the arrays do not fit the columns or the encoder's width.
        """
        self._sides[modality].write(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for side in self._sides.values():
                side.close(error)
        except BaseException as failure:
            for side in self._sides.values():
                side.close(failure)  # those that are open still
            raise
        if error is None:
            self._finish()

    def _finish(self) -> None:
        images, texts = self._sides.get(Modality.IMAGE), self._sides.get(Modality.TEXT)
        there = images.ids if images else set()
        dangling = texts.image_ids.keys() - there if texts else set()
        if texts and dangling:
            image = min(dangling)
            raise DataError(
                f"text {texts.image_ids[image]!r} belongs to image {image!r}, which is not there "
                f"({len(dangling)} such images in all); add the image or leave image_id empty"
            )
        manifest = Manifest(
            csalign_version=__version__,
            names=self._names,
            dtype=self._dtype,
            encoders=Encoders(
                image=self._encoders.get(Modality.IMAGE), text=self._encoders.get(Modality.TEXT)
            ),
            counts=Counts(
                images=len(there),
                texts=len(texts.ids) if texts else 0,
                pairs=texts.paired if texts else 0,
                failures=0,
            ),
            shards=Shards(
                images=images.shards if images else [], texts=texts.shards if texts else []
            ),
        )
        write_manifest(self._folder, manifest)


@dataclass
class _SideWriter:
    """One side: shards of about `SHARD_BYTES`, and what has to hold across them."""

    folder: Path
    modality: Modality
    info: EncoderInfo
    dtype: str
    ids: set[str] = field(default_factory=set)
    image_ids: dict[str, str] = field(default_factory=dict)  # image -> one text of it
    paired: int = 0
    shards: list[Shard] = field(default_factory=list)
    _open: ShardWriter | None = None

    def write(self, rows: Rows) -> None:
        ids = self._new_ids(rows)
        if self._open is None:
            name = f"part-{len(self.shards):05d}"
            self._open = ShardWriter(self.folder, name, self.modality, self.info, self.dtype)
        self._open.write(rows)
        for text_id, image_id in zip(ids, rows.columns.get(schema.IMAGE_ID, ()), strict=False):
            if image_id is not None:
                self.paired += 1
                self.image_ids.setdefault(image_id, text_id)
        if self._open.bytes >= SHARD_BYTES:
            self.close()

    def _new_ids(self, rows: Rows) -> list[str]:
        ids: list[str] = []
        for position, value in enumerate(rows.columns[schema.ID]):
            if not value:
                raise DataError(f"{self.modality} {position}: has no id")
            if value in self.ids:
                raise DataError(f"{self.modality} id {value!r} appears twice; ids must be unique")
            self.ids.add(value)
            ids.append(value)
        return ids

    def close(self, error: BaseException | None = None) -> None:
        if self._open is None:
            return
        opened, self._open = self._open, None
        if error is not None:
            opened.abort(error)
            return
        try:
            shard = opened.close()
        except BaseException as failure:
            opened.abort(failure)
            raise
        if shard is not None:
            self.shards.append(shard)
