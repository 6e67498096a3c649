"""MACE of the mace-torch package."""

from __future__ import annotations

import torch
from e3nn import o3
from torch import Tensor, nn

from nbody_pyg.compare.peer import Edges, Facts, Peer


class MACE(Peer):
    """mace-torch's ScaleShiftMACE; scale and shift are those of the potential around it.

    Args:
        facts: see :class:`Peer`.
        irreps: hidden states in e3nn's words.
        lmax: degree of the spherical harmonics.
        correlation: factors in a product of states.
        layers: interactions.
        readout: width of the readout's hidden layer.
    """

    def __init__(
        self, facts: Facts, irreps: str = "64x0e", lmax: int = 3, correlation: int = 3, layers: int = 2,
        readout: int = 16,
    ) -> None:  # fmt: skip
        from mace.modules import ScaleShiftMACE, interaction_classes

        super().__init__(facts)
        block = interaction_classes["RealAgnosticResidualInteractionBlock"]
        self.num_species = len(facts.species)
        self.model = ScaleShiftMACE(
            r_max=facts.cutoff, num_bessel=8, num_polynomial_cutoff=5, max_ell=lmax, interaction_cls=block,
            interaction_cls_first=block, num_interactions=layers, num_elements=self.num_species,
            hidden_irreps=o3.Irreps(irreps), MLP_irreps=o3.Irreps(f"{readout}x0e"),
            atomic_energies=torch.zeros(self.num_species).numpy(), gate=nn.functional.silu,
            avg_num_neighbors=facts.degree, atomic_numbers=list(facts.species), correlation=correlation,
            radial_type="bessel", atomic_inter_scale=1.0, atomic_inter_shift=0.0,
        ).to(facts.dtype)  # fmt: skip

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, edges: Edges, num_atoms: Tensor) -> Tensor:
        num_graphs, (source, target) = num_atoms.shape[0], edges.index
        # MACE adds them to the difference of the positions, target less source
        shifts = pos.index_select(0, source) - pos.index_select(0, target) - edges.vec
        data = {
            "positions": pos,
            "node_attrs": nn.functional.one_hot(self.types(z), self.num_species).to(pos.dtype),
            "edge_index": edges.index,
            "shifts": shifts,
            "unit_shifts": torch.zeros_like(shifts),
            "cell": pos.new_zeros(3 * num_graphs, 3),
            "batch": batch,
            "ptr": torch.cat([num_atoms.new_zeros(1), num_atoms.cumsum(0)]),
            "head": num_atoms.new_zeros(num_graphs),
        }
        energy: Tensor = self.model(data, training=self.training, compute_force=False)["interaction_energy"]
        return energy
