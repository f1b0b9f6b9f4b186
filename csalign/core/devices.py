"""Compute devices and the memory that is left."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from csalign.core import distributed
from csalign.core.errors import ConfigError, reason_of

if TYPE_CHECKING:
    import torch

_CGROUPS = Path("/sys/fs/cgroup")


def pick_device(name: str) -> "torch.device":
    """Return the torch device of ``--device``.

    Args:
        name: "auto" takes CUDA, then MPS, then the CPU; otherwise a torch device name. Of several
            processes on a machine each takes a CUDA device of its own.

    Raises:
        ConfigError: no such device on this machine, or fewer than processes.
    """
    import torch

    world = distributed.world()
    if world.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        if world.local_size > torch.cuda.device_count():
            raise ConfigError(
                f"--device: {world.local_size} processes on a machine with "
                f"{torch.cuda.device_count()} CUDA devices; start one per device, or use "
                "--device cpu"
            )
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    if name == "auto":
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            own = distributed.world_from_environment().local_rank % count if count > 1 else 0
            return torch.device("cuda", own) if own else torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device: {name!r} is not usable here ({reason_of(error)}); try auto"
        ) from None
    return device


def free_bytes(device: "torch.device") -> int:
    """Return the memory that is left to this process on a device, in bytes."""
    import torch

    if device.type != "cuda":
        return available_bytes()
    # What torch has kept of freed tensors is used again.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def available_bytes() -> int:
    """Return the memory left to this process in bytes, by /proc/meminfo and its control groups.

    Caches of the kernel count as left. If neither is known, it is half of the physical memory.
    """
    kib = _table(Path("/proc/meminfo")).get("MemAvailable:")
    found = [*_of_groups(Path("/proc/self/cgroup"), _CGROUPS)]
    if kib is not None:
        found.append(1024 * kib)
    if found:
        return max(0, min(found))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _of_groups(membership: Path, mounted: Path) -> Iterator[int]:
    """Yield the memory left in each control group above the process, of version 2 or 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, root = ("memory.max", "memory.current", "inactive_file"), mounted
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = mounted / "memory"
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield from _left(folder, *names)


def _left(folder: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    try:
        most, used = (int((folder / name).read_text()) for name in (limit, usage))
    except (OSError, ValueError):
        return  # the group is not visible from here, or has no limit ("max")
    yield most - used + _table(folder / "memory.stat").get(cached, 0)


def _table(path: Path) -> dict[str, int]:
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
