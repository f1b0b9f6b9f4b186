"""What shows that code suits a GPU where there is none."""

import sys
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
PACKAGE = str(ROOT / "csalign") + "/"

# Results that need the values on the host, or whose shape depends on them.
_READS = {
    "aten::_local_scalar_dense",  # item, float, int, bool
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::_unique",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::_linalg_check_errors",
}
# Of a tensor on the CPU these do not pass the dispatcher.
_CALLS = ("numpy", "tolist", "cpu")


def place() -> tuple[str, str]:
    """Return the innermost line of csalign, or else of the test, as "file:line", and its function.

    A fault that a test plants in its own file is found by its line there.
    """
    found, frame = None, sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and path != __file__:
            here = path.removeprefix(PACKAGE).removeprefix(f"{ROOT}/")
            found = found or (f"{here}:{frame.f_lineno}", f"{here}:{frame.f_code.co_name}")
            if path.startswith(PACKAGE):
                return f"{here}:{frame.f_lineno}", f"{here}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return found or ("elsewhere", "elsewhere")


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device, within its block.

    On any device: also of tensors on the CPU, which stand for those of a device; what is read of
    those that would be on the host anyway is to be allowed.

    Args:
        allowed: functions that may read, as "adapters/model.py:embed".

    Attributes:
        lines: reads by line of csalign, as "training/loop.py:340".
    """

    def __init__(self, allowed: Collection[str] = ()) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()
        self._allowed = allowed
        self._patches = ExitStack()

    @property
    def total(self) -> int:
        """How many there were."""
        return self.lines.total()

    def count(self) -> None:
        """Count a read by the calling line."""
        line, function = place()
        if function not in self._allowed:
            self.lines[line] += 1

    def __enter__(self) -> "HostReads":
        for name in _CALLS:
            call = self._counting(getattr(Tensor, name))
            self._patches.enter_context(mock.patch.object(Tensor, name, call))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.device.type == "cpu":
                self.count()
            return call(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_read(func, args, kwargs):
            self.count()
        return func(*args, **kwargs)


def _is_read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = func._schema.name
    if name in _READS:
        return True
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        masks = [
            one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)
        ]
        # A mask and one value fill without waiting.
        return bool(masks) and not (len(args) > 2 and args[2].numel() == 1)
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "aten::_to_copy":
        target = kwargs.get("device")
        return target is not None and torch.device(target).type == "cpu" != args[0].device.type
    if name in ("aten::copy_", "aten::copy"):
        return args[0].device.type == "cpu" != args[1].device.type
    return False
