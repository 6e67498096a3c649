"""Ewald sums of latent charges: Madelung's constant, repetition of the cell, forces and stress."""

from __future__ import annotations

import importlib.util
from itertools import product

import pytest
import torch
from torch_geometric.data import Batch

from nbody_pyg import AtomicData, NBodyNet, NestedShells, Potential
from nbody_pyg.longrange.charges import LongRangeConfig
from nbody_pyg.longrange.coulomb import DirectField, LongRange
from nbody_pyg.system import System

needs_pme = pytest.mark.skipif(importlib.util.find_spec("torchpme") is None, reason="needs torch-pme, extra [periodic]")
PERIODIC = torch.tensor([[True, True, True]])
MADELUNG = 1.747564594633


def _rock_salt(length: float):
    sites = torch.tensor(list(product(range(2), repeat=3)), dtype=torch.float64)
    sign = 1.0 - 2.0 * (sites.sum(1) % 2)
    return 0.5 * length * sites, sign, length * torch.eye(3, dtype=torch.float64).unsqueeze(0)


def _hierarchy(pos, cell=None):
    scheme, z = NestedShells((2.0,)), torch.full((pos.shape[0],), 6)
    system = System.from_tensors(z, pos, None, cell, None if cell is None else PERIODIC)
    return scheme.place(scheme.compose(system), system)


@needs_pme
def test_rock_salt_has_the_constant_of_madelung():
    from nbody_pyg.longrange.ewald import EwaldField

    pos, charges, cell = _rock_salt(12.0)
    field = EwaldField(0.4)(charges.view(-1, 1, 1), _hierarchy(pos, cell))
    # Nearest ions are 6 angstrom apart: nothing of the smearing is left
    torch.testing.assert_close(field.flatten() * charges, torch.full((8,), -MADELUNG / 6.0).double(), rtol=1e-7, atol=0)


@needs_pme
def test_a_large_cell_is_an_open_system(generator):
    """A quadrupole in cells that grow: the field of its images falls at least as 1/L^3."""
    from nbody_pyg.longrange.ewald import EwaldField

    pos = torch.tensor([[1.0, 1, 0], [-1, -1, 0], [1, -1, 0], [-1, 1, 0]], dtype=torch.float64)
    charges = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64).view(-1, 1, 1)
    open_system = DirectField(0, 0.4)(charges, _hierarchy(pos))
    errors = []
    for length in (10.0, 20.0):
        cell = length * torch.eye(3, dtype=torch.float64).unsqueeze(0)
        errors.append(float((EwaldField(0.4)(charges, _hierarchy(pos, cell)) - open_system).abs().max()))
    assert errors[0] > 1e-5 and errors[1] < errors[0] / 8


def _net():
    torch.manual_seed(2)
    settings = {"method": "ewald", "width": 0.4, "elements": False}
    return NBodyNet([1, 8], NestedShells((3.0,)), 2, 1, 2, num_basis=4, long_range=settings).double()


def _crystal():
    generator = torch.Generator().manual_seed(4)
    cell = torch.tensor([[[7.0, 0.3, 0], [0, 6.5, 0.5], [-0.4, 0, 7.4]]], dtype=torch.float64)
    pos = torch.rand(6, 3, dtype=torch.float64, generator=generator) @ cell[0]
    return torch.tensor([8, 1, 1, 8, 1, 1]), pos, cell


