"""PaiNN and SchNet of schnetpack, with its readouts of energies and dipoles."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.data import dataloader

from nbody_pyg.compare.peer import Edges, Facts, Peer
from nbody_pyg.nn.edges import sum_into
from nbody_pyg.properties import centre_of_mass


class Schnetpack(Peer):
    r"""A representation of schnetpack and its readout, without its own neighbour list and forces.

    A dipole is :math:`|\sum_i q_i (r_i - r_0) + \mu_i|`, without :math:`\mu_i` for SchNet, with charges whose sum is
    zero. The spatial extent is :math:`\sum_i q_i |r_i - r_0|^2`. :math:`r_0` is the centre of mass.

    Args:
        facts: see :class:`Peer`.
        kind: "painn" or "schnet".
        features: width.
        layers: interactions.
        num_basis: Gaussian radial functions.
    """

    readouts = (*Peer.readouts, "dipole_norm", "r2")

    def __init__(
        self, facts: Facts, kind: str = "painn", features: int = 128, layers: int = 3, num_basis: int = 20
    ) -> None:
        super().__init__(facts)
        if not hasattr(dataloader, "T_co"):  # schnetpack 2.1 imports it; torch has renamed it
            dataloader.T_co = getattr(dataloader, "_T_co", None)  # type: ignore[attr-defined]  # that is why
        from schnetpack.atomistic import Atomwise, DipoleMoment
        from schnetpack.nn import CosineCutoff, GaussianRBF
        from schnetpack.representation import PaiNN, SchNet

        radial = GaussianRBF(n_rbf=num_basis, cutoff=facts.cutoff)
        body = {"painn": PaiNN, "schnet": SchNet}[kind](features, layers, radial, CosineCutoff(facts.cutoff))
        readout: nn.Module
        if facts.readout == "dipole_norm":
            vectors = kind == "painn"
            readout = DipoleMoment(
                features, predict_magnitude=True, dipole_key="value", use_vector_representation=vectors
            )
        elif facts.readout == "r2":
            readout = Atomwise(features, aggregation_mode=None, output_key="sum", per_atom_output_key="value")
        else:
            readout = Atomwise(features, output_key="value")
        self.model = nn.ModuleDict({"body": body, "readout": readout})
        self.model.to(facts.dtype)

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, edges: Edges, num_atoms: Tensor) -> Tensor:
        from schnetpack import properties as key

        source, target = edges.index
        arm = pos
        if self.property_readout in ("dipole_norm", "r2"):
            arm = pos - centre_of_mass(z, pos, batch, num_atoms.shape[0]).index_select(0, batch)
        inputs = {
            key.Z: z,
            key.R: arm,
            key.idx_m: batch,
            key.idx_i: target,
            key.idx_j: source,
            key.Rij: edges.vec,
            key.n_atoms: num_atoms,
        }
        value: Tensor = self.model["readout"](self.model["body"](inputs))["value"]
        if self.property_readout == "r2":
            value = sum_into(value * arm.square().sum(-1, keepdim=True), batch, num_atoms.shape[0])
        return value.reshape(-1)
