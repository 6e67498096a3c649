"""The repulsion of nuclei at short range, alone and inside a potential."""

from __future__ import annotations

import math

import pytest
import torch
from ase import units
from ase.data import covalent_radii

import factories
from nbody_pyg import BondTree, NestedShells, Potential
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import load_model, save_model
from nbody_pyg.energy import Structure
from nbody_pyg.nn.repulsion import COULOMB, SCREEN_LENGTH, ZBLRepulsion, shortest_distances
from nbody_pyg.system import System
from nbody_pyg.testing import assert_conservative, assert_equivariant, assert_extensive, assert_smooth


def dimer(first: int, second: int, r: float) -> tuple[torch.Tensor, torch.Tensor]:
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3.0
    return torch.tensor([first, second]), torch.stack([torch.zeros_like(direction), r * direction])


def energy_of(repulsion: ZBLRepulsion, z: torch.Tensor, pos: torch.Tensor) -> float:
    return float(repulsion(Structure(System.from_tensors(z, pos))).sum())


def potential(repulsion="auto", scheme=None, **arguments) -> Potential:
    e0 = {1: -13.6, 6: -1030.0, 8: -2040.0}
    return factories.potential(scheme, e0, 0.7, repulsion, seed=1, **arguments)


@pytest.fixture
def squeezed(molecules) -> tuple[torch.Tensor, torch.Tensor]:
    """A molecule at 60 % of its size: every bond feels the repulsion."""
    z, pos = molecules["ethanol"]
    return z, 0.6 * pos


def published(z1: int, z2: int, r: float) -> float:
    """Ziegler, Biersack and Littmark with the constants of ASE, eV; without a window."""
    x = r * (z1**0.23 + z2**0.23) / (0.8854 * units.Bohr)
    weights, exponents = (0.18175, 0.50986, 0.28022, 0.02817), (3.19980, 0.94229, 0.40290, 0.20162)
    screen = sum(c * math.exp(-d * x) for c, d in zip(weights, exponents, strict=True))
    return units.Hartree * units.Bohr * z1 * z2 / r * screen


def test_constants_are_the_published_ones():
    assert units.Hartree * units.Bohr == pytest.approx(COULOMB, rel=1e-7)
    assert pytest.approx(0.46850, abs=1e-4) == SCREEN_LENGTH  # angstrom, as tabulated
    # Far inside the window the energy is the bare function, at contact the Coulomb law.
    bare = ZBLRepulsion([1, 8], reach={"H-O": 40.0, "O-O": 40.0})
    for pair, r in (((1, 8), 0.5), ((8, 8), 0.9), ((8, 8), 0.3)):
        assert energy_of(bare, *dimer(*pair, r)) == pytest.approx(published(*pair, r), rel=1e-6)
    assert energy_of(bare, *dimer(8, 8, 1e-5)) * 1e-5 == pytest.approx(64 * 14.39964, rel=1e-3)


def test_ends_before_the_bond():
    repulsion = ZBLRepulsion([1, 6, 7, 8])
    for first, second in ((1, 1), (1, 6), (6, 8)):
        end = 0.75 * float(covalent_radii[first] + covalent_radii[second])
        assert energy_of(repulsion, *dimer(first, second, end + 1e-9)) == 0.0
        assert 0 < energy_of(repulsion, *dimer(first, second, 0.97 * end)) < 0.3
        assert energy_of(repulsion, *dimer(first, second, 0.3)) > 5.0
    # The shortest bonds there are: N2, CO, acetylene, H2.
    for first, second, bond in ((7, 7, 1.098), (6, 8, 1.128), (6, 6, 1.203), (1, 1, 0.741)):
        assert energy_of(repulsion, *dimer(first, second, bond)) == 0.0
    assert repr(repulsion).startswith("ZBLRepulsion(H-H 0.46, H-C 0.80")


