"""Captions in one JSON document: COCO's, Karpathy's, or a plain list of objects."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from types import UnionType
from typing import Any

from csalign.core.errors import DataError
from csalign.core.paths import is_remote, respelled
from csalign.core.records import parse_json
from csalign.sources.records.catalog import Catalog
from csalign.sources.records.cells import captions_of, id_of
from csalign.sources.records.delimited import Values, columns_of, open_text
from csalign.sources.records.files import is_file, path_below, split_of
from csalign.sources.records.tables import SPLIT_NAME, Row, SourceOptions, TableReader, row_of

logger = logging.getLogger(__name__)

_PROBES = 20
_MAX_FOLDERS = 100
_BETWEEN = re.compile(r"[\s,]*")


def read_document(path: Path, options: SourceOptions) -> tuple[str, Any]:
    """Load a JSON document and recognise its form: "coco", "karpathy" or "table".

    The content of a "table" is a list of objects, whatever form the document gives it: columns,
    rows below another key or below their split, captions by image, or one object after another.

    Raises:
        DataError: it cannot be read, is not JSON, or has another form.
    """
    try:
        with open_text(path) as file:
            document = _parse(file.read())
    except ValueError as error:
        raise DataError(
            f"{path}: is not valid JSON ({error}); name a table with one object per line .jsonl"
        ) from None
    content = document if isinstance(document, dict) else {}
    if isinstance(entries := content.get("images"), list):
        if _annotations_of(content) is not None:
            return "coco", document
        if any(isinstance(entry, dict) and "sentences" in entry for entry in entries):
            return "karpathy", document
    rows, form = _rows_of(document, options)
    if rows is None:
        raise DataError(
            f"{path}: has neither images and annotations (COCO) nor images with sentences "
            "(Karpathy), and is not a list of objects (keys: "
            f"{', '.join(list(content)[:10]) or 'none'}){form}"
        )
    if form:
        logger.info(f"{path}: read as {form}")
    return "table", rows


def _parse(text: bytes) -> Any:
    """Parse JSON, or objects behind each other, with or without commas and brackets."""
    try:
        return parse_json(text)
    except ValueError:
        rest = text.decode("utf-8-sig").strip()
        if rest.startswith("[") != rest.endswith("]"):  # it is cut
            raise
        rest = rest.removeprefix("[").removesuffix("]")
        decoder, position, found = json.JSONDecoder(), 0, []
        while (position := _BETWEEN.match(rest, position).end()) < len(rest):  # type: ignore[union-attr]
            entry, position = decoder.raw_decode(rest, position)
            found.append(entry)
        if not found or not all(isinstance(entry, dict) for entry in found):
            raise
        return found


def _annotations_of(content: Mapping[str, Any]) -> list[Any] | None:
    """Return the annotations of a COCO document, which some call captions."""
    for key in ("annotations", "captions", "sentences"):
        entries = content.get(key)
        if isinstance(entries, list) and (
            key == "annotations" or any(isinstance(e, dict) and "image_id" in e for e in entries)
        ):
            return entries
    return None


def _rows_of(document: Any, options: SourceOptions) -> tuple[list[Any] | None, str]:
    """Make a list of objects of a document, None if it is none; and its form if that is a guess."""
    if isinstance(document, list):
        if not document or not _all_of(document, list, str | list):
            return document, ""
        cells = [[entry] if isinstance(entry, str) else entry for entry in document]
        names = columns_of([[str(cell) for cell in row] for row in cells])
        if names is None and _all_of(document, list, str):
            names = ["caption"]
        if names is None:
            return None, ""
        return [
            dict(zip(names, row, strict=False)) for row in cells
        ], f"a list of {', '.join(names)}"
    if not isinstance(document, dict) or not document:
        return None, ""
    tables = {k: v for k, v in document.items() if v and _all_of(v, list, dict)}
    splits = {key: split_of(key) for key in tables}
    if len(tables) > 1 and len(tables) == len(document) and all(splits.values()):
        rows = [{SPLIT_NAME: splits[k]} | entry for k, own in tables.items() for entry in own]
        return rows, f"rows below their splits ({', '.join(tables)})"
    if len(tables) == 1:
        [(key, rows)] = tables.items()
        return (rows, f"the list {key!r}") if _columns_in(rows[0], options) else (None, "")
    if found := _columns_in(document, options):
        if not all(isinstance(document[name], list | dict) for name in found):
            return [document], ""
        columns = {name: v for name, v in document.items() if isinstance(v, list | dict)}
        keys = [list(v) if isinstance(v, dict) else list(range(len(v))) for v in columns.values()]
        if any(own != keys[0] for own in keys):
            return None, "; its columns have different rows"
        cells = [v.values() if isinstance(v, dict) else v for v in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)], "columns"
    first = next(iter(document.values()))
    if _all_of(document, dict, dict) and (found := _columns_in(first, options)):
        if options.pick(first).image in found:
            return list(document.values()), ""
        return [{"image": key} | entry for key, entry in document.items()], "captions by image"
    if columns_of([[key, "a caption"] for key in document]):
        return [{"image": k, "caption": v} for k, v in document.items()], "captions by image"
    return None, ""


def _all_of(values: Any, outer: type, inner: type | UnionType) -> bool:
    own = values.values() if isinstance(values, dict) else values
    return isinstance(values, outer) and all(isinstance(value, inner) for value in own)


def _columns_in(entry: Mapping[str, Any], options: SourceOptions) -> list[str]:
    """List the columns of images and captions that an object has."""
    found = options.pick(entry)
    return [name for name in (found.image, found.caption) if name is not None]


def read_annotations(
    path: Path,
    form: str,
    document: Any,
    images: Path | None,
    options: SourceOptions,
    found: Sequence[str],
) -> Catalog:
    """Make a source of a JSON document.

    Args:
        path: of the document.
        form: see `read_document`.
        document: its content.
        images: folder that image paths start from (default: searched near the document).
        options: the columns of a list; of the other forms only `split` and `id`, keys of images.
        found: images below `images` to add where the document does not name them.

    Raises:
        DataError: a column is missing, or none of its images can be found.
    """
    if form == "table":
        rows, description = _table_rows(path, document, options), "JSON list of objects"
    elif form == "coco":
        rows = _coco_rows(path, document, options)
        description = f"COCO captions of {len(document['images'])} images"
    else:
        rows = _karpathy_rows(path, document, options)
        description = f"Karpathy splits of {len(document['images'])} images"
    gathered = list(rows)  # the folder of images is recognised by some of them
    root = images or _find_images(path, [row.image for row in gathered if row.image])
    catalog = Catalog(root)
    catalog.begin_file(str(path))
    for row in gathered:
        catalog.add(row)
    catalog.add_found(found)
    return catalog.finish(description)


def _table_rows(path: Path, document: Sequence[Any], options: SourceOptions) -> Iterator[Row]:
    error = "is not a JSON object; each entry must be one"
    return TableReader(path, options, ".jsonl").rows_of(
        Values(k, 0, entry) if isinstance(entry, dict) else Values(k, 0, {}, error)
        for k, entry in enumerate(document, 1)
    )


def _coco_rows(path: Path, document: Mapping[str, Any], options: SourceOptions) -> Iterator[Row]:
    annotations = _annotations_of(document) or []
    names = dict.fromkeys(key for entry in annotations if isinstance(entry, dict) for key in entry)
    name = "caption" if "caption" in names else options.pick(names).caption
    if names and name is None:
        raise DataError(
            f"{path}: its annotations have no captions (keys: {', '.join(names):.200}), as those "
            "of boxes and keypoints; pass the document of captions, such as captions_val2017.json"
        )
    captions: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
    boxes = 0
    for number, entry in enumerate(annotations, 1):
        try:
            key = id_of(entry.get("image_id")) if isinstance(entry, dict) else None
            if key is None:
                raise ValueError("has no image_id")
            caption = entry.get(str(name))
            if caption is None and "bbox" in entry:
                boxes += 1
                continue
            if caption is None:
                raise ValueError("caption must be text, not None")
            captions.setdefault(key, []).append((number, captions_of(caption, "caption")))
        except ValueError as error:
            yield Row(number, error=f"annotation {number}: {error}")
    if boxes:
        logger.warning(f"{path}: {boxes} annotations of boxes without a caption are not read")
    listed = [entry for entry in document["images"] if isinstance(entry, dict)]
    has_splits = any(options.split_column in entry for entry in listed)
    split = None if has_splits else split_of(path.name)
    if split:
        logger.info(f"{path}: all images are in split {split}, according to its name")
    ids: dict[str, str] = {}  # with the image, which may be listed twice
    for number, entry in enumerate(document["images"], 1):
        try:
            row = _image_row(number, entry, "file_name", options)
            key = id_of(entry.get("id"))
            if key is None or ids.setdefault(key, row.image) != row.image:
                raise ValueError(f"has no id of its own ({entry.get('id')!r:.200})")
        except ValueError as error:
            yield Row(number, error=f"image {number}: {error}")
            continue
        own = [texts for _, texts in captions.pop(key, ())]
        yield row._replace(
            split=row.split or split,
            captions=tuple(chain.from_iterable(own)),
            lacks_caption=() in own,
        )
    for key, orphans in captions.items():
        for number, _ in orphans:
            yield Row(number, error=f"annotation {number}: no image has the id {key!r:.200}")


def _karpathy_rows(
    path: Path, document: Mapping[str, Any], options: SourceOptions
) -> Iterator[Row]:
    splits: Counter[str | None] = Counter()
    for number, entry in enumerate(document["images"], 1):
        try:
            row = _image_row(number, entry, "filename", options)
            splits[row.split] += 1
            sentences = entry.get("sentences")
            if not isinstance(sentences, list):
                raise ValueError("has no list of sentences")
            row = row._replace(captions=captions_of(sentences, "raw"))
        except ValueError as error:
            yield Row(number, error=f"image {number}: {error}")
            continue
        yield row._replace(split="train" if row.split == "restval" else row.split)
    if splits["restval"]:
        logger.info(
            f"{path}: {splits['restval']} images of split restval are stored as train, as papers "
            "train on both"
        )


def _image_row(number: int, entry: Any, name_key: str, options: SourceOptions) -> Row:
    if not isinstance(entry, dict):
        raise ValueError("is not an object")
    row = row_of(
        number,
        entry,
        options.model_copy(
            update={"kind": "auto", "image_column": name_key, "caption_column": ""}
        ).pick(entry),
    )
    if row.error or not row.image:
        raise ValueError(row.error or f"has no {name_key}")
    folder = entry.get("filepath")
    if isinstance(folder, str) and folder.strip():
        return row._replace(image=f"{folder.strip().rstrip('/')}/{row.image}")
    return row


def _find_images(path: Path, names: Sequence[str]) -> Path:
    """Find the folder near a document that its image paths start from, by some of them."""
    if not names:
        return path.parent
    probes = names[:: max(1, len(names) // _PROBES)][:_PROBES]
    # COCO keeps captions_val2017.json in annotations/ and the images in val2017/ beside it.
    stem = path.name.partition(".")[0].rpartition("_")[2]
    folders = [
        folder
        for parent in dict.fromkeys((path.parent, path.parent.parent))
        for folder in (parent, parent / stem, *_folders_in(parent), parent / "images" / stem)
    ]
    for folder in folders:
        if any(_is_below(folder, probe) for probe in probes):
            return folder
    raise DataError(
        f"{path}: its images, such as {probes[0]!r:.200}, are neither beside it nor in the "
        f"folders next to it; name their folder with --images"
    )


def _folders_in(parent: Path) -> list[Path]:
    try:
        folders = (path for path in parent.iterdir() if path.name[0] != "." and path.is_dir())
        return sorted(islice(folders, _MAX_FOLDERS))
    except OSError:
        return []


def _is_below(folder: Path, name: str) -> bool:
    try:
        return is_file(folder / path_below(folder, name)) or (
            not is_remote(folder) and bool(respelled(name, folder))
        )
    except DataError:
        return False
