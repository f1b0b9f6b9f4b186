import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.sources.arrays.base import Vectors
from csalign.sources.arrays.opening import read_both, read_side
from csalign.sources.image_rows import describe_images

NEITHER: dict[Modality, str | None] = {Modality.IMAGE: None, Modality.TEXT: None}


def numbers(*shape: int) -> Any:
    values = np.random.default_rng(sum(shape)).normal(size=shape)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def write_part(
    folder: Path,
    part: int,
    parts: int,
    *,
    images: Any = None,
    texts: Any = None,
    paths: list[str] | None = None,
    captions: list[str] | None = None,
    extra: list[dict[str, Any]] | None = None,
) -> None:
    """What clip-retrieval 2.45's NumpyWriter leaves of one partition."""
    number = str(part).zfill(int(math.log10(parts)) + 1)
    columns: dict[str, Any] = {}
    for name, array, label, values in (
        ("img_emb", images, "image_path", paths),
        ("text_emb", texts, "caption", captions),
    ):
        if array is not None:
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / name / f"{name}_{number}.npy", array)
            columns[label] = values
    frame = pd.DataFrame(columns)
    if extra is not None:
        parsed = pd.json_normalize(extra)
        frame = frame.join(parsed.drop(columns={"caption", "image_path"} & set(parsed)))
    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    frame.to_parquet(folder / "metadata" / f"metadata_{number}.parquet")
    (folder / "stats").mkdir(exist_ok=True)
    (folder / "stats" / f"{part}.json").write_text(json.dumps({"sample_count": len(frame)}))


def write(folder: Path, rows: tuple[int, ...], **changes: Any) -> tuple[Any, Any]:
    total = sum(rows)
    x, y = numbers(total, 8), numbers(total, 6)
    start = 0
    for part, count in enumerate(rows):
        span = slice(start, start + count)
        values: dict[str, Any] = {
            "images": x[span],
            "texts": y[span],
            "paths": [f"{row:09d}" for row in range(total)][span],
            "captions": [f"caption {row}" for row in range(total)][span],
            "extra": [{"key": f"{row}", "exif": {"w": row}} for row in range(count)],
        }
        write_part(folder, part, len(rows), **values | changes)
        start += count
    return x, y


def whole(vectors: Vectors) -> Any:
    return np.concatenate([chunk for chunk, _ in vectors.chunks()])


@pytest.mark.parametrize("rows", [(5,), (4, 3, 5), (2,) * 11])
def test_both_sides_come_back_in_the_order_of_parts(tmp_path: Path, rows: tuple[int, ...]) -> None:
    x, y = write(tmp_path, rows)
    sides = read_both(tmp_path, NEITHER)
    images, texts = sides[Modality.IMAGE].labels, sides[Modality.TEXT].labels

    assert whole(sides[Modality.IMAGE]).tobytes() == x.tobytes()
    assert whole(sides[Modality.TEXT]).tobytes() == y.tobytes()
    assert images is not None
    assert texts is not None
    assert images.column("id").to_pylist() == [f"{row:09d}" for row in range(len(x))]
    assert images.column("image_path") == images.column("id") == texts.column("id")
    assert texts.column("caption")[-1].as_py() == f"caption {len(x) - 1}"


def test_paths_that_repeat_are_no_ids_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, (3,), paths=["a.jpg", "b.jpg", "a.jpg"])
    vectors = read_both(tmp_path, NEITHER)[Modality.IMAGE]
    with caplog.at_level(logging.WARNING, "csalign"):
        images = describe_images(3, vectors.labels, lambda: vectors.sketch)

    assert images.ids.to_pylist() == ["0", "1", "2"]
    assert images.columns["source"].to_pylist() == ["a.jpg", "b.jpg", "a.jpg"]
    assert "image_path repeats" in caplog.text


def test_one_side_alone_is_one_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # A caption of the images' own metadata stays there when texts were not embedded.
    write(tmp_path / "a", (3,), texts=None)
    write(tmp_path / "b", (3,), images=None)
    x = read_both(tmp_path / "a", NEITHER)
    y = read_both(tmp_path / "b", NEITHER)

    assert list(x) == [Modality.IMAGE]
    assert list(y) == [Modality.TEXT]
    assert len(read_side(tmp_path / "a", Modality.IMAGE)) == 3
    with pytest.raises(DataError, match="has no text_emb"):
        read_side(tmp_path / "a", Modality.TEXT)


def test_embeddings_without_metadata_are_numbered(tmp_path: Path) -> None:
    write(tmp_path, (3,))
    (tmp_path / "metadata" / "metadata_0.parquet").unlink()

    assert not read_both(tmp_path, NEITHER)[Modality.IMAGE].labels.names


def test_a_part_of_another_length_or_without_its_fellows_is_refused(tmp_path: Path) -> None:
    write(tmp_path, (4, 3))
    good = tmp_path / "text_emb" / "text_emb_1.npy"
    np.save(good, numbers(2, 6))
    with pytest.raises(DataError, match=r"text_emb_1\.npy: has 2 rows and .*_1\.\w+ has 3"):
        read_both(tmp_path, NEITHER)
    good.unlink()
    with pytest.raises(DataError, match=r"text_emb: has no part 1, unlike the other folders"):
        read_both(tmp_path, NEITHER)
    np.save(tmp_path / "text_emb" / "text_emb_01.npy", numbers(3, 6))
    assert len(read_both(tmp_path, NEITHER)) == 2
    np.save(good, numbers(3, 6))
    with pytest.raises(DataError, match=r"text_emb_0?1\.npy has the same number"):
        read_both(tmp_path, NEITHER)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "img_emb").mkdir()

    with pytest.raises(DataError, match=r"has no img_emb_N\.npy"):
        read_both(tmp_path, NEITHER)