def test_whole_up_to_seven_tenths_of_the_reach():
    """A fade that begins earlier let two carbons of a trained network attract each other inside their bond."""
    repulsion = ZBLRepulsion([1, 6], reach={"C-C": 1.3})
    for r in (0.5, 0.7 * 1.3):
        assert energy_of(repulsion, *dimer(6, 6, r)) == pytest.approx(published(6, 6, r), rel=1e-6)
    assert 0 < energy_of(repulsion, *dimer(6, 6, 1.1)) < 0.6 * published(6, 6, 1.1)


def test_reach_from_frames_leaves_them_alone():
    frames = [AtomicData(z=z, pos=pos) for z, pos in (dimer(8, 1, 0.9), dimer(8, 1, 1.1), dimer(8, 8, 2.5))]
    # Across the face of a cell the two oxygens are 2.0 angstrom apart.
    wrapped = AtomicData(z=torch.tensor([8, 8]), pos=torch.tensor([[0.5, 0, 0], [8.5, 0, 0]]).double())
    wrapped.cell, wrapped.pbc = 10 * torch.eye(3, dtype=torch.float64)[None], torch.ones(1, 3, dtype=torch.bool)
    repulsion = ZBLRepulsion.from_frames([1, 8], [*frames, wrapped])
    assert repulsion.reach == pytest.approx({"H-H": 0.465, "H-O": 0.81, "O-O": 1.8})
    for frame in frames:
        assert energy_of(repulsion, frame.z, frame.pos) == 0.0


@pytest.mark.parametrize("scheme", [NestedShells((4.0,)), BondTree(cutoff=4.0), NestedShells((1.0, 2.0))])
def test_explicit_derivative_is_that_of_autograd(scheme, squeezed):
    z, pos = squeezed
    model = potential(scheme=scheme)
    topology = scheme.topology(z, pos)
    detached = model(z, pos, topology=topology, create_graph=True)
    followed = model(z, pos.clone().requires_grad_(), topology=topology, create_graph=True)
    for key in ("energy", "interaction_energy", "forces"):
        torch.testing.assert_close(detached[key], followed[key].detach(), rtol=0, atol=1e-10)
    without = potential(None, scheme)(z, pos, topology=topology)
    assert float(detached["energy"].detach() - without["energy"]) > 1.0
    assert float((detached["forces"].detach() - without["forces"]).abs().max()) > 1.0


def test_stress_of_a_squeezed_crystal(generator):
    z = torch.tensor([6, 8, 1, 6])
    cell = torch.eye(3, dtype=torch.float64)[None] * 2.1 + 0.1 * torch.randn(1, 3, 3, generator=generator).double()
    pos = torch.rand(4, 3, generator=generator).double() @ cell[0]
    model, h = potential(), 1e-5
    given = model(z, pos, cell=cell, pbc=True, compute_stress=True)
    strain = torch.randn(3, 3, generator=generator).double()
    strain = h * (strain + strain.T)

    def energy(factor):
        deform = torch.eye(3, dtype=torch.float64) + factor * strain
        return model(z, pos @ deform, cell=cell @ deform, pbc=True)["energy"]

    slope = float(energy(1.0) - energy(-1.0)) / 2
    volume = float(torch.linalg.det(cell[0]).abs())
    assert slope == pytest.approx(volume * float((given["stress"][0] * strain).sum()), rel=1e-6)
    plain = potential(None)(z, pos, cell=cell, pbc=True, compute_stress=True)
    assert float((given["stress"] - plain["stress"]).abs().max()) > 1e-3


def test_hessian_holds_it(squeezed):
    z, pos = squeezed
    difference = potential().hessian(z, pos) - potential(None).hessian(z, pos)
    assert float(difference.abs().max()) > 10.0
    assert float((difference - difference.T).abs().max()) < 1e-9 * float(difference.abs().max())


def test_physics_stays(squeezed):
    model = potential()
    systems = [squeezed, (squeezed[0][:6], squeezed[1][:6])]
    assert_equivariant(model, systems=systems)
    assert_conservative(model, systems=systems)
    assert_extensive(model, systems=systems)
    path = (torch.tensor([6, 8]), *(dimer(6, 8, r)[1] for r in (0.9, 2.0)))
    assert assert_smooth(model, paths=[path], continuity=2) > 2.5


