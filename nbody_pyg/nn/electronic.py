"""Total charge and spin of a system as inputs of the network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nbody_pyg.required import required
from nbody_pyg.system import DEFAULT_STATE

# A charge of 1 e shared by ten atoms gives the network a value of about one.
_SHARE = 10.0


def spread_total(total: Tensor, batch: Tensor, weight: Tensor) -> Tensor:
    """Shares of the atoms in a total of each graph; they sum to it."""
    whole = torch.zeros_like(total).index_add(0, batch, weight)
    # A graph without atoms has no shares
    return weight * (total / (whole + (whole == 0))).index_select(0, batch)


class ElectronicEmbedding(nn.Module):
    r"""Total charge and spin multiplicity as scalars of the atoms, and as a term of their energy.

    .. math:: s_i = Q \frac{w_{z_i}}{\sum_j w_{z_j}}, \qquad
              \psi_i^0 = V_{z_i} u_i + V'_{z_i} u_i^2, \quad u_i = \mathrm{arsinh}(10\, s_i), \qquad
              \epsilon_i = a_{z_i} s_i + b_{z_i} s_i^2

    and the same, with separate weights, for the 2S unpaired electrons. :math:`\psi` are initial states of the atoms,
    before all interactions. Everything is zero for a neutral singlet.

    A total is a property of the whole system, so its shares are not local: the total charge of two distant fragments is
    distributed by their elements, regardless of the charge of each fragment. The energy is extensive for copies: n
    copies of a system with n times its charge and n times its unpaired electrons have the same shares and n times the
    energy.

    ================  ==============  ===============================
    symbol            code            shape, unit
    ================  ==============  ===============================
    Q, 2S             ``totals``      (graphs, inputs), e and 1
    s                 ``shares``      (atoms, inputs)
    :math:`\psi`      result          (atoms, 1, channels), 0e
    ================  ==============  ===============================

    Args:
        inputs: "charge", "spin", or both.
        num_species: number of elements.
        channels: number of scalars.
        offset: add the term of the energy.

    Equivariance: invariant; permutation. Smoothness: does not depend on positions.
    Raises: ValueError: no input, or an unknown one.
    """

    def __init__(self, inputs: Sequence[str], num_species: int, channels: int, offset: bool = True) -> None:
        super().__init__()
        self.inputs = check_inputs(inputs)
        count = len(self.inputs)
        self.spread = nn.Parameter(torch.empty(num_species, count))
        self.vectors = nn.Parameter(torch.empty(2 * count, num_species, channels))
        self.offset = nn.Parameter(torch.empty(num_species, 2 * count)) if offset else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Even shares, random vectors, no term of the energy."""
        nn.init.zeros_(self.spread)
        nn.init.normal_(self.vectors, std=0.3)
        if self.offset is not None:
            nn.init.zeros_(self.offset)

    def weight(self, species: Int[Tensor, " atoms"]) -> Float[Tensor, "atoms inputs"]:
        """Weight by which a total is distributed: a positive number of the element."""
        return self.spread.exp().index_select(0, species)

    def shares(
        self,
        species: Int[Tensor, " atoms"],
        batch: Int[Tensor, " atoms"],
        charge: Float[Tensor, " graphs"] | None,
        spin: Float[Tensor, " graphs"] | None,
    ) -> Float[Tensor, "atoms inputs"]:
        """Share of each atom in the total charge and in the unpaired electrons."""
        weight, columns = self.weight(species), []
        for number, name in enumerate(self.inputs):
            total = charge if name == "charge" else None if spin is None else spin - 1.0
            one = weight[:, number]
            columns.append(torch.zeros_like(one) if total is None else spread_total(total.to(one), batch, one))
        return torch.stack(columns, dim=1)

    def forward(
        self, shares: Float[Tensor, "atoms inputs"], species: Int[Tensor, " atoms"]
    ) -> Float[Tensor, "atoms 1 channels"]:
        # arsinh: shares are small in large systems, and must not grow too large in repeated products for single ions
        u = torch.asinh(_SHARE * shares)
        powers = torch.cat([u, u.square()], dim=1)
        vectors = self.vectors.index_select(1, species)
        return torch.einsum("np,pnc->nc", powers, vectors).unsqueeze(1)

    def energy(self, shares: Float[Tensor, "atoms inputs"], species: Int[Tensor, " atoms"]) -> Float[Tensor, " atoms"]:
        """The term of the energy, before all scales."""
        return (required(self.offset).index_select(0, species) * torch.cat([shares, shares.square()], dim=1)).sum(1)

    def extra_repr(self) -> str:
        return ", ".join(self.inputs)


def check_inputs(inputs: Sequence[str]) -> tuple[str, ...]:
    """The inputs in their order.

    Raises: ValueError: none, an unknown one, or one twice.
    """
    given = [inputs] if isinstance(inputs, str) or not isinstance(inputs, Collection) else list(inputs)
    if not given or len(set(given)) < len(given) or not set(given) <= set(DEFAULT_STATE):
        raise ValueError(f"inputs must be some of {', '.join(DEFAULT_STATE)}, each once, got {inputs!r}; or None")
    return tuple(name for name in DEFAULT_STATE if name in given)


def refuse_unused(
    used: Collection[str], assumed: Mapping[str, float], given: Mapping[str, Float[Tensor, " graphs"] | None]
) -> None:
    """Raise if charge or spin of a system is not an input of the model and differs from its training data.

    Args:
        used: those of "charge" and "spin" that are inputs of the model.
        assumed: the values of all its training frames; a key that is missing stands for a neutral singlet.
        given: charge and spin of each graph.

    Raises: ValueError: naming the key, the graph and the cure.
    """
    for key, default in DEFAULT_STATE.items():
        value, known = given.get(key), assumed.get(key, default)
        if value is None or key in used or not bool((wrong := (value - known).abs() > 1e-4).any()):
            continue
        graph = int(wrong.nonzero()[0])
        where = "" if len(value) == 1 else f" of graph {graph}"
        raise ValueError(
            f"{key}{where} is {float(value[graph]):g}, but the model has no input for it and knows {key} {known:g} "
            f"only; train one on frames with several values of {key} (an NBodyNet with inputs=[{key!r}]), or take the "
            f"{key} off the structure if it does not matter"
        )
