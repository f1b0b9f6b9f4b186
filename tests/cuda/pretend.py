"""What shows that code suits a GPU where there is none."""

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from csalign.objective.tiles import supports_bfloat16

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
    found, frame = ("elsewhere", "elsewhere"), sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(str(ROOT)) and code.co_filename != __file__:
            file = code.co_filename.removeprefix(PACKAGE).removeprefix(f"{ROOT}/")
            function = code.co_qualname.split(".<locals>")[0].rpartition(".")[2]
            here = f"{file}:{frame.f_lineno}", f"{file}:{function}"
            if code.co_filename.startswith(PACKAGE):
                return here
            found = here if found[0] == "elsewhere" else found
        frame = frame.f_back  # type: ignore[assignment]
    return found


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device, within its block.

    Args:
        allowed: functions that may read, as "adapters/model.py:embed".
        device: type of the device whose tensors count. On the CPU all stand for those of a GPU, so
            what reads those that would be on the host anyway is to be allowed.

    Attributes:
        lines: reads by line of csalign, as "training/loop.py:340".
        uploads: copies to a GPU that the host waits for, likewise: of memory that is not pinned, or
            not asked to be non-blocking.
    """

    def __init__(self, allowed: Collection[str] = (), device: str = "cpu") -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self._allowed, self._device = allowed, device
        self._patches = ExitStack()

    @property
    def total(self) -> int:
        """How many reads there were."""
        return self.lines.total()

    def clear(self) -> None:
        """Forget what was counted, such as that of a preparation."""
        self.lines.clear()
        self.uploads.clear()

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
            if tensor.device.type == self._device == "cpu":
                self.count()
            return call(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_read(func, args, kwargs, self._device):
            self.count()
        elif _is_upload(func, args, kwargs):
            self.uploads[place()[0]] += 1
        return func(*args, **kwargs)


def _is_read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> bool:
    name = func._schema.name
    if name in ("aten::copy_", "aten::copy"):
        return bool(args[0].device.type == "cpu" != args[1].device.type)
    if not (args and isinstance(args[0], Tensor) and args[0].device.type == device):
        return False
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
        return target is not None and torch.device(target).type == "cpu" != device
    return False


def _is_upload(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name, host = func._schema.name, None
    if name == "aten::_to_copy":
        device = kwargs.get("device")
        is_there = device is not None and torch.device(device).type == "cuda"
        host = args[0] if is_there else None
        waits = not kwargs.get("non_blocking")
    elif name in ("aten::copy_", "aten::copy"):
        host = args[1] if args[0].device.type == "cuda" else None
        waits = not (kwargs.get("non_blocking") or args[2:3] == (True,))
    return host is not None and host.device.type == "cpu" and waits


# Functions whose result is a figure or an array, so that the host has to wait for it.
RESULTS = frozenset(
    {
        "core/devices.py:pick_device",
        "adapters/model.py:embed",
        "adapters/model.py:embed_tokens",
        "encoders/running.py:to_numpy",
        "metrics/retrieval.py:wrong_ahead",
    }
)


@contextmanager
def pretended(allowed: Collection[str] = RESULTS) -> Iterator[HostReads]:
    """Pretend that there is a GPU: tensors on "cuda" have shapes and no values; count host reads.

    Tensors on the CPU are real. What mixes devices, or needs a value that a GPU would hold, fails.
    An array of ones stands for a tensor that is read where that is allowed. `backward` walks the
    graph in Python, since torch's own needs a driver.

    Args:
        allowed: functions that may read.
    """
    reads = HostReads(allowed, "cuda")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    numpy, deepcopy = Tensor.numpy, Tensor.__deepcopy__

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Any:
        if not isinstance(tensor, FakeTensor):
            return deepcopy(tensor, memo)
        return memo.setdefault(id(tensor), tensor.detach().clone())

    def to_numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_copy = isinstance(tensor, FakeTensor) and tensor.device.type == "cpu"
        if is_copy and place()[1] in allowed:
            return np.ones(tensor.shape, numpy(torch.empty(0, dtype=tensor.dtype)).dtype)
        return numpy(tensor, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(fake)
        for owner, name, call in (
            (Tensor, "backward", _backward),
            (Tensor, "pin_memory", lambda tensor, *args: tensor),
            (Tensor, "numpy", to_numpy),
            (Tensor, "__deepcopy__", copied),
            (nn.Module, "_apply", _apply),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
        ):
            stack.enter_context(mock.patch.object(owner, name, call))
        supports_bfloat16.cache_clear()
        stack.callback(supports_bfloat16.cache_clear)
        stack.enter_context(_RealHost(fake))
        stack.enter_context(reads)
        yield reads


class _RealHost(TorchDispatchMode):
    """Leaves tensors on the CPU real, and refuses what torch would send to a GPU by itself."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        device = kwargs.get("device")
        if not any(isinstance(one, FakeTensor) for one in tensors) and (
            device is None or torch.device(device).type != "cuda"
        ):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func._schema.name.startswith("aten::index") and args[0].device.type == "cuda":
            own = [one for one in tree_leaves(args[1]) if isinstance(one, Tensor)]
            if any(one.device.type == "cpu" for one in own):
                raise RuntimeError("rows on a GPU are indexed by numbers on the CPU")
        if func is torch.ops.aten._fused_adamw_.tensor_lr:  # which torch cannot fake
            assert kwargs["lr"].device.type == "cuda"
            func, kwargs = torch.ops.aten._fused_adamw_.default, {**kwargs, "lr": 0.0}
        return func(*tree_map(self._faked, args), **tree_map(self._faked, kwargs))

    def _faked(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return self._fake.from_tensor(value.detach())
        return value


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Do what `nn.Module._apply` does; it cannot put a fake parameter in place of a real one."""
    for child in module.children() if recurse else ():
        _apply(child, change)
    for name, own in module._parameters.items():
        if own is not None:
            moved = change(own.detach())
            module._parameters[name] = nn.Parameter(moved, requires_grad=own.requires_grad)
    for name, values in module._buffers.items():
        if values is not None:
            module._buffers[name] = change(values)
    return module


def _backward(total: Tensor, gradient: Tensor | None = None) -> None:
    """Do what `Tensor.backward` does, node by node."""
    assert total.grad_fn is not None
    waiting = _uses(total.grad_fn)
    given: dict[Any, dict[int, Tensor]] = {}
    ready = [total.grad_fn]
    given[total.grad_fn] = {
        total.output_nr: torch.ones_like(total) if gradient is None else gradient
    }
    with torch.no_grad():
        while ready:
            node = ready.pop()
            own = given.pop(node, {})
            for (following, number), found in zip(
                node.next_functions, _step(node, own), strict=False
            ):
                if following is None:
                    continue
                if found is not None:
                    known = given.setdefault(following, {})
                    found = _checked(following, number, found)
                    known[number] = known[number] + found if number in known else found
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)


def _uses(root: Any) -> Counter[Any]:
    """Count the edges that lead to each node of a graph."""
    uses, seen, left = Counter[Any](), {root}, [root]
    while left:
        for following, _ in left.pop().next_functions:
            if following is not None:
                uses[following] += 1
                if following not in seen:
                    seen.add(following)
                    left.append(following)
    return uses


def _step(node: Any, gradients: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """Compute the gradients of a node's inputs from those of its outputs."""
    edges = len(node.next_functions)
    if not gradients:
        return (None,) * edges
    if hasattr(node, "variable"):
        leaf = node.variable
        leaf.grad = gradients[0] if leaf.grad is None else leaf.grad + gradients[0]
        return ()
    metadata = node._input_metadata
    outputs = [gradients.get(number) for number in range(len(metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        outputs = [
            torch.zeros(about.shape, dtype=about.dtype, device=about.device) if own is None else own
            for own, about in zip(outputs, metadata, strict=True)
        ]
        found = node.apply(*outputs)
    else:
        found = node(*outputs)
    found = found if isinstance(found, tuple) else (found,)
    # Arguments that are not tensors have no edge; here they come last.
    assert not any(one is not None for one in found[edges:])
    return found[:edges]


def _checked(node: Any, number: int, gradient: Tensor) -> Tensor:
    """Refuse a gradient of another shape or device than the value has, as torch does."""
    about = node._input_metadata[number]
    if gradient.device != about.device:
        raise RuntimeError(f"a gradient is on {gradient.device}, its value on {about.device}")
    if gradient.shape != torch.Size(about.shape):
        gradient = gradient.sum_to_size(about.shape)
    return gradient.to(about.dtype)
