"""System: what is checked at the border, and what follows from it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ase.build import bulk, molecule
from torch_geometric.data import Batch, Data

from nbody_pyg import BondTree, NBodyNet, Potential
from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy import LevelSpec, Scheme, Topology
from nbody_pyg.hierarchy.bondgraph import components, covalent_bonds
from nbody_pyg.hierarchy.bonds import child_shifts
from nbody_pyg.hierarchy.topology import sort_edges
from nbody_pyg.system import Species, System
from nbody_pyg.testing import random_molecule


def _frames():
    drawn = [random_molecule(n, seed=n) for n in (5, 7)]
    return [AtomicData(z=s.z, pos=s.pos, charge=torch.tensor([float(k)])) for k, s in enumerate(drawn)]


def test_the_three_ways_in_agree():
    batch = Batch.from_data_list(_frames())
    system = System.from_data(batch)
    other = System.from_tensors(batch.z, batch.pos, batch.batch, charge=batch.charge)
    for name in ("z", "pos", "batch", "total_charge"):
        torch.testing.assert_close(getattr(system, name), getattr(other, name), rtol=0, atol=0)
    assert system.num_graphs == other.num_graphs == 2 and repr(system) == "System(12 atoms, graphs=2)"
    assert system.total_charge.tolist() == [0.0, 1.0] and system.total_charge.dtype == torch.float64
    crystal = System.from_ase(bulk("Si"))
    assert crystal.cell.shape == (1, 3, 3) and crystal.pbc.all() and repr(crystal).endswith("periodic)")
    assert System.from_ase(molecule("CH4")).cell is None


def test_it_is_frozen_and_replaced():
    system = System.from_data(_frames()[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        system.pos = system.pos
    moved = system.replace(pos=system.pos + 1.0)
    assert moved.z is system.z and float((moved.pos - system.pos).min()) == 1.0
    assert system.detached() is system
    assert not system.replace(pos=system.pos.clone().requires_grad_(True)).detached().pos.requires_grad


def test_graphs_are_selected_with_what_belongs_to_them():
    system = System.from_data(Batch.from_data_list(_frames()))
    second = system.select(torch.tensor([False, True]))
    assert second.num_graphs == 1 and second.batch.unique().tolist() == [0] and second.total_charge.tolist() == [1.0]
    torch.testing.assert_close(second.pos, _frames()[1].pos, rtol=0, atol=0)


def test_a_gap_is_named_and_composed():
    frame = _frames()[1]
    system = System.from_tensors(frame.z, frame.pos, batch_size=2)
    with pytest.raises(ValueError, match="but graph 1 has no atom"):
        system.without_gaps()
    assert BondTree().compose(system).num_parts[0].tolist() == [7, 0]


def test_models_take_a_system_as_they_take_tensors(ethanol):
    torch.manual_seed(0)
    potential = Potential(NBodyNet([1, 6, 8], BondTree(), channels=4), dict.fromkeys((1, 6, 8), -1.0)).double()
    wanted, system = potential(ethanol), System.from_data(ethanol)
    for found in (potential(system), potential(ethanol.z, ethanol.pos)):
        for key in ("energy", "forces"):
            torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-12)
    net = potential.model
    for found in (net(system), net(net.hierarchy(system)), net(ethanol)):
        torch.testing.assert_close(found, wanted["interaction_energy"], rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match="pass either a Data or tensors"):
        net(Data(z=ethanol.z, pos=ethanol.pos), ethanol.pos)


def test_elements_are_looked_up_once(ethanol, monkeypatch):
    net = NBodyNet([1, 6, 8], channels=4)
    potential, calls = Potential(net, dict.fromkeys((1, 6, 8), -1.0)), []
    number = net._number
    monkeypatch.setattr(net, "_number", lambda z: calls.append(1) or number(z))
    for term in (potential.repulsion, potential.reference):
        assert tuple(term.species) == net.species
    monkeypatch.setattr(torch, "searchsorted", None)
    potential(ethanol)
    assert len(calls) == 1
    # Those of another model are not taken for its own
    foreign = System.from_data(ethanol).replace(species=Species((1, 6), torch.zeros_like(ethanol.z)))
    torch.testing.assert_close(potential(foreign)["energy"], potential(ethanol)["energy"], rtol=0, atol=1e-12)


def test_a_scheme_written_for_tensors_is_told_so_and_works(ethanol):
    with pytest.warns(DeprecationWarning, match=r"Old overrides topology\(\), for tensors; write build\(\) instead"):

        class Old(Scheme):
            symmetry = continuity = "all"
            levels = (LevelSpec("atoms"), LevelSpec("root", 2.0))

            def topology(self, z, pos, batch=None, cell=None, pbc=None):
                count = torch.bincount(batch)
                return Topology((count, torch.ones_like(count)), (None, torch.stack([torch.arange(len(z)), batch])))

    topology = Old().compose(System.from_data(ethanol))
    assert [topology.size(k) for k in range(2)] == [9, 1]
    with pytest.raises(TypeError, match=r"write rebuild\(\) instead, which is given a System, as the scheme that"):
        type("Odd", (BondTree,), {"update": lambda self, topology, z, pos: topology})


def test_the_scheme_of_the_pages_of_0_2_works(ethanol):
    """As docs/extending.md of 0.2 had it, with AtomsInput."""
    with pytest.warns(DeprecationWarning, match=r"AtomsInput is now nbody_pyg\.system\.System"):
        from nbody_pyg.hierarchy.scheme import AtomsInput

    with pytest.warns(DeprecationWarning, match="Molecules overrides"):

        class Molecules(Scheme):
            symmetry = continuity = "all"

            def __init__(self) -> None:
                pairs = LevelSpec("molecules", child_radius=3.0, pair_radius=8.0)
                self.levels = (LevelSpec("atoms", pair_radius=5.0), pairs, LevelSpec("root", child_radius=16.0))

            def topology(self, z, pos, batch=None, cell=None, pbc=None):
                atoms = AtomsInput.check(z, pos, batch, cell, pbc)
                bonds = covalent_bonds(atoms)
                molecule = torch.from_numpy(components(len(z), *bonds.numpy()))
                graph = torch.zeros(int(molecule.max()) + 1, dtype=torch.long).index_put((molecule,), atoms.batch)
                members, _ = sort_edges(torch.stack([torch.arange(len(z)), molecule]), None, len(z))
                root = torch.stack([torch.arange(len(graph)), graph])
                count = torch.bincount(graph, minlength=atoms.num_graphs)
                sizes = (atoms.num_atoms, count, torch.ones_like(count))
                tree = Topology(sizes, (None, members, root), bonds=bonds, periodic=atoms.periodic)
                return self._placed(tree, atoms)

            def update(self, topology, z, pos, batch=None, cell=None, pbc=None):
                return self._placed(topology, AtomsInput.check(z, pos, batch, cell, pbc))

            def _placed(self, tree, atoms):
                return self.with_pairs(dataclasses.replace(tree, child_shift=child_shifts(tree, atoms)), atoms)

    scheme = Molecules()
    batch = Batch.from_data_list([scheme(ethanol), scheme(ethanol)])
    assert scheme.keeps_parts and [scheme.read(batch).size(k) for k in range(3)] == [18, 2, 2]
    net = NBodyNet([1, 6, 8], scheme, channels=4).double()
    torch.testing.assert_close(net(batch)[0], net(ethanol)[0], rtol=0, atol=1e-12)
    assert scheme.rebuild(scheme.read(batch), System.from_data(batch)).size(1) == 2
