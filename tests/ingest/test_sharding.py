import pytest

from csalign.core.errors import ConfigError
from csalign.ingest.job import WorkShard, assigned_parts, check_array, parse_shard

ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "4",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}


def test_a_shard_is_read_from_the_option_or_from_the_batch_system() -> None:
    assert parse_shard("2/5", ARRAY) == WorkShard(2, 5)
    assert parse_shard("auto", {}) == WorkShard(0, 1)
    assert parse_shard("auto", TORCHRUN) == WorkShard(1, 2)
    assert parse_shard("auto", ARRAY) == WorkShard(3, 4)
    assert parse_shard("auto", ARRAY | TORCHRUN) == WorkShard(7, 8)
    assert (
        parse_shard("auto", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "9"}).count == 9
    )


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("4/4", "numbered from 0 to 3"),
        ("1", "must be I/N"),
        ("-1/2", "must be I/N"),
    ],
)
def test_a_shard_that_does_not_exist_is_refused(shard: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_shard(shard)


def test_an_array_that_is_a_list_is_not_guessed_at() -> None:
    array = ARRAY | {"SLURM_ARRAY_TASK_ID": "15", "SLURM_ARRAY_TASK_STEP": "1"}
    with pytest.raises(ConfigError, match=r"pass --shard \$SLURM_ARRAY_TASK_ID/N"):
        parse_shard("auto", array)


@pytest.mark.parametrize(
    ("task", "first", "last", "count"),
    [(5, 5, 5, 1), (3, 3, 5, 2), (0, 0, 5, 2), (4, 3, 5, 3), (1, 1, 1, 1)],
)
def test_resubmitted_tasks_are_not_taken_for_the_whole_array(
    task: int, first: int, last: int, count: int
) -> None:
    names = ("ID", "MIN", "MAX", "COUNT")
    values = (task, first, last, count)
    again = {
        f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(names, values, strict=True)
    }
    with pytest.raises(ConfigError, match=rf"task {task} of .* pass --shard \$SLURM"):
        parse_shard("auto", again)

    assert parse_shard("5/16", again) == WorkShard(5, 16)


def test_an_array_smaller_than_the_first_one_is_refused() -> None:
    first = {"SLURM_ARRAY_TASK_ID": "0"}
    with pytest.raises(ConfigError, match=r"began with 16 shards, .* --shard I/16 .* --shard 0/1 "):
        check_array(WorkShard(0, 1), "auto", {16}, first)
    check_array(WorkShard(0, 1), "0/1", {16}, first)
    check_array(WorkShard(0, 1), "auto", {16}, {})
    check_array(WorkShard(0, 1), "auto", set(), first)
    check_array(WorkShard(0, 16), "auto", {8, 16}, first)


@pytest.mark.parametrize("files", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_part_has_exactly_one_owner(files: int, count: int) -> None:
    shards = [WorkShard(index, count) for index in range(count)]
    for file in range(files):
        owned = [part for shard in shards for part in assigned_parts(shard, files, file, 6)]
        assert sorted(owned) == [*range(6)]


def test_files_are_divided_by_part_only_if_they_are_fewer_than_shards() -> None:
    assert [*assigned_parts(WorkShard(1, 3), 3, 1, 4)] == [0, 1, 2, 3]
    assert [*assigned_parts(WorkShard(1, 3), 3, 2, 4)] == []
    assert [*assigned_parts(WorkShard(1, 3), 2, 0, 8)] == [1, 4, 7]
    assert [*assigned_parts(WorkShard(1, 3), 2, 1, 8)] == [0, 3, 6]
