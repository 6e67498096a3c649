"""Relaxation of many structures at once, beside ASE's optimizer on one after the other."""

from __future__ import annotations

import copy
import functools
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.optimize import LBFGS
from torch.overrides import TorchFunctionMode

import factories
from nbody_pyg import BondTree, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.cli.frames import read_structures
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import NBodyCalculator, relax, save_model
from nbody_pyg.deploy.relax import _held

potential = functools.partial(factories.potential, scale=3.0, seed=1, correlation=3)


def charged_potential() -> Potential:
    return factories.potential(scale=3.0, seed=1, long_range="direct")


def with_charges(frames: list[AtomicData]) -> list[AtomicData]:
    """A total charge, charges of the atoms, and neutral."""
    out = [copy.copy(frame) for frame in frames]
    out[0].charge = torch.tensor([1.0], dtype=torch.float64)
    out[1].charges = torch.tensor([0.0, -1.0, 0, 0, 0, 0], dtype=torch.float64)
    return out


def crystal(generator, size: float = 5.0) -> AtomicData:
    grid = torch.cartesian_prod(*[torch.arange(2.0)] * 3).double() * size / 2
    pos = grid + 0.1 * torch.randn(grid.shape, generator=generator).double()
    cell = size * torch.eye(3, dtype=torch.float64)[None]
    z = torch.tensor([1, 8, 6, 1, 1, 8, 6, 1])
    return AtomicData(z=z, pos=pos, cell=cell, pbc=torch.ones(1, 3, dtype=torch.bool))


@pytest.fixture
def frames(molecules, generator) -> list[AtomicData]:
    out = []
    for name in ("ethanol", "methanol", "ethanol"):
        z, pos = molecules[name]
        out.append(AtomicData(z=z, pos=pos + 0.05 * torch.randn(pos.shape, generator=generator).double()))
    return out


def beside_ase(model: Potential, frames: list[AtomicData], steps: int) -> None:
    found = relax(model, frames, fmax=1e-9, max_steps=steps)
    for number, frame in enumerate(frames):
        atoms = frame.to_ase()
        atoms.calc = NBodyCalculator(model, bonds="first")
        start = atoms.get_potential_energy()
        LBFGS(atoms, logfile=None, memory=30).run(fmax=1e-9, steps=steps)
        assert np.abs(atoms.positions - found.frames[number].pos.numpy()).max() < 1e-7
        assert float(found.energy[number]) == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
        assert float(found.start_energy[number]) == pytest.approx(start, abs=1e-8)
    assert float((found.start_energy - found.energy).abs().min()) > 1e-4
    assert not found.converged.any() and found.steps.tolist() == [steps] * len(frames)


@pytest.mark.slow
def test_steps_are_those_of_ase(frames, generator):
    model = potential(NestedShells((4.0,)))
    # Near a minimum: elsewhere ASE keeps steps along which the energy curves downwards, and goes uphill.
    frames = relax(model, frames, fmax=0.02, max_steps=300).frames
    for frame in frames:
        frame.pos = frame.pos + 0.01 * torch.randn(frame.pos.shape, generator=generator).double()
    beside_ase(model, frames, 12)


@pytest.mark.slow
def test_parts_of_a_tree_stay_those_of_the_start(frames):
    model = potential(BondTree(cutoff=4.0))
    beside_ase(model, frames, 1)
    with pytest.warns(
        UserWarning, match=r"bonds found after the relaxation of structure 0 .* \(broken: C1-H6\); 3 of 3"
    ):
        found = relax(model, frames, fmax=1e-9, max_steps=15)
    assert found.bond_changes[0] == "broken: C1-H6"
    scheme = model.model.scheme
    for number, (before, after) in enumerate(zip(frames, found.frames, strict=True)):
        tree = scheme.update(scheme.topology(before.z, before.pos), after.z, after.pos)
        energy = float(model(after.z, after.pos, topology=tree)["energy"])
        assert energy == pytest.approx(float(found.energy[number]), abs=1e-9)
    assert float((found.start_energy - found.energy).min()) > 0.1


