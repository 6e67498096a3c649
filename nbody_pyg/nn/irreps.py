r"""Algebra of types: fragments of a state, their layout, and their couplings.

A state of type :math:`\tau` is one flat tensor in the *ir_mul* layout: block l is the matrix
:math:`F_l` of shape (2l+1, tau_l), channels contiguous, so that the covariant linear map of Proposition 1 is the
plain matrix product ``F_l @ W_l``. e3nn stores the transpose (*mul_ir*); two functions convert.
If all fragments have the same multiplicity, the flat tensor is viewed as (nodes, rows, channels); a state of another
type as (nodes, dim, 1), see :func:`state_shape`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from e3nn import o3
from jaxtyping import Float
from torch import Tensor, nn

from nbody_pyg.kernels.autograd_flags import constant_table
from nbody_pyg.messages import check_choice
from nbody_pyg.renamed import FORMER_PARITY, renamed

#: Parities of the fragments: "natural" is (-1)^l, "both" has two fragments of every degree, and "ignored" has no
#: reflections, as in the paper (every fragment is written even).
PARITIES = ("natural", "both", "ignored")


@renamed(**FORMER_PARITY)
def hidden_irreps(channels: int, lmax: int, parity: str = "natural") -> o3.Irreps:
    """Type with ``channels`` fragments of every degree up to ``lmax``.

    >>> hidden_irreps(4, 2)
    4x0e+4x1o+4x2e
    >>> hidden_irreps(4, 1, "both")
    4x0e+4x0o+4x1e+4x1o

    Raises: ValueError: channels < 1, lmax < 0 or an unknown parity.
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels!r}; try 32")
    if lmax < 0:
        raise ValueError(f"lmax must be at least 0, got {lmax!r}; try 2")
    check_choice("parity", parity, PARITIES)
    if parity == "both":
        return o3.Irreps([(channels, (l, p)) for l in range(lmax + 1) for p in (1, -1)])
    return o3.Irreps([(channels, (l, harmonic_parity(l, parity))) for l in range(lmax + 1)])


def harmonic_parity(l: int, parity: str) -> int:
    """Parity of a solid harmonic of degree l: (-1)^l, or +1 if reflections are ignored."""
    return 1 if parity == "ignored" else (-1) ** l


def harmonic_irreps(lmax: int, parity: str = "natural") -> o3.Irreps:
    """One fragment of each degree: the type of the solid harmonics of an edge vector."""
    return o3.Irreps([(1, (l, harmonic_parity(l, parity))) for l in range(lmax + 1)])


def num_rows(irreps: o3.Irreps) -> int:
    """Number of components sum(2l+1) of a type, multiplicities aside."""
    return sum(ir.dim for _, ir in irreps)


def row_slices(irreps: o3.Irreps) -> list[slice]:
    """Positions of the components of each fragment among the rows of an equal-multiplicity state."""
    stops = torch.tensor([0, *(ir.dim for _, ir in irreps)]).cumsum(0).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(stops)]


def equal_multiplicity(irreps: o3.Irreps) -> int:
    """The common multiplicity of a type. Raises ValueError if the fragments differ."""
    found = {mul for mul, _ in irreps}
    if len(found) != 1:
        raise ValueError(
            f"irreps must have one multiplicity for a channelwise product, got {irreps}; map it with IrrepsLinear"
        )
    multiplicity: int = found.pop()
    return multiplicity


def state_shape(irreps: o3.Irreps) -> tuple[int, int]:
    """Rows and channels of a state: those of one multiplicity, otherwise all components as rows of one channel.

    >>> state_shape(o3.Irreps("4x0e + 4x1o")), state_shape(o3.Irreps("4x0e + 2x1o"))
    ((4, 4), (10, 1))
    """
    one = len({mul for mul, _ in irreps}) == 1
    return (num_rows(irreps), irreps[0].mul) if one else (irreps.dim, 1)


def block_of(x: Float[Tensor, "nodes rows channels"], irreps: o3.Irreps, number: int) -> Float[Tensor, "nodes ir mul"]:
    """The fragments of one degree of a state of any type."""
    mul, ir = irreps[number]
    return x.flatten(1)[:, irreps.slices()[number]].reshape(x.shape[0], ir.dim, mul)


