"""What compiled code is told about its operands must be true: it reads memory by shape and type and cannot
tell."""

from __future__ import annotations

import torch
from torch import Tensor

from nbody_pyg.kernels.scope import is_tracing


def check_operands(dtype: torch.dtype, **operands: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise unless every operand has this dtype and the shape that stands beside it.

    Raises: TypeError: another dtype. ValueError: another shape.
    """
    for name, (tensor, shape) in operands.items():
        if tensor.dtype is not dtype:
            raise TypeError(
                f"{name} must have the dtype of the other operands, {dtype}, got {tensor.dtype}; cast it, "
                "and leave autocast off or use set_backend('torch')"
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, got {list(tensor.shape)}; check the irreps and edges"
            )


def check_range(name: str, index: Tensor, size: int) -> None:
    """Raise unless all entries of an index count something out of ``size``.

    Raises: ValueError: an entry below 0 or not below ``size``.
    """
    if is_tracing() or index.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= size:
        raise ValueError(
            f"{name} must lie between 0 and {size - 1}, got {low} to {high}; check the edges against the number of parts"
        )
