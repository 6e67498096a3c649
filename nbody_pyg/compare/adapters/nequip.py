"""NequIP of the nequip package, in eager mode: its presets, or the network with custom settings."""

from __future__ import annotations

from typing import Any

from ase.data import chemical_symbols
from torch import Tensor

from nbody_pyg.compare.peer import Edges, Facts, Peer


class NequIP(Peer):
    """nequip's message-passing network; the receiver stands first in its edges.

    Args:
        facts: see :class:`Peer`.
        preset: "S", "M", "L" or "XL"; None takes ``arguments`` alone.
        arguments: of the builder, such as num_layers, l_max, num_features, parity.
    """

    periodic = False  # not tried

    def __init__(self, facts: Facts, preset: str | None = None, **arguments: Any) -> None:
        from nequip.model import NequIPGNNModel, PresetNequIPGNNModel
        from nequip.utils.global_state import set_global_state

        super().__init__(facts)
        set_global_state()
        common = {
            "seed": 0,
            "model_dtype": str(facts.dtype).removeprefix("torch."),
            "type_names": [chemical_symbols[z] for z in facts.species],
            "r_max": facts.cutoff,
            "avg_num_neighbors": facts.degree,
            "do_derivatives": False,
        }
        common |= arguments
        self.model = NequIPGNNModel(**common) if preset is None else PresetNequIPGNNModel(preset=preset, **common)

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, edges: Edges, num_atoms: Tensor) -> Tensor:
        from nequip.data import AtomicDataDict as key

        data = {
            key.POSITIONS_KEY: pos,
            key.EDGE_INDEX_KEY: edges.index.flip(0),
            key.ATOM_TYPE_KEY: self.types(z),
            key.BATCH_KEY: batch,
            key.NUM_NODES_KEY: num_atoms,
        }
        energy: Tensor = self.model(data)[key.TOTAL_ENERGY_KEY]
        return energy
