import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from csalign.core.atomic import atomic_path, remove_stale_temporaries, write_text
from csalign.core.errors import OutputError
from csalign.core.locks import lock_folder
from csalign.core.outputs import atomic_folder, check_output, remove_folder
from csalign.features.schema import ENTRIES


def artifact(folder: Path, text: str = "old") -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"format": "csalign-features", "is": text}))
    return folder


def test_a_folder_appears_whole_and_without_traces(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "file").write_text("content")
        assert not out.exists()

    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_folder_and_nothing_of_the_new_one(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out")

    def fail() -> None:
        with atomic_folder(out) as folder:
            (folder / "half").write_text("content")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert "old" in (out / "manifest.json").read_text()
    assert not (tmp_path / "out.partial").exists()
    check_output(out, ENTRIES, overwrite=True)
    with atomic_folder(out) as folder:
        assert not (folder / "half").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["site", "site.partial", "site.previous"])
def test_what_csalign_did_not_make_is_never_touched(tmp_path: Path, name: str) -> None:
    other = tmp_path / name
    other.mkdir()
    (other / "config.toml").write_text("title = 'my blog'")
    (other / "manifest.json").write_text('{"name": "web app"}')
    out = tmp_path / "site"
    if name == "site.previous":
        check_output(out, ENTRIES, overwrite=True)
        with atomic_folder(out):
            pass
    else:
        with pytest.raises(OutputError, match="did not make"):
            check_output(out, ENTRIES, overwrite=True)

    assert (other / "config.toml").read_text() == "title = 'my blog'"


def test_a_file_of_the_users_in_an_artifact_keeps_it_from_being_replaced(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out")
    (out / "NOTES.md").touch()

    with pytest.raises(OutputError, match=r"did not make \(NOTES\.md\)"):
        check_output(out, ENTRIES, overwrite=True)


def test_an_output_inside_an_artifact_that_is_read_is_refused(tmp_path: Path) -> None:
    features = artifact(tmp_path / "features")

    with pytest.raises(OutputError, match="is inside"):
        check_output(features / "run", ENTRIES, overwrite=False, inputs=(features,))


def test_the_working_directory_and_mount_points_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (Path(), Path("/proc"), Path("/")):
        with pytest.raises(OutputError, match="mount point or the working directory"):
            check_output(out, ENTRIES, overwrite=True)


def test_a_link_is_followed(tmp_path: Path) -> None:
    real = artifact(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(real)
    check_output(link, ENTRIES, overwrite=True)
    with atomic_folder(link) as folder:
        (folder / "new").touch()

    assert link.is_symlink()
    assert [path.name for path in real.iterdir()] == ["new"]


def test_two_processes_do_not_build_the_same_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from csalign.core.outputs import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])): pass"
    )
    with atomic_folder(out) as folder:
        (folder / "mine").touch()
        other = subprocess.run(
            [sys.executable, "-c", code, out], capture_output=True, text=True, check=False
        )
        assert "another process is writing there" in other.stderr
        assert (folder / "mine").exists()


def test_a_swap_that_was_killed_half_way_is_undone(tmp_path: Path) -> None:
    artifact(tmp_path / "out").rename(tmp_path / ".out.csalign-previous")
    with pytest.raises(OutputError, match="--overwrite"):
        check_output(tmp_path / "out", ENTRIES, overwrite=False)

    assert "old" in (tmp_path / "out" / "manifest.json").read_text()


def test_a_check_during_a_swap_leaves_both_folders_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = artifact(tmp_path / "out")
    rename, refused = Path.rename, []

    def rename_and_check(path: Path, target: Path) -> Path:
        if path.name == "out.partial":  # the old folder is aside, the new one not yet in place
            with pytest.raises(OutputError) as caught:
                check_output(out, ENTRIES, overwrite=True)
            refused.append(str(caught.value))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_and_check)
    with atomic_folder(out) as folder:
        (folder / "new").touch()

    assert "another process is writing there" in refused[0]
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_stays_locked_until_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", []
    rename = Path.rename

    def rename_and_lock(path: Path, target: Path) -> Path:
        with pytest.raises(OutputError, match="another process"), lock_folder(path):
            seen.append("locked by two")
        seen.append("locked by one")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_and_lock)
    with atomic_folder(out):
        pass

    assert seen == ["locked by one"]
    assert [*out.iterdir()] == []


def test_without_file_locks_work_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with atomic_folder(tmp_path / "out") as folder:
        write_text(folder / "file", "content")

    assert (tmp_path / "out/file").read_text() == "content"
    assert "no file locks" in caplog.text
    assert "one csalign at a time" in caplog.text


def test_without_file_locks_a_live_temporary_file_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    path = tmp_path / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("content")
        remove_stale_temporaries(path)

    assert path.read_text() == "content"


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import os, sys; from pathlib import Path; from csalign.core.outputs import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'images').mkdir(); (folder / 'images/half').touch(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, out], check=False, env=os.environ)
    assert killed.returncode == -9
    assert (tmp_path / "out.partial/images/half").exists()
    check_output(out, ENTRIES, overwrite=False)
    with atomic_folder(out) as folder:
        assert not (folder / "images").exists()

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_removed_is_named_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "inside")

    monkeypatch.setattr("shutil.rmtree", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        remove_folder(tmp_path)
    assert caught.value.filename == str(tmp_path)
