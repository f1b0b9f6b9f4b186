"""Adapters from the Hugging Face hub."""

from pathlib import Path

from csalign.core.errors import DataError

FILES = ("adapter.json", "adapter.safetensors")


def fetch(name: str, *, subfolder: str | None = None, revision: str | None = None) -> Path:
    """Download an adapter, or find it in the hub's cache.

    Args:
        name: of the repository, ``user/name``.
        subfolder: where in it.
        revision: branch, tag or commit.

    Returns:
        The folder that the files are in.

    Raises:
        DataError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        paths = [
            Path(hf_hub_download(name, file, subfolder=subfolder, revision=revision))
            for file in FILES
        ]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise DataError(
            f"{name}: no such run here, and the hub has no adapter of that name ({reason:.200})"
        ) from error
    return paths[0].parent
