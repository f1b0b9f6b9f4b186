import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from csalign.core import atomic, locks
from csalign.core.enums import Modality
from csalign.core.errors import DataError, OutputError, SchemaError
from csalign.core.paths import is_remote, parse_location
from csalign.features.manifest import EncoderInfo, Encoders
from csalign.features.reader import FeatureSet
from csalign.features.shard import Rows
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


@pytest.fixture(params=["local", "memory", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A place for a feature set: on disk, in fsspec's memory, on a local S3 server."""
    if request.param == "local":
        yield tmp_path / "features"
    elif request.param == "memory":
        yield parse_location(f"memory://{tmp_path}/features")
    else:
        yield request.getfixturevalue("bucket") / "features"


def write_part(workspace: PartialSet, name: str, prefix: str = "") -> None:
    number = int(name[-1])
    rows = np.arange(1, 13, dtype=np.float32).reshape(3, 4) + number
    with workspace.part(name) as part:
        ids = [f"{prefix}{number}-{row}" for row in range(3)]
        part.write(Modality.IMAGE, Rows({"id": ids}, rows))
        columns: dict[str, list[str | None]] = {"id": [f"{ids[0]}#0", f"x{number}"]}
        columns["image_id"] = [ids[0], None]
        part.write(Modality.TEXT, Rows(columns, rows[:2, :2]))
        part.failures.append(Failure(source=f"{name}.jpg", row=None, reason="is empty"))
        workspace.finish_part(
            part, PartRecord(name=name, file_records=6, records=3, failed_records=1)
        )


def complete(workspace: PartialSet) -> None:
    with sole_owner(workspace) as is_there:
        assert is_there
        workspace.complete_and_commit()


def content(folder: Path) -> dict[str, bytes]:
    return {
        "/".join(path.parts[-2:]): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_parts_become_a_feature_set(out: Path) -> None:
    with open_partial_set(out, JOB, ONE, config="dtype = 'float32'\n") as workspace:
        for name in ("part-00001", "part-00000"):
            write_part(workspace, name)
        assert not out.exists()
        assert workspace.missing() == [ONE]
        workspace.mark_finished(["part-00000", "part-00001"])
        assert workspace.missing() == []
    complete(workspace)

    features = FeatureSet.open(out)
    features.verify()
    counts = features.manifest.counts
    assert (counts.images, counts.texts, counts.pairs, counts.failures) == (6, 4, 2, 2)
    ids = ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert features.images.column("id").to_pylist() == ids
    np.testing.assert_array_equal(features.images.embeddings()[3], [2, 3, 4, 5])
    lines = (out / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["part-00000.jpg", "part-00001.jpg"]
    assert not atomic.partial_path(out).exists()
    entries = {path.name for path in out.iterdir()}
    assert entries == {"manifest.json", "config.toml", "failures.jsonl", "images", "texts"}


def test_who_writes_which_part_when_does_not_matter(out: Path) -> None:
    other = out.with_name("other")
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00000")
        write_part(workspace, "part-00001")
        workspace.mark_finished(["part-00000", "part-00001"])
    complete(workspace)
    for index in (1, 0):
        with open_partial_set(other, JOB, WorkShard(index, 2), config="") as workspace:
            write_part(workspace, f"part-0000{index}")
            workspace.mark_finished([f"part-0000{index}"])
            assert workspace.missing() == ([WorkShard(0, 2)] if index else [])
    complete(workspace)

    assert {name.split("/")[1]: data for name, data in content(out).items()} == {
        name.split("/")[1]: data for name, data in content(other).items()
    }


def test_a_rerun_finds_what_is_finished_and_nothing_else(out: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="power cut"),
        open_partial_set(out, JOB, ONE, config="") as workspace,
    ):
        write_part(workspace, "part-00000")
        with workspace.part("part-00001") as part:
            part.write(Modality.IMAGE, Rows({"id": ["a"]}, np.ones((1, 4))))
            raise RuntimeError("power cut")
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        receipt = workspace.part_record("part-00000")

        assert receipt is not None
        assert receipt.pairs == 1
        assert workspace.part_record("part-00001") is None
        (workspace.folder / "images" / "part-00000.parquet").unlink()
        assert workspace.part_record("part-00000") is None


def test_another_job_is_refused_by_what_differs_unless_it_may_start_anew(out: Path) -> None:
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00000")
    half = JOB.model_copy(update={"dtype": "float16"})
    with pytest.raises(OutputError, match="begun with dtype float32, not float16"):
        open_partial_set(out, half, ONE, config="").__enter__()
    elsewhere = JOB.model_copy(update={"source": "1" * 64})
    with pytest.raises(
        OutputError, match=r"held something else; .* --retry-failures, .* --overwrite"
    ):
        open_partial_set(out, elsewhere, ONE, config="").__enter__()

    with open_partial_set(out, half, ONE, config="", restart=True) as workspace:
        assert workspace.part_record("part-00000") is None
        assert not (workspace.folder / "images").exists()


def test_a_changed_source_goes_on_when_asked_but_no_process_counts_as_done(out: Path) -> None:
    for index in (0, 1):
        with open_partial_set(out, JOB, WorkShard(index, 2), config="") as workspace:
            write_part(workspace, f"part-0000{index}")
            workspace.mark_finished([f"part-0000{index}"])
    changed = JOB.model_copy(update={"source": "1" * 64})
    with open_partial_set(out, changed, WorkShard(1, 2), config="", retry=True) as workspace:
        assert workspace.part_record("part-00001") is not None
        workspace.mark_finished(["part-00001"])
        assert workspace.missing() == [WorkShard(0, 2)]
    with pytest.raises(DataError, match="shards 0/2 are not done"):
        merge_parts(out)
    with open_partial_set(out, changed, WorkShard(0, 2), config="") as workspace:
        workspace.mark_finished(["part-00000"])
    complete(workspace)

    assert FeatureSet.open(out).manifest.counts.images == 6


def test_one_process_has_a_turn_and_another_job_cannot_push_it_out(tmp_path: Path) -> None:
    out = tmp_path / "features"
    with open_partial_set(out, JOB, WorkShard(0, 2), config=""):
        with open_partial_set(out, JOB, WorkShard(1, 2), config=""):
            pass
        with pytest.raises(OutputError, match="another process does shard 0/2"):
            open_partial_set(out, JOB, WorkShard(0, 2), config="").__enter__()


def test_a_set_that_only_lacks_its_name_gets_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00000")
        workspace.mark_finished(["part-00000"])
    with monkeypatch.context() as broken:
        broken.setattr(atomic, "commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            complete(workspace)
    atomic.check_output(out, overwrite=False)
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        assert workspace.is_complete
    complete(workspace)

    FeatureSet.open(out).verify()


def test_merging_waits_for_every_shard_and_refuses_repeated_ids(out: Path) -> None:
    with pytest.raises(DataError, match="holds no parts"):
        merge_parts(out)
    with open_partial_set(out, JOB, WorkShard(0, 3), config="") as workspace:
        write_part(workspace, "part-00000")
        workspace.mark_finished(["part-00000"])
    with pytest.raises(DataError, match="shards 1/3, 2/3 are not done"):
        merge_parts(out)
    for index, part in ((1, "part-10001"), (2, "part-20001")):
        with open_partial_set(out, JOB, WorkShard(index, 3), config="") as workspace:
            write_part(workspace, part)
            workspace.mark_finished([part])
    with pytest.raises(DataError, match=r"image id '1-0' appears twice \(3 such ids"):
        merge_parts(out)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "{", r"part-00000.json: is damaged .*; made again"),
        (
            lambda text: text.replace('"failed_texts": 0', '"failed_texts": 2'),
            r"part-00000.json: does not agree with the checksum in it.*; made again",
        ),
    ],
)
def test_a_part_whose_receipt_is_damaged_is_told_and_made_again(
    out: Path, damage: Callable[[str], str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00000")
        path = workspace.folder / "parts" / "part-00000.json"
        path.write_text(damage(path.read_text()))
        assert workspace.part_record("part-00000") is None
    assert re.search(said, caplog.text)


def test_who_is_done_is_not_believed_to_be_so_by_a_damaged_mark(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00000")
        workspace.mark_finished(["part-00000"])
        assert workspace.missing() == []
        (mark,) = (workspace.folder / "finished").glob("*.json")
        mark.write_text("[]")
        assert workspace.missing() == [ONE]
    assert f"{mark}: is damaged" in caplog.text


def test_where_it_cannot_be_told_what_was_begun_only_overwrite_begins_anew(out: Path) -> None:
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00000")
        (workspace.folder / ".csalign-job.json").write_text("")
    with pytest.raises(SchemaError, match=r"csalign-job\.json: is damaged .*--overwrite"):
        open_partial_set(out, JOB, ONE, config="").__enter__()

    with open_partial_set(out, JOB, ONE, config="", restart=True) as workspace:
        assert workspace.part_record("part-00000") is None


def test_an_unfinished_extraction_is_not_swept_away_by_an_import(tmp_path: Path) -> None:
    out = tmp_path / "features"
    with open_partial_set(out, JOB, ONE, config=""):
        pass
    with pytest.raises(OutputError, match="holds an unfinished extraction"):
        atomic.atomic_folder(out).__enter__()


def test_in_an_object_store_the_first_of_two_completes(bucket: Path) -> None:
    out = bucket / "features"
    assert is_remote(out)
    workspaces = []
    for index in (0, 1):
        with open_partial_set(out, JOB, WorkShard(index, 2), config="") as workspace:
            write_part(workspace, f"part-0000{index}")
            workspace.mark_finished([f"part-0000{index}"])
            workspaces.append(workspace)

    with sole_owner(workspaces[1]) as mine, sole_owner(workspaces[0]) as yours:
        assert mine
        assert not yours
        workspaces[1].complete_and_commit()
    workspaces[0].wait_until_committed()
    with pytest.raises(OutputError, match="is gone"):
        workspaces[0].complete_and_commit()

    FeatureSet.open(out).verify()


def test_parts_that_were_copied_in_part_are_named_and_nothing_is_unreadable(out: Path) -> None:
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        for name in ("part-00000", "part-00001"):
            write_part(workspace, name)
        workspace.mark_finished(["part-00000", "part-00001"])
    (workspace.folder / "texts" / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00001 is not whole \(1 such parts in all\)"):
        merge_parts(out)
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00001")
    merge_parts(out)

    assert FeatureSet.open(out).manifest.counts.images == 6


def test_a_set_that_is_complete_has_nothing_to_merge(tmp_path: Path) -> None:
    out = tmp_path / "features"
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00000")
        workspace.mark_finished(["part-00000"])
        assert workspace.shard_counts() == {1}
    merge_parts(out)
    with pytest.raises(DataError, match=f"^{out}: is whole already; leave out --merge$"):
        merge_parts(out)
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00000")
    with pytest.raises(OutputError, match=rf"^{out}: is in the way of .*{out}.partial.* move it$"):
        merge_parts(out)


def test_parts_without_a_lock_beside_them_are_merged_too(tmp_path: Path) -> None:
    out = tmp_path / "features"
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00000")
        workspace.mark_finished(["part-00000"])
    for lock in workspace.folder.glob(f"{locks.LOCK}*"):
        lock.unlink()
    merge_parts(out)

    assert FeatureSet.open(out).manifest.counts.images == 3


def test_a_part_made_anew_may_lose_a_side(out: Path) -> None:
    with open_partial_set(out, JOB, ONE, config="") as workspace:
        write_part(workspace, "part-00000")
        with workspace.part("part-00000") as part:
            part.write(Modality.TEXT, Rows({"id": ["a"], "image_id": [None]}, np.ones((1, 2))))
            workspace.finish_part(part, PartRecord(name="part-00000", file_records=6, records=3))
        workspace.mark_finished(["part-00000"])
    complete(workspace)

    assert FeatureSet.open(out).manifest.counts.images == 0
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["texts"]


def test_two_processes_that_make_the_same_part_at_once_do_not_harm_each_other(
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
        receipt = other.part_record("part-00000")
    complete(other)

    assert receipt is not None
    FeatureSet.open(out).verify()


def test_a_publication_that_died_half_way_goes_on(bucket: Path) -> None:
    out = bucket / "features"
    for _ in range(2):  # into nothing, and over an older set
        with open_partial_set(out, JOB, ONE, config="") as workspace:
            write_part(workspace, "part-00000")
            workspace.mark_finished(["part-00000"])
        (out / atomic.JOB).write_bytes(b"")
        (out / "manifest.json").unlink(missing_ok=True)
        (out / "config.toml").write_bytes(b"")
        atomic.check_output(out, overwrite=False)
        complete(workspace)
        FeatureSet.open(out).verify()


def test_a_bucket_and_what_is_not_ours_are_left_alone(bucket: Path) -> None:
    with pytest.raises(OutputError, match="is a whole bucket"):
        atomic.check_output(bucket, overwrite=True)
    (bucket / "features.partial" / "thesis.tex").write_bytes(b"x")
    with pytest.raises(OutputError, match="csalign did not make it"):
        atomic.check_output(bucket / "features", overwrite=True)


def test_parts_stay_in_order_beyond_five_digits(tmp_path: Path) -> None:
    names = ["part-99999", "part-100000"]
    with open_partial_set(tmp_path / "features", JOB, ONE, config="") as workspace:
        for name in names:
            write_part(workspace, name, prefix=name)
        workspace.mark_finished(names[::-1])

        assert [receipt.name for receipt in workspace.part_records()] == names


def test_parts_of_another_job_are_not_merged(tmp_path: Path) -> None:
    half = JOB.model_copy(update={"dtype": "float16"})
    for turn, job in ((WorkShard(0, 2), JOB), (WorkShard(1, 2), half)):
        out = tmp_path / str(turn.index)
        with open_partial_set(out, job, turn, config="") as workspace:
            write_part(workspace, f"part-0000{turn.index}")
            workspace.mark_finished([f"part-0000{turn.index}"])
    shutil.copytree(atomic.partial_path(out), tmp_path / "0.partial", dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"part-00000\.json: the part was made with other options"):
        merge_parts(tmp_path / "0")

    assert (tmp_path / "0.partial" / "parts").exists()
