"""Which device to compute on."""

import torch

from csalign.core import distributed
from csalign.core.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Turn ``--device`` into a torch device that exists here.

    Args:
        name: "auto" takes CUDA, then MPS, then the CPU; otherwise a torch device name. Of several
            processes on a machine each takes a CUDA device of its own.

    Raises:
        ConfigError: no such device on this machine, or fewer than processes.
    """
    world = distributed.world()
    if world.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        if world.local_size > torch.cuda.device_count():
            raise ConfigError(
                f"device: {world.local_size} processes on a machine with "
                f"{torch.cuda.device_count()} CUDA devices; start one a device, or --device cpu"
            )
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: {name!r} is not usable here ({reason}); try auto") from None
    return device
