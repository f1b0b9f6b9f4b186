"""Train on two arrays in memory."""

import tempfile
from pathlib import Path
from typing import Any

from csalign.adapters.checkpoint import load_adapter
from csalign.adapters.model import Adapter
from csalign.training.train import train


def fit(
    images: Any,
    texts: Any,
    image_of_text: Any = None,
    *,
    out: Path | str | None = None,
    **options: Any,
) -> Adapter:
    """Train adapters on two arrays.

    Args:
        images: (n, d) embeddings of any float dtype, finite, no row of norm 0: a NumPy array, a
            torch tensor, or lists of lists.
        texts: (m, e), likewise, or (n, k, e) for k texts of each image.
        image_of_text: (m,) integers, the row of the image of each text, -1 for none. By default
            row i of one side belongs to row i of the other.
        out: folder of the run to keep; by default none is.
        options: of `train`, such as ``steps=200``.

    Returns:
        The adapter, on the CPU: ``adapter.embed_images(images)`` are unit rows (n, width) float32.

    Raises:
        ConfigError: an option does not exist, or has a value that it cannot have.
        ShapeError: the shapes do not fit together.
        DataError: a row has no direction, or there are too few rows.
        OutputError: `out` exists and is not to be replaced.

    >>> import csalign, numpy
    >>> rng = numpy.random.default_rng(0)
    >>> images, texts = rng.normal(size=(100, 16)), rng.normal(size=(100, 12))
    >>> adapter = csalign.fit(images, texts, steps=10)
    >>> adapter.embed_images(images).shape, adapter.embed_texts(texts).shape
    ((100, 12), (100, 12))
    """
    pairs = (images, texts) if image_of_text is None else (images, texts, image_of_text)
    with tempfile.TemporaryDirectory(prefix="csalign-") as folder:
        run = Path(folder, "run") if out is None else Path(out)
        train(features=pairs, out=run, **options)
        kinds = {options.get(name) for name in ("adapter", "image_adapter", "text_adapter")}
        return load_adapter(run, hub=False, allow={kind for kind in kinds if kind})