@pytest.mark.slow
def test_company_does_not_matter(frames):
    model = potential(NestedShells((4.0,)))
    together = relax(model, frames, fmax=0.3, max_steps=60)
    assert len(set(together.steps.tolist())) > 1  # they leave the batch at different times
    for number, frame in enumerate(frames):
        alone = relax(model, [frame], fmax=0.3, max_steps=60, batch_size=1)
        assert int(alone.steps[0]) == int(together.steps[number])
        torch.testing.assert_close(alone.frames[0].pos, together.frames[number].pos, rtol=0, atol=1e-7)
    assert bool(together.converged.all()) and float(together.largest.max()) <= 0.3


def test_periodic_structures_in_pieces(generator):
    model = potential(NestedShells((3.0,)))
    frames = [crystal(generator, size) for size in (5.0, 5.5, 6.0)]
    found = relax(model, frames, fmax=0.05, max_steps=200, batch_size=2)
    assert bool(found.converged.all()) and len(found.frames) == 3
    for number, frame in enumerate(found.frames):
        again = model(frame.z, frame.pos, cell=frame.cell, pbc=frame.pbc)
        assert float(again["forces"].norm(dim=1).max()) <= 0.05 + 1e-9
        assert float(again["energy"]) == pytest.approx(float(found.energy[number]), abs=1e-9)


def argon() -> Potential:
    """Lennard-Jones atoms with a minimum near 2.6 angstrom."""
    return factories.argon(factories.LennardJones(2.3, 0.25, 6.0))


def strained(strain: np.ndarray) -> Atoms:
    """A crystal of four atoms off their places, in a cell that is not relaxed."""
    atoms = bulk("Ar", "fcc", 3.8, cubic=True)
    atoms.rattle(0.03, seed=3)
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    return atoms


STRAINS = (np.diag([0.97, 0.96, 0.98]), np.diag([1.03, 1.04, 1.02]), np.eye(3) + 0.04 * np.eye(3, k=1))


@pytest.mark.slow
@pytest.mark.parametrize("pressure", [0.0, 0.02])
@pytest.mark.parametrize("kind", ["full", "isotropic"])
def test_cells_relax_as_with_the_filter_of_ase(kind, pressure):
    model, starts = argon(), [strained(strain) for strain in STRAINS]
    found = relax(model, starts, fmax=1e-9, max_steps=8, cell=kind, pressure=pressure)
    for atoms, after in zip(starts, found.frames, strict=True):
        before = atoms.copy()
        atoms.calc = NBodyCalculator(model)
        filtered = FrechetCellFilter(atoms, scalar_pressure=pressure, hydrostatic_strain=kind == "isotropic")
        LBFGS(filtered, logfile=None, memory=30).run(fmax=1e-9, steps=8)
        # ASE lets the cell turn a little, in the second order of the strain
        assert np.abs(atoms.positions - after.positions).max() < 1e-4
        assert np.abs(atoms.cell.array - after.cell.array).max() < 1e-4 < 1e-2 < np.abs(after.cell - before.cell).max()
        np.testing.assert_allclose(after.get_stress(), atoms.get_stress(), rtol=0, atol=1e-6)
        assert np.abs(after.get_stress()).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("pressure", [0.0, 0.05])
def test_a_relaxed_cell_has_the_pressure_of_its_surroundings(pressure):
    """Strained crystals of eight atoms find the lattice of least enthalpy, from both sides and from a shear."""
    model, starts = argon(), [strained(strain) for strain in STRAINS]
    found = relax(model, starts, fmax=1e-6, max_steps=300, cell=True, pressure=pressure)
    assert bool(found.converged.all())
    for after in found.frames:
        np.testing.assert_allclose(after.get_stress(), [-pressure] * 3 + [0.0] * 3, rtol=0, atol=1e-6)
    volumes = [after.get_volume() for after in found.frames]
    assert np.ptp(volumes) < 1e-4 * volumes[0] and min(abs(volumes[0] - s.get_volume()) for s in starts[:2]) > 1


