"""Names of arrays and columns: which side's embeddings they are."""

from collections.abc import Iterable, Sequence

from csalign.core.enums import Modality
from csalign.sources.records.cells import plain_name as plain_name
from csalign.sources.records.tables import CAPTION_NAMES, IMAGE_NAMES, SPLIT_NAME

# Usual names of an array, dataset or column: of a side, and in a file of one side only.
NAMES: dict[str, tuple[str, ...]] = {
    Modality.IMAGE: (
        *("images", "image", "image_embeddings", "image_embedding", "image_embeds", "image_emb"),
        *("img_emb", "image_features", "image_feats", "img_feats", "vision_features"),
    ),
    Modality.TEXT: (
        *("texts", "text", "text_embeddings", "text_embedding", "text_embeds", "text_emb"),
        *("text_features", "text_feats", "txt_feats", "language_features"),
    ),
}
EITHER_NAMES = (
    *("embeddings", "embedding", "embeds", "emb", "vectors", "vector", "features", "feats"),
    "data",
)
_WORDS: dict[str, set[str]] = {
    Modality.IMAGE: {
        *("image", "images", "img", "imgs", "vision", "visual", "picture", "pictures"),
        *("photo", "photos"),
    },
    Modality.TEXT: {
        *("text", "texts", "txt", "txts", "caption", "captions", "title", "titles", "sentence"),
        *("sentences", "language", "description", "descriptions", "prompt", "prompts", "txt2img"),
    },
}

# Usual names of the columns beside them, the likeliest first.
IMAGE_IDS = (
    *("image_id", "image_ids", "img_id", "img_ids", "imageid", "image_key", "image_keys"),
    *("cocoid", "coco_id"),
)
PLACES = (  # of images, by row
    *("image_row", "image_index", "image_idx", "img_index", "img_idx", "image_indices", "txt2img"),
)
REFERENCES = (  # of texts, to images
    *("text_image_id", "text_image_ids", "caption_image_id", "caption_image_ids", *IMAGE_IDS),
    *PLACES,
)
TEXT_IDS = ("text_id", "text_ids", "caption_id", "caption_ids", "text_key", "text_keys")
ITEM_IDS = ("id", "ids", "key", "keys", "uid", "uuid")  # of either side
ITEMS = ("item", "item_id")  # keys of items, of which a side may have several rows, or none
PATHS = (*IMAGE_NAMES, "url", "image_url", "img_url", "uri", "image_uri", "sha256", "md5")
_KEY_WORDS = {
    *("id", "ids", "key", "keys", "uid", "uuid", "guid", "hash", "sha", "md", "path", "paths"),
    *("file", "files", "filename", "filenames", "filepath", "url", "urls", "uri", "cocoid"),
    *("imageid", "imgid", "image", "img"),
}


_COUNTERS = {"index", "idx", "indices", "row", "rows", "unnamed", "column"}
_FIGURES = {"rank", "label", "labels", "class", "position", "order", "number"}


def are_vectors(name: str) -> bool:
    """Return whether a column is named like embeddings, of any side."""
    return bool(words_of(name) & set(EITHER_NAMES))


def is_key(name: str) -> bool:
    """Return whether a column is named like keys or paths of items."""
    return bool(words_of(name) & _KEY_WORDS)


def is_id(name: str) -> bool:
    """Return whether a column is named like keys, and not like pictures or files."""
    return bool(words_of(name) & _KEY_WORDS - {"image", "img", "file", "files"})


def is_counter(name: str) -> bool:
    """Return whether a column is named like places of rows, as the index of a table."""
    return bool(words_of(name) & _COUNTERS)


def is_figure(name: str) -> bool:
    """Return whether a column is named like ranks or classes, which are not keys."""
    return bool(words_of(name) & _FIGURES) and not is_key(name)


def is_label(name: str) -> bool:
    """Return whether a column is named like keys, captions or splits."""
    return is_key(name) or plain_name(name) in (*CAPTION_NAMES, SPLIT_NAME)


def is_usual_key(name: str) -> bool:
    """Return whether a column has a usual name of ids or paths, not of pictures."""
    plain = plain_name(name)
    return plain in (*REFERENCES, *TEXT_IDS, *ITEM_IDS) or (plain in PATHS and is_id(name))


def label_side(name: str) -> Modality | None:
    """Return the side that a list of keys, paths or captions is named like, None for either."""
    words = words_of(name)
    if words & _WORDS[Modality.TEXT]:
        return Modality.TEXT
    is_image = words & _WORDS[Modality.IMAGE] or plain_name(name) in IMAGE_IDS
    return Modality.IMAGE if is_image else None


def words_of(name: str) -> set[str]:
    """Return the words of a name, without digits at their ends."""
    return {word.rstrip("0123456789") for word in plain_name(name).split("_")}


def first_of(names: Iterable[str], there: Iterable[str]) -> str | None:
    """Return the first of some plain names that is there, in any spelling; None if none is."""
    by_name = {plain_name(name): name for name in reversed(list(there))}
    return next((by_name[name] for name in names if name in by_name), None)


def of_side(names: Sequence[str], side: str) -> list[str]:
    """Return the names that are a side's embeddings: the first usual one, else all with its words.

    A name with words of images and of texts is neither's. Of any other side, a name has its words.
    """
    plain = plain_name(side)
    usual = first_of(NAMES.get(side, (plain, f"{plain}s")), names)
    if usual is not None:
        return [usual]
    if side not in _WORDS:
        return [name for name in names if words_of(plain) <= words_of(name)]
    other = next(own for own in Modality if own != side)
    return [n for n in names if words_of(n) & _WORDS[side] and not words_of(n) & _WORDS[other]]