def channel_groups(irreps: o3.Irreps) -> list[o3.Irreps]:
    """A type split into groups of channels, each with one multiplicity and all fragments that have these channels.

    >>> channel_groups(o3.Irreps("48x0e + 32x1o + 16x2e"))
    [16x0e+16x1o+16x2e, 16x0e+16x1o, 16x0e]
    """
    stops = [0, *sorted({mul for mul, _ in irreps})]
    return [
        o3.Irreps([(high - low, ir) for mul, ir in irreps if mul >= high]) for low, high in itertools.pairwise(stops)
    ]


def level_types(
    given: str | o3.Irreps | Mapping[str, str | o3.Irreps], levels: Mapping[int, str], parity: str = "natural"
) -> dict[int, o3.Irreps]:
    """The type of each level (number: name), from one type for all or from types by the names of the levels.

    >>> level_types({"atoms": "8x0e + 4x1o", "groups": "4x0e"}, {0: "atoms", 1: "groups"})
    {0: 8x0e+4x1o, 1: 4x0e}

    Raises: ValueError: a level without type, an unknown name, or an invalid type of states (:func:`state_type`).
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(levels, state_type(given, parity))
    if set(given) != set(levels.values()):
        raise ValueError(
            f"irreps must give a type to each of the levels {list(levels.values())}, and to no other, got {list(given)}"
        )
    return {k: state_type(given[name], parity) for k, name in levels.items()}


def state_type(given: str | o3.Irreps, parity: str = "natural") -> o3.Irreps:
    """A type of states, ordered by degree.

    Raises: ValueError: not a type, fragments of another parity, or more of one fragment than scalars.
    """
    try:
        irreps = o3.Irreps(given).regroup()
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"irreps must be a type such as '32x0e + 16x1o', got {given!r}") from error
    irreps = o3.Irreps(sorted(irreps, key=lambda fragment: (fragment.ir.l, -fragment.ir.p)))
    known = {ir for _, ir in hidden_irreps(1, max((ir.l for _, ir in irreps), default=0), parity)}
    if strange := [str(ir) for _, ir in irreps if ir not in known]:
        raise ValueError(
            f"irreps must have fragments of parity {parity!r} ({', '.join(map(str, sorted(known)))}), got "
            f"{', '.join(strange)} in {given}"
        )
    if not irreps or max(mul for mul, _ in irreps) > irreps.count("0e"):
        raise ValueError(
            f"irreps must have at least as many 0e as other fragments of one degree, since channels meet in products "
            f"through their scalars, got {given}; raise the multiplicity of 0e"
        )
    return irreps


def to_mul_ir(x: Float[Tensor, "*batch dim"], irreps: o3.Irreps) -> Float[Tensor, "*batch dim"]:
    """From the internal layout (channels last in each block) to e3nn's mul_ir layout."""
    return _transpose_blocks(x, irreps, mul_last=True)


def from_mul_ir(x: Float[Tensor, "*batch dim"], irreps: o3.Irreps) -> Float[Tensor, "*batch dim"]:
    """From e3nn's mul_ir layout to the internal layout (channels last in each block)."""
    return _transpose_blocks(x, irreps, mul_last=False)


def _transpose_blocks(x: Tensor, irreps: o3.Irreps, mul_last: bool) -> Tensor:
    irreps = o3.Irreps(irreps)
    if x.shape[-1] != irreps.dim:
        raise ValueError(f"x must have {irreps.dim} components for {irreps}, got {x.shape[-1]}; check the irreps")
    if not has_two_orders(irreps):
        return x
    blocks, start = [], 0
    for mul, ir in irreps:
        block = x[..., start : start + mul * ir.dim]
        shape = (ir.dim, mul) if mul_last else (mul, ir.dim)
        blocks.append(block.reshape(*x.shape[:-1], *shape).transpose(-1, -2).reshape(*x.shape[:-1], mul * ir.dim))
        start += mul * ir.dim
    return torch.cat(blocks, dim=-1)


def has_two_orders(irreps: o3.Irreps) -> bool:
    """Whether mul_ir and ir_mul differ: if a fragment that is not a scalar occurs more than once."""
    return any(mul > 1 and ir.l > 0 for mul, ir in irreps)