@needs_pme
def test_energy_of_a_network_repeats_with_the_cell_and_has_forces_and_stress():
    z, pos, cell = _crystal()
    potential = Potential(_net())
    one = potential(z, pos, cell=cell, pbc=PERIODIC, compute_stress=True)
    twice = potential(
        z.repeat(2), torch.cat([pos, pos + cell[0, 1]]), cell=cell * torch.tensor([[1], [2.0], [1]]), pbc=PERIODIC
    )
    torch.testing.assert_close(twice["energy"], 2 * one["energy"], rtol=0, atol=1e-6)
    torch.testing.assert_close(twice["forces"], one["forces"].repeat(2, 1), rtol=0, atol=1e-6)

    def energy(pos, cell):
        return float(potential(z, pos, cell=cell, pbc=PERIODIC, compute_forces=False)["energy"])

    step = 1e-4
    moved = torch.zeros_like(pos)
    moved[1, 2] = step
    slope = (energy(pos + moved, cell) - energy(pos - moved, cell)) / (2 * step)
    assert float(one["forces"][1, 2]) == pytest.approx(-slope, rel=1e-6)
    strain = torch.zeros(3, 3, dtype=torch.float64)
    strain[0, 1] = strain[1, 0] = step / 2
    up, down = (torch.eye(3, dtype=torch.float64) + s * strain for s in (1, -1))
    slope = (energy(pos @ up, cell @ up) - energy(pos @ down, cell @ down)) / (2 * step)
    volume = float(torch.linalg.det(cell[0]))
    assert float(one["stress"][0, 0, 1]) * volume == pytest.approx(slope, rel=1e-5)
    # The tail is a part of it
    with torch.no_grad():
        potential.model.long_range.strength.zero_()
    assert abs(energy(pos, cell) - float(one["energy"])) > 1e-6


@needs_pme
def test_batches_and_second_derivatives():
    z, pos, cell = _crystal()
    potential, wide = Potential(_net()), 1.1 * cell
    one, other = potential(z, pos, cell=cell, pbc=PERIODIC), potential(z, pos, cell=wide, pbc=PERIODIC)
    batch = torch.arange(12) // 6
    both = potential(
        z.repeat(2), pos.repeat(2, 1), batch, cell=torch.cat([cell, wide]), pbc=PERIODIC.repeat(2, 1), create_graph=True
    )
    torch.testing.assert_close(both["energy"].detach(), torch.cat([one["energy"], other["energy"]]))
    both["forces"].square().sum().backward()
    slope = potential.model.long_range.charges.offset.grad
    assert torch.isfinite(slope).all() and slope.abs().max() > 0


@needs_pme
@pytest.mark.parametrize("order", [(1, 0), (0, 1, 0), (0, 0)], ids=str)
def test_graphs_without_atoms_lie_anywhere_in_a_batch(order):
    z, pos, cell = _crystal()
    whole = AtomicData(z=z, pos=pos, cell=cell, pbc=PERIODIC)
    empty = AtomicData(z=z[:0], pos=pos[:0], cell=2 * cell, pbc=PERIODIC)
    potential = Potential(_net())
    one = potential(whole, compute_stress=True)
    batch = Batch.from_data_list([whole if here else empty for here in order])
    for create_graph in (False, True):
        found = potential(batch, compute_stress=True, create_graph=create_graph)
        for graph, here in enumerate(order):
            for key in ("energy", "stress"):
                torch.testing.assert_close(found[key][graph].detach(), here * one[key][0])
        torch.testing.assert_close(found["forces"].detach(), one["forces"] if any(order) else one["forces"][:0])
    assert one["energy"].abs() > 0.01 and one["stress"].abs().max() > 1e-4


@needs_pme
def test_errors():
    from nbody_pyg.longrange.ewald import EwaldField

    z, pos, cell = _crystal()
    with pytest.raises(ValueError, match=r"width must be below 0\.707 angstrom for 'ewald', got 0\.8"):
        EwaldField(0.8)
    for given in ({}, {"cell": cell, "pbc": torch.tensor([[True, True, False]])}):
        with pytest.raises(ValueError, match="'ewald' needs a cell and pbc in all directions; use 'direct' if open"):
            _net()(z, pos, **given)


def test_without_torch_pme_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchpme", None)
    with pytest.raises(ImportError, match=r"pip install 'nbody_pyg\[periodic\]'"):
        LongRange(LongRangeConfig("ewald"), NestedShells((3.0,)), 1, None, 0)
    assert LongRange(LongRangeConfig("direct"), NestedShells((3.0,)), 1, None, 0).config.method == "direct"
