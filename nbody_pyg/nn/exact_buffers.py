"""Buffers that stay in double precision for any precision of the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nbody_pyg.required import required


class Float64Buffers(nn.Module):
    """Keeps the buffers named in ``_float64`` in double precision through ``.float()`` and ``.to(dtype)``.

    Total energies are of the order of 1e4 eV: a cast to float32 and back would lose about 1 meV.
    """

    _float64: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {name: required(self._buffers[name]) for name in self._float64}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch
        for name, before in exact.items():
            after = required(self._buffers[name])
            # The meta device has no data to preserve.
            source = after if before.is_meta else before
            self._buffers[name] = source.to(device=after.device, dtype=torch.float64)
        return self
