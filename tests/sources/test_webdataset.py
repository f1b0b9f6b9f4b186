import io
import logging
import tarfile
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, CsalignError, DataError
from csalign.core.paths import stand_in
from csalign.sources.records import Record
from csalign.sources.records.open import SourceOptions, open_source

Records = Callable[..., list[Record]]
Outline = Callable[..., list[tuple[Any, ...]]]
Flaws = Callable[..., list[tuple[int | None, str]]]


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (seed, 2 * seed, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_samples(path: Path, *samples: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def write_members(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def error_of(source: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_source(source, SourceOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_samples_of_the_library_itself_are_read(tmp_path: Path, records: Records) -> None:
    samples: list[dict[str, Any]] = [
        {"__key__": "000001", "jpg": jpeg(1), "txt": "one\ntwo "},
        {"__key__": "sub/000002", "png": jpeg(2), "json": {"caption": ["x", "y"], "split": "test"}},
        {"__key__": "000003", "JPEG": jpeg(3), "cls": 4},
        {"__key__": "000004", "txt": "alone"},
    ]
    tar = write_samples(tmp_path / "train-00.tar", *samples)

    found = records(tar)

    assert [
        (r.image and r.image[:2], [tuple(text) for text in r.texts], r.split, r.row) for r in found
    ] == [
        (
            ("train-00/000001", f"{tar}/000001.jpg"),
            [("train-00/000001#0", "one\ntwo", 1)],
            *("train", 1),
        ),
        (
            ("train-00/sub/000002", f"{tar}/sub/000002.png"),
            [("train-00/sub/000002#0", "x", 2), ("train-00/sub/000002#1", "y", 2)],
            *("test", 2),
        ),
        (("train-00/000003", f"{tar}/000003.jpeg"), [], "train", 3),
        (None, [("train-00/000004#0", "alone", 4)], "train", 4),
    ]
    source = open_source(tar)
    assert source.description == "WebDataset of 1 tar file"
    with source.open(0) as volume:
        images = [record.image for record in volume.records(0, 3)]
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda image: image and image.read(), images * 50))
    assert read == [jpeg(1), jpeg(2), jpeg(3)] * 50


def test_a_folder_by_img2dataset_is_read(tmp_path: Path, outline: Outline) -> None:
    for shard in range(2):
        keys = [f"{shard:05d}{row:04d}" for row in range(2)]
        samples: list[dict[str, Any]] = [
            {
                "__key__": key,
                "jpg": jpeg(1),
                "txt": f"of {key}",
                "json": {
                    "url": "http://x",
                    "caption": f"of {key}",
                    "key": key,
                    "status": "success",
                },
            }
            for key in keys
        ]
        write_samples(tmp_path / f"{shard:05d}.tar", *samples)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")

    assert [entry[:2] for entry in outline(tmp_path)] == [
        (f"{shard:05d}/{shard:05d}{row:04d}", [f"of {shard:05d}{row:04d}"])
        for shard in range(2)
        for row in range(2)
    ]
    assert open_source(tmp_path).files == [f"{tmp_path}/00000.tar", f"{tmp_path}/00001.tar"]


def test_an_export_by_clip_benchmark_has_a_caption_a_line(
    tmp_path: Path, outline: Outline, caplog: pytest.LogCaptureFixture
) -> None:
    sample = {"__key__": "s0", "jpg": jpeg(1), "txt": "one\ntwo"}
    tar = write_samples(tmp_path / "test" / "0.tar", sample)
    (tmp_path / "test" / "nshards.txt").write_text("1")
    assert outline(tar) == [("0/s0", ["one\ntwo"], None)]
    assert outline(tar, caption_lines=True) == [("0/s0", ["one", "two"], None)]

    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    with caplog.at_level(logging.INFO):
        assert outline(tmp_path) == [("test/0/s0", ["one", "two"], "test")]
    assert "says retrieval, so each line of a txt is a caption" in caplog.text
    assert outline(tar) == [("0/s0", ["one", "two"], None)]


def test_which_caption_to_read_can_be_named(tmp_path: Path, outline: Outline) -> None:
    tar = write_samples(
        tmp_path / "t.tar",
        {"__key__": "a", "jpg": jpeg(1), "txt": "plain", "json": {"long": "longer", "fold": "k"}},
        {"__key__": "b", "jpg": jpeg(1), "alt.txt": b"other", "json": {"caption": None}},
    )

    assert outline(tar, caption_column="long", split_column="fold") == [
        ("t/a", ["longer"], "k"),
        ("t/b", [], None),
    ]
    assert outline(tar, caption_column="alt.txt")[1] == ("t/b", ["other"], None)
    assert outline(tar, kind="captions") == [
        (None, ["plain"], None),
        (None, [], "b: has neither an image nor a caption (members: .alt.txt, .jpg, .json)"),
    ]
    assert open_source(tar, SourceOptions(kind="captions")).sides == (Modality.TEXT,)
    assert outline(tar, id_column="long") == [
        ("t/a", ["plain"], None),
        (None, [], "b: its json has no 'long' (keys: caption); correct --id-column"),
    ]


def test_the_key_ends_at_the_first_dot(tmp_path: Path, outline: Outline) -> None:
    tar = write_members(
        tmp_path / "t.tar",
        ("./a.left.jpg", jpeg(1)),
        ("./a.jpg", jpeg(2)),
        ("photo.v1.jpg", jpeg(1)),
        ("photo.txt", b"x"),
    )

    assert outline(tar) == [
        ("t/a", [], None),
        (
            *(None, []),
            "photo: its image ends in .v1.jpg, as the key of a member ends at the first dot; name "
            "it .jpg, or choose it with --image-column",
        ),
    ]
    assert outline(tar, image_column="v1.jpg")[1] == ("t/photo", ["x"], None)


def test_what_a_sample_lacks_is_named(tmp_path: Path, flaws: Flaws) -> None:
    tar = write_samples(
        tmp_path / "t.tar",
        {"__key__": "a", "jpg": jpeg(1)},
        {"__key__": "b", "cls": 1, "json": {"width": 3}},
        {"__key__": "c", "jpg": jpeg(1), "json": b"{"},
        {"__key__": "d", "jpg": jpeg(1), "json": b"[]"},
        {"__key__": "e", "jpg": jpeg(1), "txt": b"caf\xe9"},
        {"__key__": "f", "jpg": jpeg(1), "json": {"caption": 3}},
        {"__key__": "g", "jpg": jpeg(1), "txt": bytes((16 << 20) + 1)},
    )

    assert flaws(tar) == [
        (2, "b: has neither an image nor a caption (members: .cls, .json)"),
        (3, "c: its json is not valid (Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1))"),
        (4, "d: its json is not an object"),
        (5, "e: its txt is not UTF-8 (byte 0xe9 at offset 3)"),
        (6, "f: its json: caption must be text, not 3; name another with --caption-column or "
            "--split-column"),
        (7, "g: its txt has 16777217 bytes, more than 16 MiB"),
    ]  # fmt: skip


def test_hostile_members_are_flaws_and_nothing_is_written(tmp_path: Path, outline: Outline) -> None:
    link = tarfile.TarInfo("c.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("d.jpg")
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.jpg"
    device = tarfile.TarInfo("e.jpg")
    device.type = tarfile.CHRTYPE
    folder = tarfile.TarInfo("f.jpg")
    folder.type = tarfile.DIRTYPE
    tar = write_members(
        tmp_path / "t.tar",
        ("a.jpg", jpeg(1)),
        ("../climb.jpg", jpeg(1)),
        ("/absolute.jpg", jpeg(1)),
        *(link, hard, device, folder),
        ("LICENSE", b"no"),
        ("bad\udcff.jpg", jpeg(1)),
        ("._a.jpg", b"a Mac's"),
        ("g.jpg", jpeg(1)),
    )

    assert outline(tar) == [
        ("t/a", [], None),
        (None, [], "../climb: '../climb.jpg' is outside of the tar"),
        (None, [], "/absolute: '/absolute.jpg' is outside of the tar"),
        *(
            (None, [], f"{key}: '{key}.jpg' is a link or special file, which is not followed")
            for key in "cde"
        ),
        (None, [], "LICENSE: 'LICENSE' has no extension"),
        (None, [], r"bad\udcff: 'bad\udcff.jpg' is not a UTF-8 name"),
        ("t/g", [], None),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"]


def test_a_key_or_member_that_repeats_is_a_flaw(tmp_path: Path, outline: Outline) -> None:
    members = [("a.jpg", jpeg(1)), ("b.jpg", jpeg(1)), ("b.JPG", jpeg(2)), ("a.txt", b"late")]

    assert outline(write_members(tmp_path / "t.tar", *members)) == [
        ("t/a", [], None),
        (None, [], "b: has two members .jpg"),
        (
            *(None, []),
            "a: its key is repeated; the members of a sample must be adjacent",
        ),
    ]


@pytest.mark.parametrize("where", ["data", "header", "end"])
def test_a_tar_cut_short_is_usable_up_to_there(
    tmp_path: Path, outline: Outline, where: str
) -> None:
    path = tmp_path / "t.tar"
    samples = [{"__key__": key, "jpg": jpeg(1), "txt": f"of {key}"} for key in "abc"]
    write_samples(path, *samples)
    with tarfile.open(path) as tar:
        last = tar.getmember("c.jpg")
    cut = {"data": last.offset_data + 5, "header": last.offset + 100, "end": last.offset}[where]
    path.write_bytes(path.read_bytes()[:cut])

    *found, bad = outline(path)

    whole = "ab" if where == "data" else "a"
    assert found == [(f"t/{key}", [f"of {key}"], None) for key in whole]
    key = "c" if where == "data" else "b"
    assert bad[2].startswith(f"{key}: the tar ends inside or after sample {key!r}: ")
    assert bad[2].endswith("; write or download it again")


def test_a_tar_with_a_damaged_header_says_so(tmp_path: Path, outline: Outline) -> None:
    path = write_members(tmp_path / "t.tar", *((f"{key}.txt", b"x") for key in "abcd"))
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 10 : 2 * 1024 + 200] = b"\x07" * 190
    path.write_bytes(data)

    assert outline(path) == [
        (None, ["x"], None),
        (
            *(None, []),
            "b: the tar ends inside or after sample 'b': a header is damaged; write or "
            "download it again",
        ),
    ]


def test_a_tar_without_samples_is_a_flaw(tmp_path: Path, flaws: Flaws) -> None:
    assert flaws(write_members(tmp_path / "t.tar")) == [(1, "the tar contains no sample")]


def test_braces_lists_and_stars_name_tars(
    tmp_path: Path, outline: Outline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for shard in range(12):
        write_samples(Path(f"data/{shard:02d}.tar"), {"__key__": "k", "txt": f"{shard}"})
    write_samples(Path("more/x [y].tar"), {"__key__": "k", "txt": "x"})

    def captions(source: str | Path) -> list[str]:
        return [entry[1][0] for entry in outline(source)]

    assert captions(tmp_path / "data" / "{08..11}.tar") == ["8", "9", "10", "11"]
    assert captions("data/{03,01}.tar::data/0[56].tar") == ["3", "1", "5", "6"]
    assert captions("data/1?.tar") == ["10", "11"]
    assert captions("more/x [y].tar") == ["x"]
    assert captions(f"data/00.tar::{tmp_path}/more/*.tar") == ["0", "x"]
    assert open_source("data/{00..11}.tar").description == "WebDataset of 12 tar files"
    assert open_source("data/{0,1}{0,1}.tar").files == [
        f"data/{name}.tar" for name in ("00", "01", "10", "11")
    ]

    assert "do not exist, such as data/12.tar; correct" in error_of("data/{10..13}.tar")
    assert "data/{00,00}.tar: names a file twice" in error_of("data/{00,00}.tar")
    assert "none/*.tar: matches no file" in error_of("none/*.tar")
    with pytest.raises(ConfigError, match="names more than 100000 files"):
        open_source("data/{0..99999999999}.tar")
    Path("data/t.csv").write_text("")
    assert "must all be .tar or all .parquet, not .csv, .tar" in error_of("data/{t.csv,00.tar}")


def test_ids_do_not_depend_on_where_the_tars_lie(tmp_path: Path, outline: Outline) -> None:
    for root in ("here", "there/deeper"):
        for name in ("a/0", "b/0"):
            write_samples(tmp_path / root / f"{name}.tar", {"__key__": "k", "jpg": jpeg(1)})
        found = outline(tmp_path / root)
        assert [entry[0] for entry in found] == ["a/0/k", "b/0/k"]
        assert outline(f"{tmp_path}/{root}/{{a,b}}/0.tar") == found


def test_the_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    tar = write_samples(tmp_path / "a.tar", {"__key__": "k", "txt": "x"})
    marks = [open_source(tmp_path).fingerprint]
    tar.rename(tmp_path / "b.tar")
    marks.append(open_source(tmp_path).fingerprint)
    write_samples(tmp_path / "b.tar", {"__key__": "k", "txt": "x" * 20_000})
    marks.append(open_source(tmp_path).fingerprint)

    assert len(set(marks)) == 3


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("<html>not found</html>" * 100)
    (tmp_path / "b.tar").write_bytes(b"")
    for name, what in (("a.tar", "is a web page, which a server sent"), ("b.tar", "is empty")):
        expected = f"{tmp_path}/{name}: {what}"
        assert error_of(tmp_path / name).startswith(expected)
    write_samples(tmp_path / "c.tar.gz", {"__key__": "k", "txt": "x"})
    assert "c.tar.gz: is compressed, so parts of it cannot be read; unpack it" in error_of(
        tmp_path / "c.tar.gz"
    )
    (tmp_path / "z").mkdir()
    (tmp_path / "c.tar.gz").rename(tmp_path / "z" / "c.tar.gz")
    assert "contains no images, captions (.txt), uncompressed tar or" in error_of(tmp_path / "z")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..2.tar", "has an unpaired brace; write {00000..00012}, or {a,b}"),
        ("{0..x}.tar", "{0..x} is neither a range nor a list; write"),
        ("{0..2}.tar", "2 of its 3 files do not exist, such as"),
    ],
)
def test_a_pattern_with_a_slip_is_told(tmp_path: Path, pattern: str, message: str) -> None:
    write_samples(tmp_path / "1.tar", {"__key__": "k", "txt": "x"})
    with pytest.raises(CsalignError) as caught:
        open_source(f"{tmp_path}/{pattern}")

    assert message in str(caught.value)


def test_a_file_that_is_no_tar_is_a_flaw_among_others(tmp_path: Path, outline: Outline) -> None:
    write_samples(tmp_path / "b.tar", {"__key__": "k", "txt": "x"})
    (tmp_path / "a.tar").write_text("<html>not found</html>" * 100)
    odd = tmp_path / "\udcff.tar"
    odd.write_bytes((tmp_path / "b.tar").read_bytes())

    assert outline(tmp_path) == [
        (None, [], stand_in(b"<html>")),
        (None, ["x"], None),
        (None, [], "file name is not UTF-8; rename the file"),
    ]
    odd.unlink()
    (tmp_path / "b.tar").write_bytes(b"")
    assert error_of(tmp_path).startswith("none of 2 files can be read: ")


def test_many_members_of_one_key_take_neither_time_nor_memory(tmp_path: Path, flaws: Flaws) -> None:
    tar = write_members(tmp_path / "t.tar", *((f"k.{row}", b"") for row in range(5000)))
    tracemalloc.start()
    expected = "k: has neither an image nor a caption (members: .0, .1, .2, .3, .4, ...)"
    assert flaws(tar) == [(1, expected)]
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
