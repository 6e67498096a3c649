"""Check dtypes, shapes and devices before calling compiled code, which reads memory without checks.

Operands that come from users are checked by name first (:func:`check_operands`, :func:`check_range`). All operands of
all calls, including backward passes, go through :func:`addresses`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from nbody_pyg.kernels.autograd_flags import is_tracing

_PLAIN = (Tensor, torch.nn.Parameter)


def check_operands(dtype: torch.dtype, device: torch.device, **operands: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise unless every operand has this dtype, is on this device and has the given shape.

    Raises: TypeError: another dtype. ValueError: another shape or device.
    """
    for name, (tensor, shape) in operands.items():
        if tensor.dtype is not dtype:
            raise TypeError(
                f"{name} must have the dtype of the other operands, {dtype}, got {tensor.dtype}; cast it, "
                "and leave autocast off or use set_backend('torch')"
            )
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, got {list(tensor.shape)}; check the irreps and edges"
            )
        if tensor.device != device:
            raise ValueError(
                f"{name} must lie on the device of the other operands, {device}, got {tensor.device}; move it with .to()"
            )


def check_matrices(
    dtype: torch.dtype, device: torch.device, matrices: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]
) -> None:
    """:func:`check_operands` for the weights of a map, of which there are many."""
    for weight, shape in zip(matrices, shapes, strict=True):
        if weight.dtype is not dtype or weight.shape != shape:
            check_operands(dtype, device, weight=(weight, shape))


def check_index(device: torch.device, **operands: tuple[Tensor, tuple[int, ...]]) -> None:
    """:func:`check_operands` for integers.

    Raises: TypeError: another dtype than int64. ValueError: another shape or device.
    """
    for name, (tensor, _) in operands.items():
        if tensor.dtype is not torch.int64:
            raise TypeError(f"{name} must have the dtype torch.int64, got {tensor.dtype}; cast it with .long()")
    check_operands(torch.int64, device, **operands)


def check_range(name: str, index: Tensor, size: int) -> None:
    """Raise unless all entries of an index are in 0 .. ``size`` - 1.

    Raises: ValueError: an entry below 0 or not below ``size``.
    """
    if is_tracing() or index.numel() == 0:
        return
    least, most = torch.aminmax(index)
    low, high = least.item(), most.item()
    if low < 0 or high >= size:
        raise ValueError(
            f"{name} must lie between 0 and {size - 1}, got {low} to {high}; check the edges against the number of parts"
        )


def addresses(
    tensors: Sequence[Tensor | None], sizes: Sequence[int], dtypes: Iterable[torch.dtype]
) -> list[int | None]:
    """Addresses of the data of tensors, for compiled code; None for None.

    One loop without further Python calls, because every product needs about a dozen.

    Raises: TypeError: a tensor without memory, as in tracers, ``vmap`` and on the meta device.
        ValueError: a dtype, size or device that the compiled code does not accept, or a tensor that is not contiguous.
    """
    if len(tensors) != len(sizes):
        raise ValueError(f"compiled products take {len(sizes)} tensors here, got {len(tensors)}; pass one for each")
    found: list[int | None] = [None] * len(sizes)
    for place, (tensor, size, dtype) in enumerate(zip(tensors, sizes, dtypes, strict=False)):  # dtypes may be infinite
        if tensor is None:
            continue
        try:
            fits = (
                type(tensor) in _PLAIN
                and tensor.dtype is dtype
                and tensor.is_cpu
                and tensor.numel() == size
                and tensor.is_contiguous()
            )
            pointer = tensor.data_ptr() if fits else 0
        except RuntimeError:  # tensors of vmap have no address
            fits, pointer = False, 0
        if not pointer and not (fits and size == 0):
            _refuse(tensor, dtype, size)
        found[place] = pointer
    return found


def check_launch(tensors: Sequence[Tensor]) -> Tensor:
    """The first of the tensors of a GPU kernel; all must be on that device and contiguous.

    Raises: as :func:`addresses`.
    """
    first = tensors[0]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), first.dtype)
    for tensor in tensors:
        fits = tensor.dtype is dtype or not tensor.is_floating_point()
        if not (fits and tensor.device == first.device and tensor.is_contiguous()) or _has_no_memory(tensor):
            _refuse(tensor, dtype, tensor.numel())
    return first


def _has_no_memory(tensor: Tensor) -> bool:
    inner = torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(
        tensor
    )
    return inner or tensor.is_meta or type(tensor) not in _PLAIN


def _refuse(tensor: Tensor, dtype: torch.dtype, size: int) -> NoReturn:
    if _has_no_memory(tensor):
        raise TypeError(
            f"compiled products need tensors with numbers in memory, got a {type(tensor).__name__} on {tensor.device} that "
            "a tracer, torch.vmap or a tensor subclass has made; call nbody_pyg.kernels.set_backend('torch') before the "
            "forward pass"
        )
    raise ValueError(
        f"compiled products take {size} numbers of {dtype} on one device here, without gaps, got {tensor.dtype} of shape "
        f"{list(tensor.shape)} and strides {list(tensor.stride())} on {tensor.device}; pass tensors of one dtype and device"
    )


class Several(NamedTuple):
    """Tensors whose addresses go into one array, each with the number of its entries; None for a null pointer."""

    tensors: Sequence[Tensor | None]
    sizes: Sequence[int]
