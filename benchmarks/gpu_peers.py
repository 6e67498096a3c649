"""The edge product of cuequivariance_torch, where it is installed."""

from __future__ import annotations

import functools
import warnings

import torch
from products import Path, Problem

MISSING = "cuequivariance_torch: pip install cuequivariance-torch (its GPU kernels: cuequivariance-ops-torch-cu12)"


@functools.lru_cache(maxsize=1)
def _announce_missing() -> None:
    print(f"missing: {MISSING}\n")


def cuequivariance_path(problem: Problem, channels: int, lmax: int) -> dict[str, Path]:
    """Its channelwise product with the paths of ours, weights made from the radial functions, and a sum over edges.

    Empty where it is not installed. Timed, not compared: it orders and scales its paths in its own way.
    """
    try:
        import cuequivariance as cue
        import cuequivariance_torch as cuet
    except ImportError:
        _announce_missing()
        return {}
    ours = next(path for name, path in problem.paths.items() if name.startswith("nbody_pyg"))
    x, harmonics, radial = (t.detach() for t in ours.inputs)
    kinds = [f"{l}{'eo'[l % 2]}" for l in range(lmax + 1)]
    irreps = cue.Irreps("O3", "+".join(f"{channels}x{kind}" for kind in kinds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its own kernels are missing shows in the times
        product = cuet.ChannelWiseTensorProduct(
            irreps, cue.Irreps("O3", "+".join(kinds)), [cue.O3.from_string(kind) for kind in kinds],
            layout=cue.ir_mul, shared_weights=False, internal_weights=False, device=x.device, dtype=x.dtype,
            math_dtype=x.dtype,
        )  # fmt: skip
    source, target = (end.contiguous() for end in problem.index)
    weight = torch.randn(radial.shape[1], product.weight_numel, dtype=x.dtype, device=x.device)

    def call(x, harmonics, radial, weight):
        return product(x, harmonics, radial @ weight, indices_1=source, indices_out=target, size_out=x.shape[0])

    path = Path(call, [x.flatten(1), harmonics, radial], [weight])
    with torch.no_grad():
        out = path.forward()
    seeds = [torch.randn_like(t) for t in path.inputs]
    return {"cuequivariance": path.bind(torch.randn_like(out), seeds)}