def test_directions_that_are_not_periodic_keep_their_length():
    model, frame = argon(), AtomicData.from_ase(strained(STRAINS[0]))
    frame.pbc = torch.tensor([[True, True, False]])
    frame.cell[0, 2, 2] = 20.0
    found = relax(model, [frame], fmax=1e-9, max_steps=5, cell=True).frames[0]
    assert float((found.cell - frame.cell)[0, :2, :2].abs().max()) > 1e-3
    torch.testing.assert_close(found.cell[0, 2], frame.cell[0, 2], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.cell[0, :, 2], frame.cell[0, :, 2], rtol=0, atol=1e-12)


def test_cells_of_atoms_and_wrong_arguments(frames):
    model, atoms = argon(), strained(STRAINS[0])
    atoms.set_constraint(FixAtoms([0]))
    (after,) = relax(model, [atoms], max_steps=3, cell=True).frames
    assert after.constraints and after.get_stress().shape == (6,)
    assert np.abs(after.cell.array - atoms.cell.array).max() > 1e-3
    scaled = atoms.get_scaled_positions()
    np.testing.assert_allclose(after.get_scaled_positions()[0], scaled[0], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"pressure must be 0 where cells are fixed, got 0\.1; pass cell=True as well"):
        relax(model, frames, pressure=0.1)
    with pytest.raises(ValueError, match="pressure must be finite, got inf"):
        relax(model, frames, cell=True, pressure=float("inf"))
    with pytest.raises(ValueError, match="cell must be one of fixed, full, isotropic, got 'volume'"):
        relax(model, frames, cell="volume")
    slab = strained(STRAINS[0])
    slab.set_cell([*slab.cell.array[:2], [0.0, 0.0, 0.0]])
    slab.pbc = [True, True, False]
    assert len(relax(model, [slab], max_steps=1).frames) == 1
    with pytest.raises(ValueError, match=r"must have a volume, got frame 1 .*give it a vector along each"):
        relax(model, [atoms, slab], cell=True)


def test_charges_stay_with_their_structures(frames):
    model, charged = charged_potential(), with_charges(frames)
    neutral = relax(model, frames, max_steps=1)
    for order in ([0, 1, 2], [2, 1, 0], [0, 2], [2, 0], [1, 2]):  # any of them first, each kind alone and mixed
        found = relax(model, [charged[i] for i in order], fmax=1e-9, max_steps=5)
        for number, i in enumerate(order):
            assert float(found.start_energy[number]) == pytest.approx(float(model(charged[i])["energy"]), abs=1e-9)
            change = abs(float(found.start_energy[number] - neutral.start_energy[i]))
            assert change < 1e-9 if i == 2 else change > 1e-3
            after = found.frames[number]
            assert set(after.keys()) == {*charged[i].keys(), "energy", "forces"}
            again = model(after)
            assert float(again["energy"]) == pytest.approx(float(found.energy[number]), abs=1e-9)
            torch.testing.assert_close(again["forces"], after.forces, rtol=0, atol=1e-8)
            assert float(after.forces.abs().max()) > 1e-6