@constant_table
def clebsch_gordan(l1: int, l2: int, l3: int) -> Tensor:
    r"""Coupling coefficients (2l1+1, 2l2+1, 2l3+1) in float64, e3nn's real basis and signs.

    Scaled by sqrt(2 l3 + 1), so that factors of unit variance per component give products of unit variance.
    """
    table: Tensor = o3.wigner_3j(l1, l2, l3, dtype=torch.float64)
    return table * math.sqrt(2 * l3 + 1)


class Path(NamedTuple):
    """One coupling: fragment ``first`` times fragment ``second`` gives the irrep ``ir`` (positions in their types)."""

    first: int
    second: int
    ir: o3.Irrep


def coupling_paths(irreps1: o3.Irreps, irreps2: o3.Irreps, keep: o3.Irreps, symmetric: bool = False) -> list[Path]:
    """All couplings of two types whose result is in ``keep``, ordered by result.

    With ``symmetric`` both factors are the same tensor: mirrored paths are left out, and so are couplings of a
    fragment with itself that are antisymmetric (l1 + l2 + l3 odd) and hence identically zero.
    """
    wanted = {ir for _, ir in keep}
    paths = []
    for i, (_, ir1) in enumerate(irreps1):
        for j, (_, ir2) in enumerate(irreps2):
            for ir in ir1 * ir2:
                vanishes = symmetric and i == j and (ir1.l + ir2.l + ir.l) % 2 == 1
                if ir in wanted and not (symmetric and j < i) and not vanishes:
                    paths.append(Path(i, j, ir))
    return sorted(paths, key=lambda path: (path.ir.l, -path.ir.p, path.first, path.second))


def require_reachable(irreps_out: o3.Irreps, reachable: set[o3.Irrep], what: str) -> None:
    """Raise ValueError naming the fragments of ``irreps_out`` that no path reaches."""
    missing = sorted({str(ir) for _, ir in irreps_out if ir not in reachable})
    if missing:
        have = ", ".join(sorted(str(ir) for ir in reachable)) or "nothing"
        raise ValueError(
            f"irreps_out must be reachable: {what} gives {have}, but no path leads to {', '.join(missing)}; "
            f"raise lmax, add input fragments, or drop {', '.join(missing)} from irreps_out"
        )


class Resettable(nn.Module):
    """Module with :meth:`reset_parameters`, which initialises it again.

    The values are those of a new module, built from the stored arguments of the constructor.
    """

    def __new__(cls, *args: Any, **keywords: Any) -> Any:
        module = super().__new__(cls)
        if args or keywords:  # a copy has its own arguments
            object.__setattr__(module, "_arguments", (args, keywords))
        return module

    def reset_parameters(self) -> None:
        """Initialise all weights again; with the same seed, the values of a newly built module. Settings are kept."""
        args, keywords = self.__dict__.get("_arguments", ((), {}))
        for given in (*args, *keywords.values()):
            if isinstance(given, nn.Module):  # a new module would share it
                reset(given)
        self.load_state_dict(type(self)(*args, **keywords).state_dict())


def reset(module: nn.Module) -> None:
    """Reset a module, or its submodules.

    Raises: TypeError: a weight in a module that has no ``reset_parameters``.
    """
    again = getattr(module, "reset_parameters", None)
    if callable(again):
        again()
        return
    if next(module.parameters(recurse=False), None) is not None:
        raise TypeError(
            f"{type(module).__name__} holds weights but has no reset_parameters(), so that it cannot be reset; add one"
        )
    for child in module.children():
        reset(child)


class ConstantTables(Resettable):
    """Module whose constants stay exact when its dtype changes.

    A buffer built in float32 and cast to float64 keeps float32's rounding; the tables here are kept in float64
    beside the module and cast again after every move. They are not part of the state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exact: dict[str, Tensor] = {}

    def add_table(self, name: str, value: Tensor) -> None:
        exact = value.detach().clone()
        self._exact[name] = exact
        dtype = torch.get_default_dtype() if exact.is_floating_point() else exact.dtype
        self.register_buffer(name, exact.to(dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, exact in self._exact.items():
            moved = getattr(self, name)
            setattr(self, name, exact.to(device=moved.device, dtype=moved.dtype))
        return self
