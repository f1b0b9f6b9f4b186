"""What a command takes in place of a path: arrays, adapters in memory, names on the hub."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from csalign.adapters.hub import local_run
from csalign.core import calls
from csalign.core.calls import is_array, is_pair_of_arrays
from csalign.core.config import Config
from csalign.core.progress import Progress

C = TypeVar("C", bound=Config)
R = TypeVar("R")

_RUNS = ("adapter", "run")


def command(
    config: type[C], *positional: str, example: str
) -> Callable[[Callable[[C, Progress], R]], Callable[..., R]]:
    """Decorate a command like `calls.command`, which then takes `LocalInputs` too."""
    return calls.command(config, *positional, example=example, inputs=LocalInputs)


class LocalInputs:
    """Values on disk, as the `Inputs` of a command; in a temporary folder until the block ends.

    Attributes:
        names: how messages and results call each path.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def place(self, option: str, value: Any) -> Any:
        """Write two arrays as a feature set, one as .npy, an adapter as a run; or fetch a run.

        Raises:
            DataError, ShapeError: as `write_arrays` and `local_run` do.
        """
        if option != "source" and is_pair_of_arrays(value):
            from csalign.features.arrays import write_arrays

            folder = self._new("arrays")
            write_arrays(folder, *value)
            return folder
        if is_array(value):
            import numpy as np

            from csalign.features.arrays import as_array

            path = self._new(f"{option}.npy")
            np.save(path, as_array(value, option))
            return path
        if hasattr(value, "embed_images"):
            folder = self._new("adapter")
            value.save(folder)
            return folder
        if isinstance(value, list | tuple):
            return type(value)(self.place(option, own) for own in value)
        if option in _RUNS and isinstance(value, str | Path):
            found = local_run(value)
            if found != Path(value):
                self.names[str(found)] = str(value)
                return found
        return value

    def _new(self, name: str) -> Path:
        """Return a path that is new, in a temporary folder of its own."""
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="csalign-"))
        path = Path(folder, name)
        self.names[str(path)] = name
        return path