@pytest.mark.slow
def test_charged_structures_may_leave_the_batch(frames):
    model, charged = charged_potential(), with_charges(frames)
    together = relax(model, charged, fmax=1.0, max_steps=60)
    assert len(set(together.steps.tolist())) > 1
    for number, frame in enumerate(charged):
        after = together.frames[number]
        again = model(after.z, after.pos, charge=frame.get("charge"), charges=frame.get("charges"))
        assert float(again["energy"]) == pytest.approx(float(together.energy[number]), abs=1e-9)
        alone = relax(model, [frame], fmax=1.0, max_steps=60)
        assert int(alone.steps[0]) == int(together.steps[number])
        torch.testing.assert_close(alone.frames[0].pos, together.frames[number].pos, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("cell", [False, True])
def test_mixed_periodicity(frames, generator, batch_size, cell):
    """Open and periodic structures in one call end as alone, in their order."""
    model, periodic = potential(NestedShells((3.0,))), crystal(generator)
    mixed = [frames[0], periodic, frames[1], crystal(generator, 5.5), frames[2]]
    together = relax(model, mixed, max_steps=4, batch_size=batch_size, cell=cell)
    for number, frame in enumerate(mixed):
        alone = relax(model, [frame], max_steps=4, cell=cell)
        assert len(frame.z) == len(together.frames[number].z)
        torch.testing.assert_close(together.frames[number].pos, alone.frames[0].pos, rtol=0, atol=1e-9)
        assert float(together.energy[number]) == pytest.approx(float(alone.energy[0]), abs=1e-9)
        assert float((frame.pos - alone.frames[0].pos).abs().max()) > 1e-3
    del periodic.cell
    with pytest.raises(ValueError, match="must have a cell where pbc is set, got frame 0 without"):
        relax(model, [periodic])


def test_a_cell_without_pbc_is_periodic_and_an_open_one_may_have_a_cell(frames, generator):
    model = potential(NestedShells((3.0,)))
    periodic, bare = crystal(generator), crystal(generator)
    del bare.pbc
    for pair in ([periodic, bare], [bare, periodic]):
        found = relax(model, pair, max_steps=2)
        for number, frame in enumerate(pair):
            assert float(found.start_energy[number]) == pytest.approx(float(model(frame)["energy"]), abs=1e-9)
    boxed = copy.copy(frames[0])
    boxed.cell, boxed.pbc = 9.0 * torch.eye(3).double()[None], torch.zeros(1, 3, dtype=torch.bool)
    found = relax(model, [frames[1], boxed], max_steps=2)
    assert float(found.start_energy[1]) == pytest.approx(float(model(frames[0])["energy"]), abs=1e-9)
    assert found.frames[1].cell.equal(boxed.cell)


def held(frames: list[AtomicData]) -> list:
    """As Atoms: one with atoms held, one with coordinates held, one free; all with things of their own."""
    out = [frame.to_ase() for frame in frames]
    out[0].set_constraint([FixAtoms([0, 4]), FixCartesian([2], mask=(False, True, True))])
    out[1].set_constraint(FixCartesian([0, 1], mask=(True, False, False)))
    for number, atoms in enumerate(out):
        atoms.set_tags(np.arange(len(atoms)) + number)
        atoms.info["name"] = f"structure {number}"
        atoms.new_array("weights", np.linspace(0.5, 1.5, len(atoms)) + number)
    return out


def test_constraints_are_those_of_ase(frames):
    """Beside ASE's optimizer, step for step, in one batch with a free structure."""
    model = potential(NestedShells((4.0,)))
    near = relax(model, held(frames), fmax=0.02, max_steps=300)
    assert bool(near.converged.all())
    rng = np.random.default_rng(1)
    atoms = []
    for frame in near.frames:
        frame.positions += 0.01 * rng.normal(size=(len(frame), 3))  # also what is held: from here on
        atoms.append(frame)
    found = relax(model, atoms, fmax=1e-9, max_steps=12)
    for number, start in enumerate(atoms):
        alone = start.copy()
        alone.calc = NBodyCalculator(model)
        LBFGS(alone, logfile=None, memory=30).run(fmax=1e-9, steps=12)
        assert np.abs(alone.positions - found.frames[number].positions).max() < 1e-7
        assert float(found.energy[number]) == pytest.approx(alone.get_potential_energy(), abs=1e-8)
        assert float(found.largest[number]) == pytest.approx(np.linalg.norm(alone.get_forces(), axis=1).max(), abs=1e-6)
        moved = np.abs(found.frames[number].positions - start.positions)
        if number == 0:
            assert moved[[0, 4]].max() == 0.0 and moved[2, 1:].max() == 0.0 and moved[2, 0] > 1e-6
        if number == 1:
            assert moved[:2, 0].max() == 0.0 and moved[:2, 1:].min() > 1e-6
    assert float((found.start_energy - found.energy).min()) > 1e-4


def test_what_is_said_of_a_structure_is_kept(frames):
    model = potential(NestedShells((4.0,)))
    atoms = held(frames)
    found = relax(model, atoms, fmax=0.5, max_steps=3)
    for before, after in zip(atoms, found.frames, strict=True):
        assert after is not before and repr(after.constraints) == repr(before.constraints)
        assert np.array_equal(after.get_tags(), before.get_tags()) and after.info == before.info
        assert np.array_equal(after.arrays["weights"], before.arrays["weights"])
        assert np.abs(after.positions - before.positions).max() > 1e-3
        raw = after.get_forces(apply_constraint=False)
        expected = model(AtomicData.from_ase(after))["forces"].numpy()
        assert np.abs(raw - expected).max() < 1e-8 and np.abs(expected).max() > 1e-3
    data = AtomicData.from_ase(atoms[0])
    data.smiles, data.stress, data.energy = "CCO", torch.ones(1, 3, 3), torch.ones(1)
    data.fixed = torch.arange(len(data.pos)) < 2
    data = model.model.scheme(data)
    (after,) = relax(model, [data], max_steps=2).frames
    assert set(after.keys()) == {"z", "pos", "smiles", "fixed", "energy", "forces"}, "labels and hierarchy are stale"
    assert float((after.pos - data.pos)[:2].abs().max()) == 0.0 and float((after.pos - data.pos)[2:].abs().min()) > 0


def test_convergence_is_judged_on_what_may_move(frames):
    model = potential(NestedShells((4.0,)))
    atoms = frames[0].to_ase()
    atoms.set_constraint(FixAtoms(range(1, len(atoms))))
    found = relax(model, [atoms], fmax=0.01, max_steps=100)
    assert bool(found.converged) and float(found.largest) <= 0.01
    assert np.abs(found.frames[0].get_forces(apply_constraint=False)).max() > 0.1, "those that are held feel some"


def test_constraints_that_are_not_known_are_refused_by_name(frames):
    atoms = [frame.to_ase() for frame in frames]
    atoms[1].set_constraint([FixAtoms([0]), FixBondLengths([(0, 1)])])
    with pytest.raises(ValueError, match=r"must be FixAtoms or FixCartesian, got FixBondLengths \(frame 1\)"):
        relax(potential(NestedShells((4.0,))), atoms)
    atoms[1].set_constraint()
    atoms[1].info["constraints_left_out"] = "FixBondLengths"
    with pytest.raises(ValueError, match=r"structure 1 was written without its constraints \(FixBondLengths\)"):
        relax(potential(NestedShells((4.0,))), atoms)


class _Broken(torch.nn.Module):
    """A pit of harmonic wells, and not a number for molecules of nine atoms once they have moved."""

    def __init__(self, start: torch.Tensor):
        super().__init__()
        self.start = start

    def forward(self, z, pos, batch):
        size = torch.bincount(batch)
        moved = (pos[: len(self.start)] - self.start[: len(pos)]).abs().max() > 1e-6
        factor = torch.where((size == len(self.start)) & moved, torch.nan, 1.0).to(pos.dtype)[batch]
        return pos.new_zeros(len(size)).index_add(0, batch, (factor[:, None] * pos - 1.0).square().sum(dim=1))


def test_forces_that_are_not_finite_are_told_of_their_structure_alone(frames, tmp_path, capsys):
    found = relax(Potential(_Broken(frames[0].pos)), frames[:2], fmax=0.01, max_steps=100)
    assert found.converged.tolist() == [False, True] and found.steps.tolist()[0] == 1
    assert bool(torch.isnan(found.largest[0])) and float(found.largest[1]) <= 0.01
    assert bool(torch.isfinite(found.frames[0].pos).all()), "where it was before"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos": torch.full((9, 3), torch.nan)}, "positions must be finite, got frame 0"),
        (
            {"fixed": torch.zeros(9)},
            r"fixed of frame 0 must be bool of shape \[9\] or \[9, 3\], got torch.float32 \[9\]",
        ),
        ({"fixed": torch.zeros(4, dtype=torch.bool)}, r"fixed of frame 0 must be bool .* got torch.bool \[4\]"),
    ],
)
def test_frames_that_are_wrong_are_named(frames, change, message):
    frame = copy.copy(frames[0])
    for key, value in change.items():
        frame[key] = value
    with pytest.raises(ValueError, match=message):
        relax(potential(NestedShells((4.0,))), [frame])