def test_on_by_default_for_energies_of_the_practical_preset():
    assert isinstance(potential().repulsion, ZBLRepulsion)
    assert potential(preset="strict").repulsion is None
    assert potential(irreps_out="1o", repulsion="auto").repulsion is None

    class Foreign(torch.nn.Module):
        def forward(self, z, pos, batch):
            return pos.sum().reshape(1)

    assert Potential(Foreign()).repulsion is None
    with pytest.raises(ValueError, match="needs the elements, which Foreign does not name in an attribute 'species'"):
        Potential(Foreign(), repulsion="zbl")
    with pytest.raises(ValueError, match="repulsion must be 'auto', 'zbl', None or a ZBLRepulsion, got 'lj'"):
        Potential(Foreign(), repulsion="lj")


def test_constants_survive_single_precision(squeezed):
    z, pos = squeezed
    torch.testing.assert_close(potential().float().double().repulsion.charge, potential().repulsion.charge)
    model = potential()
    single = potential().float()(z, pos)["energy"] - potential(None).float()(z, pos)["energy"]
    assert float(single) == pytest.approx(float(model(z, pos)["energy"] - potential(None)(z, pos)["energy"]), rel=1e-5)


def test_kept_in_the_model_file(tmp_path, squeezed):
    z, pos = squeezed
    model = potential(ZBLRepulsion([1, 6, 8], reach={"O-H": 1.2}))
    save_model(model, tmp_path / "a.nbody")
    again = load_model(tmp_path / "a.nbody")
    assert again.repulsion.reach["H-O"] == 1.2
    assert float(again(z, pos)["energy"]) == float(model(z, pos)["energy"])
    save_model(potential(None), tmp_path / "b.nbody")
    assert load_model(tmp_path / "b.nbody").repulsion is None


def test_a_batch_is_its_members(squeezed):
    z, pos = squeezed
    model, frame = potential(), AtomicData(z=z, pos=pos)
    scheme = model.model.scheme
    from torch_geometric.data import Batch

    both = model(Batch.from_data_list([scheme(frame), scheme(frame)]), create_graph=True)
    alone = model(z, pos)
    torch.testing.assert_close(both["energy"].detach(), alone["energy"].repeat(2), rtol=0, atol=1e-9)
    torch.testing.assert_close(both["forces"].detach(), alone["forces"].repeat(2, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), r"species must be atomic numbers between 1 and 118, got \[\]"),
        (([1], {"H-C": 1.0}), "reach names 'H-C'; it must be one of the pairs H-H"),
        (([1], {"H-H": -1.0}), r"reach\['H-H'\] must be a positive finite length"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ZBLRepulsion(*arguments)


def test_unknown_element_is_named():
    with pytest.raises(ValueError, match=r"z must hold elements of the repulsion \(H\), got N"):
        energy_of(ZBLRepulsion([1]), *dimer(1, 7, 0.4))
    with pytest.raises(ValueError, match="name of a repulsion must be 'zbl', got 'born'"):
        ZBLRepulsion.from_config({"name": "born"})


@pytest.mark.parametrize("given", [True, False], ids=["pbc", "cell alone"])
def test_reach_from_frames_sees_through_the_cell(given):
    """A cell without pbc is periodic, as everywhere."""
    pos = torch.tensor([[0.2, 1.0, 1.0], [5.3, 1.0, 1.0]], dtype=torch.float64)
    frame = AtomicData(z=torch.tensor([8, 8]), pos=pos, cell=6.0 * torch.eye(3, dtype=torch.float64)[None])
    if given:
        frame.pbc = torch.ones(1, 3, dtype=torch.bool)
    assert shortest_distances([frame]) == pytest.approx({"O-O": 0.9}, abs=1e-12)
