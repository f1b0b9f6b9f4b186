"""Captions in one JSON document: COCO's, Karpathy's, or a plain list of objects."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from csalign.core.errors import DataError
from csalign.sources.records.catalog import Catalog, CatalogSource
from csalign.sources.records.columns import Columns, Row
from csalign.sources.records.tables import caption_of, row_of
from csalign.sources.records.tree import fingerprint, is_file, opened, path_below, split_of

logger = logging.getLogger(__name__)

_PROBES = 20
_MOST_FOLDERS = 100
_RESTVAL = "restval"  # what the papers add to the training split


def read_document(table: Path) -> Any:
    """Load a JSON document.

    Raises:
        DataError: it is not there or no JSON.
    """
    try:
        with opened(table) as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{table}: is not valid JSON ({error}); a table with an object a line is called .jsonl"
        ) from None


def form_of(document: Any, table: Path) -> str:
    """What a JSON document is, told by its content: "coco", "karpathy" or "table".

    Raises:
        DataError: it is none of them.
    """
    if isinstance(document, list):
        return "table"
    entries = document.get("images") if isinstance(document, dict) else None
    if isinstance(entries, list):
        if isinstance(document.get("annotations"), list):
            return "coco"
        if any(isinstance(entry, dict) and "sentences" in entry for entry in entries):
            return "karpathy"
    keys = ", ".join(list(document)[:10]) if isinstance(document, dict) else "none"
    raise DataError(
        f"{table}: has neither images and annotations (COCO) nor images with sentences "
        f"(Karpathy), and is no list of objects (keys: {keys})"
    )


def read_annotations(
    table: Path,
    document: Any,
    form: str,
    images: Path | None,
    columns: Columns,
    found: Sequence[str] = (),
) -> CatalogSource:
    """The source that a JSON document makes.

    Args:
        table: where it came from.
        document: its content.
        form: "coco", "karpathy" or "table".
        images: folder that image paths start from (default: looked for near the document).
        columns: the columns of a list; for the others `id`, which names an image's own key, and
            `split`.
        found: images below `images` to be added where the document does not speak of them.

    Raises:
        DataError: the document is not of that form, or none of its images can be found.
    """
    if form_of(document, table) != form:
        raise DataError(f"{table}: is no {form} document but {form_of(document, table)}")
    if form == "table":
        rows, what = _table_rows(table, document, columns), "JSON list of objects"
    elif form == "coco":
        rows = _coco_rows(document, columns, _named_split(table, document, columns))
        what = f"COCO captions of {len(document['images'])} images"
    else:
        rows = _karpathy_rows(table, document, columns)
        what = f"Karpathy splits of {len(document['images'])} images"
    gathered = list(rows)  # some of them are needed before the first can be taken in
    root = images or _find_images(table, [row.image for row in gathered if row.image])
    catalog = Catalog(root)
    catalog.begin(str(table))
    for row in gathered:
        catalog.add(row)
    catalog.add_found(found)
    return catalog.finish(what, fingerprint([form, columns, *gathered, *found]))


def _table_rows(table: Path, document: Sequence[Any], columns: Columns) -> Iterator[Row]:
    names = dict.fromkeys(key for entry in document if isinstance(entry, dict) for key in entry)
    columns.find(names, table).warn_of_one_side(names, table)
    for number, entry in enumerate(document, 1):
        if isinstance(entry, dict):
            yield row_of(number, entry, columns)
        else:
            yield Row(number, flaw="is no JSON object; each entry must be one")


def _coco_rows(document: Mapping[str, Any], columns: Columns, split: str | None) -> Iterator[Row]:
    captions: dict[Any, list[Any]] = {}
    owned: set[Any] = set()
    for number, entry in enumerate(document["annotations"], 1):
        if isinstance(entry, dict) and isinstance(entry.get("image_id"), int | str):
            captions.setdefault(entry["image_id"], []).append((number, entry.get("caption")))
        else:
            yield Row(number, flaw=f"annotation {number}: has no image_id")
    for number, entry in enumerate(document["images"], 1):
        try:
            row = _image_row(number, entry, "file_name", columns)
            key = entry.get("id")
            if not isinstance(key, int | str) or key in owned:
                raise ValueError(f"has no id of its own ({key!r:.200})")
            owned.add(key)
        except ValueError as error:
            yield Row(number, flaw=f"image {number}: {error}")
            continue
        yield row._replace(split=row.split or split)
        for annotation, caption in captions.pop(key, ()):
            yield _caption_row(row._replace(number=annotation, split=row.split or split), caption)
    for key, orphans in captions.items():
        for number, _ in orphans:
            yield Row(
                number, flaw=f"annotation {number}: image_id {key!r:.200} is none of the images"
            )


def _caption_row(row: Row, caption: Any) -> Row:
    try:
        if not isinstance(caption, str):
            raise ValueError(f"caption must be text, not {caption!r:.40}")
        return row._replace(captions=caption_of(caption, "caption"))
    except ValueError as error:
        return Row(row.number, flaw=f"annotation {row.number}: {error}")


def _named_split(table: Path, document: Mapping[str, Any], columns: Columns) -> str | None:
    split = split_of(table.name)
    if split and not any(columns.split in e for e in document["images"] if isinstance(e, dict)):
        logger.info("%s: all of it is in split %s, as its name says", table, split)
        return split
    return None


def _karpathy_rows(table: Path, document: Mapping[str, Any], columns: Columns) -> Iterator[Row]:
    splits: Counter[str | None] = Counter()
    for number, entry in enumerate(document["images"], 1):
        try:
            row = _image_row(number, entry, "filename", columns)
            splits[row.split] += 1
            sentences = entry.get("sentences")
            if not isinstance(sentences, list):
                raise ValueError("has no list of sentences")
            captions = tuple(
                text for part in sentences for text in caption_of(_sentence(part), "raw")
            )
        except ValueError as error:
            yield Row(number, flaw=f"image {number}: {error}")
            continue
        split = "train" if row.split == _RESTVAL else row.split
        yield row._replace(captions=captions, split=split)
    if splits[_RESTVAL]:
        logger.info(
            "%s: %d images of split restval are stored as train, which the papers train on too",
            *(table, splits[_RESTVAL]),
        )


def _sentence(part: Any) -> Any:
    if not isinstance(part, dict):
        raise ValueError("has a sentence that is no object")
    if "raw" in part:
        return part["raw"]
    tokens = part.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("has a sentence without raw text")
    return " ".join(tokens)


def _image_row(number: int, entry: Any, name_key: str, columns: Columns) -> Row:
    if not isinstance(entry, dict):
        raise ValueError("is no object")
    row = row_of(number, entry, Columns(name_key, "", columns.split, columns.id))
    if row.flaw:
        raise ValueError(row.flaw)
    if not row.image:
        raise ValueError(f"has no {name_key}")
    folder = entry.get("filepath")
    if isinstance(folder, str) and folder.strip():
        return row._replace(image=f"{folder.strip().rstrip('/')}/{row.image}")
    return row


def _find_images(table: Path, names: Sequence[str]) -> Path:
    """The folder near a document that its image paths start from, told by some of them."""
    if not names:
        return table.parent
    probes = names[:: max(1, len(names) // _PROBES)][:_PROBES]
    # COCO keeps captions_val2017.json in annotations/ and the images in val2017/ beside it.
    stem = table.name.partition(".")[0].rpartition("_")[2]
    for parent in dict.fromkeys((table.parent, table.parent.parent)):
        for folder in (parent, parent / stem, *_folders_in(parent), parent / "images" / stem):
            if any(_is_there(folder, probe) for probe in probes):
                return folder
    raise DataError(
        f"{table}: its images, such as {probes[0]!r:.200}, are neither beside it nor in the "
        f"folders next to it; name their folder with --images"
    )


def _folders_in(parent: Path) -> list[Path]:
    try:
        folders = (path for path in parent.iterdir() if path.name[0] != "." and path.is_dir())
        return sorted(islice(folders, _MOST_FOLDERS))
    except OSError:
        return []


def _is_there(folder: Path, name: str) -> bool:
    try:
        return is_file(folder / path_below(folder, name))
    except DataError:
        return False