def test_stop_keeps_what_has_been_reached(frames):
    asked = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 3

    found = relax(potential(NestedShells((4.0,))), frames, fmax=1e-9, batch_size=2, stop=stop)
    assert found.steps.tolist() == [3, 3] and len(found.frames) == 2 and not bool(found.converged.any())
    for before, after in zip(frames, found.frames, strict=False):
        assert float((after.pos - before.pos).abs().max()) > 1e-2


class _Elsewhere(TorchFunctionMode):
    """A stand-in for a GPU: tensors for which relax.py names no device lie elsewhere than the frames."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.zeros, torch.arange) and sys._getframe(1).f_globals["__name__"] == "nbody_pyg.deploy.relax":
            kwargs = {"device": "meta", **kwargs}
        return func(*args, **kwargs)


def test_results_lie_where_the_frames_do(frames):
    model = potential(NestedShells((4.0,)))
    expected = relax(model, frames, fmax=0.3, max_steps=5)
    with _Elsewhere():
        found = relax(model, frames, fmax=0.3, max_steps=5)
    for name in ("energy", "start_energy", "largest", "steps", "converged"):
        got = getattr(found, name)
        assert got.device.type == "cpu", name
        torch.testing.assert_close(got, getattr(expected, name), rtol=0, atol=1e-9)
    assert float(found.energy.abs().min()) > 1e-3


def test_errors(frames):
    model = potential(NestedShells((4.0,)))
    with pytest.raises(ValueError, match="frames holds no structure"):
        relax(model, [])
    with pytest.raises(ValueError, match="fmax must be positive, got 0"):
        relax(model, frames, fmax=0)


def test_command(frames, tmp_path, capsys):
    save_model(potential(NestedShells((4.0,))), tmp_path / "m.nbody")
    for frame in frames:
        frame.to_ase().write(tmp_path / "in.xyz", append=True)
    out = tmp_path / "out.xyz"
    words = ["relax", str(tmp_path / "m.nbody"), str(tmp_path / "in.xyz"), "--fmax", "0.3", "--out", str(out)]
    assert main(words) == 0
    assert "3 of 3 converged" in capsys.readouterr().out
    relaxed = read(out, index=":")
    assert len(relaxed) == 3 and np.abs(relaxed[0].get_forces()).max() <= 0.3
    before = out.read_bytes()
    assert main(words) == 1 and "out.xyz exists; replace it with --overwrite" in capsys.readouterr().err
    assert main([*words[:-1], words[2], "--overwrite"]) == 1, "its own input"
    assert "--out must not be an input of this command" in capsys.readouterr().err
    assert out.read_bytes() == before and len(read(words[2], ":")) == 3
    assert main([*words, "--overwrite", "--steps", "1"]) == 3
    assert "not converged: 0, 1, 2" in capsys.readouterr().out


def test_command_relaxes_cells(tmp_path, capsys):
    torch.manual_seed(0)
    model = Potential(factories.net(NestedShells((4.0,)), species=[14], seed=2), {14: -3.0}, 0.3)
    save_model(model, tmp_path / "m.nbody")
    atoms = bulk("Si", cubic=True)
    write(tmp_path / "s.xyz", [atoms, Atoms("Si2", [[0, 0, 0], [2.2, 0.1, 0]])])
    words = ["relax", str(tmp_path / "m.nbody"), str(tmp_path / "s.xyz"), "--steps", "3", "--cell", "--pressure", "2.0"]
    assert main([*words, "--out", str(tmp_path / "full.xyz")]) in (0, 3)
    assert "volume A^3" in capsys.readouterr().out
    solid, molecule = read(tmp_path / "full.xyz", ":")
    assert np.abs(solid.cell.array - atoms.cell.array).max() > 1e-4 and np.abs(solid.get_stress()).max() > 1e-6
    assert not molecule.pbc.any() and "stress" not in molecule.calc.results
    assert main([*words[:5], "--cell", "isotropic", "--out", str(tmp_path / "iso.xyz")]) in (0, 3)
    after = read(tmp_path / "iso.xyz", 0).cell.array
    np.testing.assert_allclose(after, after[0, 0] * np.eye(3), rtol=0, atol=1e-8)
    assert main([*words[:5], "--pressure", "1", "--out", str(tmp_path / "p.xyz")]) == 1
    assert "pressure must be 0 where cells are fixed" in capsys.readouterr().err


def test_command_keeps_constraints_tags_and_info(frames, tmp_path):
    save_model(potential(NestedShells((4.0,))), tmp_path / "m.nbody")
    atoms = held(frames)
    write(tmp_path / "in.xyz", atoms)
    words = ["relax", str(tmp_path / "m.nbody"), str(tmp_path / "in.xyz"), "--steps", "4", "--fmax", "1e-9"]
    assert main([*words, "--out", str(tmp_path / "new/out.xyz")]) == 3
    for before, after in zip(atoms, read(tmp_path / "new/out.xyz", ":"), strict=True):
        assert np.array_equal(after.get_tags(), before.get_tags()) and after.info["name"] == before.info["name"]
        assert np.allclose(after.arrays["weights"], before.arrays["weights"], atol=1e-8)
        assert (not before.constraints and not after.constraints) or _held(after, 0).equal(_held(before, 0))
    assert np.abs(read(tmp_path / "new/out.xyz", 0).positions - atoms[0].positions)[[0, 4]].max() < 1e-7


def test_command_keeps_charges(frames, tmp_path):
    model, charged = charged_potential(), with_charges(frames)
    save_model(model, tmp_path / "m.nbody")
    atoms = [frame.to_ase() for frame in charged]
    atoms[0].info["charge"] = 1
    atoms[1].set_initial_charges(charged[1].charges.numpy())
    atoms[2].info["charge"] = 0
    write(tmp_path / "in.xyz", atoms)
    given = read_structures(str(tmp_path / "in.xyz"))
    keys = [sorted({"charge", "charges"} & set(frame.keys())) for frame in given]
    assert keys == [["charge"], ["charges"], ["charge"]]
    words = ["relax", str(tmp_path / "m.nbody"), str(tmp_path / "in.xyz"), "--steps", "3", "--fmax", "1e-9"]
    assert main([*words, "--dtype", "float64", "--out", str(tmp_path / "out.xyz")]) == 3  # none has converged
    out = str(tmp_path / "out.xyz")
    for structure, after in zip(read(out, index=":"), read_structures(out), strict=True):
        energy = structure.get_potential_energy()
        assert float(model(after)["energy"]) == pytest.approx(energy, abs=1e-5)
        structure.calc = NBodyCalculator(model)  # the same charges as dynamics would have
        assert structure.get_potential_energy() == pytest.approx(energy, abs=1e-5)
        neutral = float(model(after.z, after.pos)["energy"])
        charged = after.get("charges") is not None or bool(after.charge.any())
        assert abs(energy - neutral) > 1e-3 or not charged
