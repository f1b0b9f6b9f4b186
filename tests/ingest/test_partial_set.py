import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from csalign.core import locks, outputs
from csalign.core.enums import Modality
from csalign.core.errors import DataError, OutputError, SchemaError
from csalign.core.paths import is_remote, parse_location
from csalign.features.reader import FeatureSet
from csalign.features.schema import ENTRIES, EncoderInfo, Encoders, SplitSettings
from csalign.features.writer import Rows
from csalign.ingest.job import Failure, Job, PartRecord, WorkShard
from csalign.ingest.locks import merge_parts, open_partial_set, sole_owner
from csalign.ingest.partial_set import PartialSet

JOB = Job(
    location="photos",
    source="0" * 64,
    part_rows=3,
    dtype="float32",
    encoders=Encoders(
        image=EncoderInfo(spec="a", width=4), text=EncoderInfo(spec="a", width=2, fingerprint="f")
    ),
)
ONE = WorkShard(0, 1)


@pytest.fixture(params=["local", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A place for a feature set: on disk, in fsspec's memory, or on a local S3 server."""
    if request.param == "s3":
        bucket: Path = request.getfixturevalue("bucket")
        return bucket / "features"
    if request.param == "memory":
        return parse_location(f"memory://{tmp_path}/features")
    return tmp_path / "features"


on_all_stores = pytest.mark.parametrize("out", ["local", "memory", "s3"], indirect=True)


def write_part(partial: PartialSet, name: str, prefix: str = "") -> None:
    number = int(name[-1])
    rows = np.arange(1, 13, dtype=np.float32).reshape(3, 4) + number
    with partial.part(name) as part:
        ids = [f"{prefix}{number}-{row}" for row in range(3)]
        part.write(Modality.IMAGE, Rows({"id": ids}, rows))
        columns: dict[str, list[str | None]] = {"id": [f"{ids[0]}#0", f"x{number}"]}
        columns["image_id"] = [ids[0], None]
        part.write(Modality.TEXT, Rows(columns, rows[:2, :2]))
        part.counts.update(records=3, failed_records=1)
        part.failures.append(Failure(source=f"{name}.jpg", row=None, reason="is empty"))
        partial.finish_part(part, PartRecord(name=name, file_records=6))


def complete(partial: PartialSet) -> None:
    with sole_owner(partial) as is_owner:
        assert is_owner
        partial.complete_and_commit()


def content(folder: Path) -> dict[str, bytes]:
    return {
        "/".join(path.parts[-2:]): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@on_all_stores
def test_parts_become_a_feature_set(out: Path) -> None:
    with open_partial_set(out, JOB, ONE, config="dtype = 'float32'\n") as partial:
        for name in ("part-00001", "part-00000"):
            write_part(partial, name)
        assert not out.exists()
        assert partial.missing() == [ONE]
        partial.mark_finished(["part-00000", "part-00001"])
        assert partial.missing() == []
    complete(partial)

    features = FeatureSet.open(out)
    features.verify()
    counts = features.manifest.counts
    assert (counts.images, counts.texts, counts.pairs, counts.failures) == (6, 4, 2, 2)
    ids = ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert features.images.column("id").to_pylist() == ids
    np.testing.assert_array_equal(features.images.embeddings()[3], [2, 3, 4, 5])
    lines = (out / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["part-00000.jpg", "part-00001.jpg"]
    assert not outputs.partial_path(out).exists()
    entries = {path.name for path in out.iterdir()}
    assert entries == {"manifest.json", "config.toml", "failures.jsonl", "images", "texts"}


def test_who_writes_which_part_when_does_not_matter(out: Path) -> None:
    other = out.with_name("other")
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00000")
        write_part(partial, "part-00001")
        partial.mark_finished(["part-00000", "part-00001"])
    complete(partial)
    for index in (1, 0):
        with open_partial_set(other, JOB, WorkShard(index, 2), config="") as partial:
            write_part(partial, f"part-0000{index}")
            partial.mark_finished([f"part-0000{index}"])
            assert partial.missing() == ([WorkShard(0, 2)] if index else [])
    complete(partial)

    assert {name.split("/")[1]: data for name, data in content(out).items()} == {
        name.split("/")[1]: data for name, data in content(other).items()
    }


def test_a_rerun_finds_what_is_finished_and_nothing_else(out: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="power cut"),
        open_partial_set(out, JOB, ONE, config="") as partial,
    ):
        write_part(partial, "part-00000")
        with partial.part("part-00001") as part:
            part.write(Modality.IMAGE, Rows({"id": ["a"]}, np.ones((1, 4))))
            raise RuntimeError("power cut")
    with open_partial_set(out, JOB, ONE, config="") as partial:
        record = partial.part_record("part-00000")

        assert record is not None
        assert record.pairs == 1
        assert partial.part_record("part-00001") is None
        (partial.folder / "images" / "part-00000.parquet").unlink()
        assert partial.part_record("part-00000") is None


def test_another_job_is_refused_by_what_differs_unless_it_may_restart(out: Path) -> None:
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00000")
    half = JOB.model_copy(update={"dtype": "float16"})
    with pytest.raises(OutputError, match="began with dtype float32, not float16"):
        open_partial_set(out, half, ONE, config="").__enter__()
    elsewhere = JOB.model_copy(update={"source": "1" * 64})
    with pytest.raises(
        OutputError, match=r"the source has changed .* --retry-failures, .* --overwrite"
    ):
        open_partial_set(out, elsewhere, ONE, config="").__enter__()

    with open_partial_set(out, half, ONE, config="", restart=True) as partial:
        assert partial.part_record("part-00000") is None
        assert not (partial.folder / "images").exists()


def test_a_changed_source_resumes_on_request_but_no_process_counts_as_done(out: Path) -> None:
    for index in (0, 1):
        with open_partial_set(out, JOB, WorkShard(index, 2), config="") as partial:
            write_part(partial, f"part-0000{index}")
            partial.mark_finished([f"part-0000{index}"])
    changed = JOB.model_copy(update={"source": "1" * 64})
    with open_partial_set(out, changed, WorkShard(1, 2), config="", retry=True) as partial:
        assert partial.part_record("part-00001") is not None
        partial.mark_finished(["part-00001"])
        assert partial.missing() == [WorkShard(0, 2)]
    with pytest.raises(DataError, match="shards 0/2 are missing"):
        merge_parts(out)
    with open_partial_set(out, changed, WorkShard(0, 2), config="") as partial:
        partial.mark_finished(["part-00000"])
    complete(partial)

    assert FeatureSet.open(out).manifest.counts.images == 6


def test_a_shard_is_processed_by_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "features"
    with open_partial_set(out, JOB, WorkShard(0, 2), config=""):
        with open_partial_set(out, JOB, WorkShard(1, 2), config=""):
            pass
        with pytest.raises(OutputError, match="another process has shard 0/2"):
            open_partial_set(out, JOB, WorkShard(0, 2), config="").__enter__()


def test_a_set_that_only_lacks_its_name_gets_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00000")
        partial.mark_finished(["part-00000"])
    with monkeypatch.context() as broken:
        broken.setattr(outputs, "commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            complete(partial)
    outputs.check_output(out, ENTRIES, overwrite=False)
    with open_partial_set(out, JOB, ONE, config="") as partial:
        assert partial.is_complete
    complete(partial)

    FeatureSet.open(out).verify()


def test_merging_waits_for_every_shard_and_refuses_repeated_ids(out: Path) -> None:
    with pytest.raises(DataError, match="contains no parts"):
        merge_parts(out)
    with open_partial_set(out, JOB, WorkShard(0, 3), config="") as partial:
        write_part(partial, "part-00000")
        partial.mark_finished(["part-00000"])
    with pytest.raises(DataError, match="shards 1/3, 2/3 are missing"):
        merge_parts(out)
    for index, part in ((1, "part-10001"), (2, "part-20001")):
        with open_partial_set(out, JOB, WorkShard(index, 3), config="") as partial:
            write_part(partial, part)
            partial.mark_finished([part])
    with pytest.raises(DataError, match=r"image id '1-0' appears twice \(3 such ids"):
        merge_parts(out)


@on_all_stores
def test_merged_parts_are_divided_as_the_job_says(out: Path) -> None:
    job = JOB.model_copy(update={"splits": SplitSettings(val=1, test=2, group=False)})
    for index in range(2):
        with open_partial_set(out, job, WorkShard(index, 2), config="") as partial:
            names = [f"part-0000{2 * number + index}" for number in range(2)]
            for name in names:
                write_part(partial, name)
            partial.mark_finished(names)
    merge_parts(out)

    features = FeatureSet.open(out)
    assert {name: count["images"] for name, count in features.splits().items()} == {
        "test": 2,
        "train": 9,
        "val": 1,
    }
    features.verify()


def test_a_part_with_a_damaged_record_is_reported_and_processed_again(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00000")
        (partial.folder / "parts" / "part-00000.json").write_text("{")
        assert partial.part_record("part-00000") is None
    message = r"part-00000.json: is damaged .*; its part is processed again"
    assert re.search(message, caplog.text)


def test_a_damaged_mark_does_not_count_as_finished(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00000")
        partial.mark_finished(["part-00000"])
        assert partial.missing() == []
        (mark,) = (partial.folder / "finished").glob("*.json")
        mark.write_text("[]")
        assert partial.missing() == [ONE]
    assert f"{mark}: is damaged" in caplog.text


def test_a_damaged_job_file_is_replaced_only_with_overwrite(out: Path) -> None:
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00000")
        (partial.folder / ".csalign-job.json").write_text("")
    with pytest.raises(SchemaError, match=r"csalign-job\.json: is damaged .*--overwrite"):
        open_partial_set(out, JOB, ONE, config="").__enter__()

    with open_partial_set(out, JOB, ONE, config="", restart=True) as partial:
        assert partial.part_record("part-00000") is None


def test_an_import_does_not_remove_an_unfinished_extraction(tmp_path: Path) -> None:
    out = tmp_path / "features"
    with open_partial_set(out, JOB, ONE, config=""):
        pass
    with pytest.raises(OutputError, match="contains an unfinished extraction"):
        outputs.atomic_folder(out).__enter__()


def test_in_an_object_store_the_first_of_two_completes(bucket: Path) -> None:
    out = bucket / "features"
    assert is_remote(out)
    partials = []
    for index in (0, 1):
        with open_partial_set(out, JOB, WorkShard(index, 2), config="") as partial:
            write_part(partial, f"part-0000{index}")
            partial.mark_finished([f"part-0000{index}"])
            partials.append(partial)

    with sole_owner(partials[1]) as mine, sole_owner(partials[0]) as yours:
        assert mine
        assert not yours
        partials[1].complete_and_commit()
    partials[0].wait_until_committed()
    with pytest.raises(OutputError, match="another process committed it"):
        partials[0].complete_and_commit()

    FeatureSet.open(out).verify()


def test_incompletely_copied_parts_are_named_and_can_be_rebuilt(out: Path) -> None:
    with open_partial_set(out, JOB, ONE, config="") as partial:
        for name in ("part-00000", "part-00001"):
            write_part(partial, name)
        partial.mark_finished(["part-00000", "part-00001"])
    (partial.folder / "texts" / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00001 is incomplete \(1 such parts\)"):
        merge_parts(out)
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00001")
    merge_parts(out)

    assert FeatureSet.open(out).manifest.counts.images == 6


def test_a_set_that_is_complete_has_nothing_to_merge(tmp_path: Path) -> None:
    out = tmp_path / "features"
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00000")
        partial.mark_finished(["part-00000"])
        assert partial.shard_counts() == {1}
    merge_parts(out)
    with pytest.raises(DataError, match=f"^{out}: is complete already; omit --merge$"):
        merge_parts(out)
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00000")
    with pytest.raises(OutputError, match=rf"^{out}: is in the way of .*{out}.partial.* move it$"):
        merge_parts(out)


def test_parts_without_a_lock_beside_them_are_merged_too(tmp_path: Path) -> None:
    out = tmp_path / "features"
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00000")
        partial.mark_finished(["part-00000"])
    for lock in partial.folder.glob(f"{locks.LOCK}*"):
        lock.unlink()
    merge_parts(out)

    assert FeatureSet.open(out).manifest.counts.images == 3


def test_a_rebuilt_part_may_lose_a_side(out: Path) -> None:
    with open_partial_set(out, JOB, ONE, config="") as partial:
        write_part(partial, "part-00000")
        with partial.part("part-00000") as part:
            part.write(Modality.TEXT, Rows({"id": ["a"], "image_id": [None]}, np.ones((1, 2))))
            partial.finish_part(part, PartRecord(name="part-00000", file_records=6, records=3))
        partial.mark_finished(["part-00000"])
    complete(partial)

    assert FeatureSet.open(out).manifest.counts.images == 0
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["texts"]


def test_two_processes_may_write_the_same_part_at_once(
    tmp_path: Path,
) -> None:
    out = tmp_path / "features"
    with (
        open_partial_set(out, JOB, WorkShard(1, 2), config="") as one,
        open_partial_set(out, JOB, ONE, config="") as other,
        one.part("part-00000") as slow,
    ):
        slow.write(Modality.IMAGE, Rows({"id": ["x"]}, np.ones((1, 4))))
        write_part(other, "part-00000")
        one.finish_part(slow, PartRecord(name="part-00000", file_records=6, records=3))
        other.mark_finished(["part-00000"])
        record = other.part_record("part-00000")
    complete(other)

    assert record is not None
    FeatureSet.open(out).verify()


def test_an_interrupted_commit_is_repeated(bucket: Path) -> None:
    out = bucket / "features"
    for _ in range(2):  # into nothing, and over an older set
        with open_partial_set(out, JOB, ONE, config="") as partial:
            write_part(partial, "part-00000")
            partial.mark_finished(["part-00000"])
        (out / outputs.JOB).write_bytes(b"")
        (out / "manifest.json").unlink(missing_ok=True)
        (out / "config.toml").write_bytes(b"")
        outputs.check_output(out, ENTRIES, overwrite=False)
        complete(partial)
        FeatureSet.open(out).verify()


def test_a_bucket_and_foreign_files_are_not_replaced(bucket: Path) -> None:
    with pytest.raises(OutputError, match="is a bucket"):
        outputs.check_output(bucket, ENTRIES, overwrite=True)
    (bucket / "features.partial" / "thesis.tex").write_bytes(b"x")
    with pytest.raises(OutputError, match="csalign did not make it"):
        outputs.check_output(bucket / "features", ENTRIES, overwrite=True)


def test_parts_stay_in_order_beyond_five_digits(tmp_path: Path) -> None:
    names = ["part-99999", "part-100000"]
    with open_partial_set(tmp_path / "features", JOB, ONE, config="") as partial:
        for name in names:
            write_part(partial, name, prefix=name)
        partial.mark_finished(names[::-1])

        assert [record.name for record in partial.part_records()] == names


def test_parts_of_another_job_are_not_merged(tmp_path: Path) -> None:
    half = JOB.model_copy(update={"dtype": "float16"})
    for shard, job in ((WorkShard(0, 2), JOB), (WorkShard(1, 2), half)):
        out = tmp_path / str(shard.index)
        with open_partial_set(out, job, shard, config="") as partial:
            write_part(partial, f"part-0000{shard.index}")
            partial.mark_finished([f"part-0000{shard.index}"])
    shutil.copytree(outputs.partial_path(out), tmp_path / "0.partial", dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"part-00000\.json: the part has other options"):
        merge_parts(tmp_path / "0")

    assert (tmp_path / "0.partial" / "parts").exists()


@pytest.mark.parametrize("restart", [False, True])
def test_an_unfinished_extraction_of_0_1_0_is_refused_with_a_remedy(
    out: Path, restart: bool
) -> None:
    folder = outputs.partial_path(out)
    folder.mkdir(parents=True, exist_ok=True)
    document = JOB.model_dump(mode="json") | {"format": "csalign-job", "checksum": "0" * 64}
    (folder / outputs.JOB).write_text(json.dumps(document))
    message = "an unfinished extraction of csalign 0.1.0; finish it, remove it, or choose another"
    with pytest.raises(OutputError, match=f"features.partial: contains {message} --out"):
        open_partial_set(out, JOB, ONE, config="", restart=restart).__enter__()
    with pytest.raises(OutputError, match=message):
        merge_parts(out)

    assert json.loads((folder / outputs.JOB).read_text()) == document
