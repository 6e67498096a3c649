"""PaiNN and SchNet of schnetpack, with its atomwise readout."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.data import dataloader

from nbody_pyg.compare.peer import Facts, Peer


class Schnetpack(Peer):
    """A representation of schnetpack and its readout, without its own neighbour list and forces.

    Args:
        facts: see :class:`Peer`.
        kind: "painn" or "schnet".
        features: width.
        layers: interactions.
        num_basis: Gaussian radial functions.
    """

    def __init__(
        self, facts: Facts, kind: str = "painn", features: int = 128, layers: int = 3, num_basis: int = 20
    ) -> None:
        super().__init__(facts)
        if not hasattr(dataloader, "T_co"):  # schnetpack 2.1 imports it; torch has renamed it
            dataloader.T_co = getattr(dataloader, "_T_co", None)  # type: ignore[attr-defined]  # that is why
        from schnetpack.atomistic import Atomwise
        from schnetpack.nn import CosineCutoff, GaussianRBF
        from schnetpack.representation import PaiNN, SchNet

        radial = GaussianRBF(n_rbf=num_basis, cutoff=facts.cutoff)
        body = {"painn": PaiNN, "schnet": SchNet}[kind](features, layers, radial, CosineCutoff(facts.cutoff))
        self.model = nn.ModuleDict({"body": body, "readout": Atomwise(n_in=features, output_key="energy")})
        self.model.to(facts.dtype)

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, index: Tensor, num_atoms: Tensor) -> Tensor:
        from schnetpack import properties as key

        source, target = index
        inputs = {
            key.Z: z,
            key.R: pos,
            key.idx_m: batch,
            key.idx_i: target,
            key.idx_j: source,
            key.Rij: pos.index_select(0, source) - pos.index_select(0, target),
            key.n_atoms: num_atoms,
        }
        energy: Tensor = self.model["readout"](self.model["body"](inputs))["energy"]
        return energy.reshape(-1)
