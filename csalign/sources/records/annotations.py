"""Captions in one JSON document: COCO's, Karpathy's, or a plain list of objects."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from csalign.core.errors import DataError
from csalign.core.paths import is_remote, respelled
from csalign.core.records import parse_json
from csalign.sources.records.catalog import Catalog
from csalign.sources.records.cells import captions_of, id_of
from csalign.sources.records.delimited import columns_of, open_text
from csalign.sources.records.files import is_file, path_below, split_of
from csalign.sources.records.tables import (
    SPLIT_NAME,
    Row,
    SourceOptions,
    row_of,
    warn_of_missing,
)

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
    image, caption = options.image_column or "image", options.caption_column or "caption"
    if isinstance(document, list):
        if document and all(isinstance(entry, str) for entry in document):
            kind = image if columns_of([[entry] for entry in document]) == ["image"] else caption
            return [{kind: entry} for entry in document], f"a list of {kind}s"
        if not all(isinstance(entry, list) for entry in document):
            return document, ""
        names = columns_of([[str(cell) for cell in entry] for entry in document])
        if not document or names is None:
            return None, ""
        rows = [dict(zip(names, entry, strict=False)) for entry in document]
        return rows, f"a list of {', '.join(names)}"
    if not isinstance(document, dict) or not document:
        return None, ""
    names, data = document.get("columns"), document.get("data")
    if isinstance(names, list) and isinstance(data, list):  # orient="split" of pandas
        return [dict(zip(names, entry, strict=False)) for entry in data], ""
    tables = {k: v for k, v in document.items() if v and _all_of(v, list, dict)}
    splits = {key: split_of(key) for key in tables}
    if len(tables) > 1 and len(tables) == len(document) and all(splits.values()):
        rows = [{SPLIT_NAME: splits[k]} | entry for k, own in tables.items() for entry in own]
        return rows, f"rows below their splits ({', '.join(tables)})"
    if len(tables) == 1:
        [(key, rows)] = tables.items()
        return (rows, f"the list {key!r}") if _has_columns(rows[0], options) else (None, "")
    if _has_columns(document, options):
        if all(isinstance(value, str) for value in document.values()):
            return [document], ""
        columns = {name: v for name, v in document.items() if isinstance(v, list | dict)}
        keys = [list(v) if isinstance(v, dict) else list(range(len(v))) for v in columns.values()]
        if any(own != keys[0] for own in keys):
            lengths = ", ".join(
                f"{len(own)} in {name!r}" for own, name in zip(keys, columns, strict=True)
            )
            return None, f"; its columns must have the same rows ({lengths})"
        cells = [v.values() if isinstance(v, dict) else v for v in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)], "columns"
    if _all_of(document, dict, dict) and _has_columns(next(iter(document.values())), options):
        if options.pick(next(iter(document.values()))).image is not None:
            return list(document.values()), ""
        return [{image: key} | entry for key, entry in document.items()], "captions by image"
    if columns_of([[key, "a caption"] for key in document]):
        return [{image: k, caption: v} for k, v in document.items()], "captions by image"
    return None, ""


def _all_of(values: Any, outer: type, inner: type) -> bool:
    own = values.values() if isinstance(values, dict) else values
    return isinstance(values, outer) and all(isinstance(value, inner) for value in own)


def _has_columns(entry: Mapping[str, Any], options: SourceOptions) -> bool:
    found = options.pick(entry)
    return found.image is not None or found.caption is not None


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
    names = dict.fromkeys(key for entry in document if isinstance(entry, dict) for key in entry)
    found = options.find(names, path)
    found.warn_of_one_side(names, path)
    missing = 0
    for number, entry in enumerate(document, 1):
        if isinstance(entry, dict):
            columns = options.pick(entry)
            row = row_of(number, entry, columns)
            missing += len(row.captions) <= len(columns.more) and columns.has_missing(entry)
            yield row
        else:
            yield Row(number, error="is not a JSON object; each entry must be one")
    warn_of_missing(path, missing)


def _coco_rows(path: Path, document: Mapping[str, Any], options: SourceOptions) -> Iterator[Row]:
    captions: dict[str, list[tuple[int, Any]]] = {}
    annotations = _annotations_of(document) or []
    names = dict.fromkeys(key for entry in annotations if isinstance(entry, dict) for key in entry)
    name = "caption" if "caption" in names else options.pick(names).caption
    if names and name is None:
        raise DataError(
            f"{path}: its annotations have no captions (keys: {', '.join(names):.200}), as those "
            "of boxes and keypoints; pass the document of captions, such as captions_val2017.json"
        )
    others = 0
    for number, entry in enumerate(annotations, 1):
        if isinstance(entry, dict) and (key := id_of(entry.get("image_id"))) is not None:
            if name in entry or "bbox" not in entry:
                captions.setdefault(key, []).append((number, entry.get(str(name))))
            else:
                others += 1
        else:
            yield Row(number, error=f"annotation {number}: has no image_id")
    if others:
        logger.warning(f"{path}: {others} annotations of boxes without a caption are not read")
    split = split_of(path.name)
    if any(
        options.split_column in entry for entry in document["images"] if isinstance(entry, dict)
    ):
        split = None
    elif split:
        logger.info(f"{path}: all images are in split {split}, according to its name")
    ids: dict[str, str] = {}  # with the image, which may be listed twice
    missing = 0
    for number, entry in enumerate(document["images"], 1):
        try:
            row = _image_row(number, entry, "file_name", options)
            key = id_of(entry.get("id"))
            if key is None or ids.setdefault(key, row.image) != row.image:
                raise ValueError(f"has no id of its own ({entry.get('id')!r:.200})")
        except ValueError as error:
            yield Row(number, error=f"image {number}: {error}")
            continue
        row = row._replace(split=row.split or split)
        yield row
        for annotation, caption in captions.pop(key, ()):
            try:
                if caption is None:
                    raise ValueError("caption must be text, not None")
                texts = captions_of(caption, "caption")
                missing += not texts
                yield row._replace(number=annotation, captions=texts)
            except ValueError as error:
                yield Row(annotation, error=f"annotation {annotation}: {error}")
    for key, orphans in captions.items():
        for number, _ in orphans:
            yield Row(number, error=f"annotation {number}: no image has the id {key!r:.200}")
    warn_of_missing(path, missing)


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
    for is_below in (_is_below, _is_alike_below):
        for folder in folders:
            if any(is_below(folder, probe) for probe in probes):
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


def _is_alike_below(folder: Path, name: str) -> bool:
    return not is_remote(folder) and bool(respelled(name, folder))


def _is_below(folder: Path, name: str) -> bool:
    try:
        return is_file(folder / path_below(folder, name))
    except DataError:
        return False
