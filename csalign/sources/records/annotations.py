"""Captions in one JSON document: COCO's, Karpathy's, or a plain list of objects."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from csalign.core.errors import DataError
from csalign.core.paths import is_remote, respelled
from csalign.core.records import parse_json
from csalign.sources.records.catalog import Catalog
from csalign.sources.records.files import is_file, open_file, path_below, split_of
from csalign.sources.records.tables import Row, SourceOptions, json_captions, row_of

logger = logging.getLogger(__name__)

_PROBES = 20
_MAX_FOLDERS = 100


def read_document(path: Path) -> tuple[str, Any]:
    """Load a JSON document and recognise its form: "coco", "karpathy" or "table".

    Raises:
        DataError: it cannot be read, is not JSON, or has another form.
    """
    try:
        with open_file(path) as file:
            document = parse_json(file.read())
    except ValueError as error:
        raise DataError(
            f"{path}: is not valid JSON ({error}); name a table with one object per line .jsonl"
        ) from None
    if isinstance(document, list):
        return "table", document
    content = document if isinstance(document, dict) else {}
    if isinstance(entries := content.get("images"), list):
        if isinstance(content.get("annotations"), list):
            return "coco", document
        if any(isinstance(entry, dict) and "sentences" in entry for entry in entries):
            return "karpathy", document
    raise DataError(
        f"{path}: has neither images and annotations (COCO) nor images with sentences (Karpathy), "
        f"and is not a list of objects (keys: {', '.join(list(content)[:10]) or 'none'})"
    )


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
    for number, entry in enumerate(document, 1):
        if isinstance(entry, dict):
            yield row_of(number, entry, options.pick(entry))
        else:
            yield Row(number, error="is not a JSON object; each entry must be one")


def _coco_rows(path: Path, document: Mapping[str, Any], options: SourceOptions) -> Iterator[Row]:
    captions: dict[str, list[tuple[int, Any]]] = {}
    for number, entry in enumerate(document["annotations"], 1):
        if isinstance(entry, dict) and (key := _coco_id(entry.get("image_id"))) is not None:
            captions.setdefault(key, []).append((number, entry.get("caption")))
        else:
            yield Row(number, error=f"annotation {number}: has no image_id")
    split = split_of(path.name)
    if any(
        options.split_column in entry for entry in document["images"] if isinstance(entry, dict)
    ):
        split = None
    elif split:
        logger.info(f"{path}: all images are in split {split}, according to its name")
    ids: dict[str, str] = {}  # with the image, which may be listed twice
    for number, entry in enumerate(document["images"], 1):
        try:
            row = _image_row(number, entry, "file_name", options)
            key = _coco_id(entry.get("id"))
            if key is None or ids.setdefault(key, row.image) != row.image:
                raise ValueError(f"has no id of its own ({entry.get('id')!r:.200})")
        except ValueError as error:
            yield Row(number, error=f"image {number}: {error}")
            continue
        row = row._replace(split=row.split or split)
        yield row
        for annotation, caption in captions.pop(key, ()):
            try:
                if not isinstance(caption, str):
                    raise ValueError(f"caption must be text, not {caption!r:.40}")
                texts = json_captions(caption, "caption")
                yield row._replace(number=annotation, captions=texts)
            except ValueError as error:
                yield Row(annotation, error=f"annotation {annotation}: {error}")
    for key, orphans in captions.items():
        for number, _ in orphans:
            yield Row(number, error=f"annotation {number}: no image has the id {key!r:.200}")


def _coco_id(value: Any) -> str | None:
    """Return the same text for 7, 7.0 and "7"; None if it is no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | str) else None


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
            texts = (json_captions(_sentence(sentence), "raw") for sentence in sentences)
            row = row._replace(captions=tuple(text for own in texts for text in own))
        except ValueError as error:
            yield Row(number, error=f"image {number}: {error}")
            continue
        yield row._replace(split="train" if row.split == "restval" else row.split)
    if splits["restval"]:
        logger.info(
            f"{path}: {splits['restval']} images of split restval are stored as train, as papers "
            "train on both"
        )


def _sentence(entry: Any) -> Any:
    if not isinstance(entry, dict):
        raise ValueError("has a sentence that is not an object")
    tokens = entry.get("tokens")
    if "raw" in entry:
        return entry["raw"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("has a sentence without raw text")
    return " ".join(tokens)


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
