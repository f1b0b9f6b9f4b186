"""Which device to compute on."""

import torch

from csalign.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Turn ``--device`` into a torch device that exists here.

    Args:
        name: "auto" takes CUDA, then MPS, then the CPU; otherwise a torch device name.

    Raises:
        ConfigError: no such device on this machine.
    """
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
