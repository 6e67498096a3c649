"""Relaxation of many structures at once, beside ASE's optimizer on one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.io import read
from ase.optimize import LBFGS

from nbody_pyg import BondTree, NBodyNet, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import NBodyCalculator, relax, save_model


def potential(scheme) -> Potential:
    torch.manual_seed(1)
    return Potential(NBodyNet([1, 6, 8], scheme, channels=4, lmax=1), scale=3.0).double()


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
        atoms.calc = NBodyCalculator(model)
        start = atoms.get_potential_energy()
        LBFGS(atoms, logfile=None, memory=30).run(fmax=1e-9, steps=steps)
        assert np.abs(atoms.positions - found.frames[number].pos.numpy()).max() < 1e-7
        assert float(found.energy[number]) == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
        assert float(found.start_energy[number]) == pytest.approx(start, abs=1e-8)
    assert float((found.start_energy - found.energy).abs().min()) > 1e-4
    assert not found.converged.any() and found.steps.tolist() == [steps] * len(frames)


def test_steps_are_those_of_ase(frames, generator):
    model = potential(NestedShells((4.0,)))
    # Near a minimum: elsewhere ASE keeps steps along which the energy curves downwards, and goes uphill.
    frames = relax(model, frames, fmax=0.02, max_steps=300).frames
    for frame in frames:
        frame.pos = frame.pos + 0.01 * torch.randn(frame.pos.shape, generator=generator).double()
    beside_ase(model, frames, 12)


def test_parts_of_a_tree_stay_those_of_the_start(frames):
    model = potential(BondTree(cutoff=4.0))
    beside_ase(model, frames, 1)
    found = relax(model, frames, fmax=1e-9, max_steps=15)
    scheme = model.model.scheme
    for number, (before, after) in enumerate(zip(frames, found.frames, strict=True)):
        tree = scheme.update(scheme.topology(before.z, before.pos), after.z, after.pos)
        energy = float(model(after.z, after.pos, topology=tree)["energy"])
        assert energy == pytest.approx(float(found.energy[number]), abs=1e-9)
    assert float((found.start_energy - found.energy).min()) > 0.1


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
    frames = []
    for size in (5.0, 5.5, 6.0):
        grid = torch.cartesian_prod(*[torch.arange(2.0)] * 3).double() * size / 2
        pos = grid + 0.1 * torch.randn(grid.shape, generator=generator).double()
        cell = size * torch.eye(3, dtype=torch.float64)[None]
        z = torch.tensor([1, 8, 6, 1, 1, 8, 6, 1])
        frames.append(AtomicData(z=z, pos=pos, cell=cell, pbc=torch.ones(1, 3, dtype=torch.bool)))
    found = relax(model, frames, fmax=0.05, max_steps=200, batch_size=2)
    assert bool(found.converged.all()) and len(found.frames) == 3
    for number, frame in enumerate(found.frames):
        again = model(frame.z, frame.pos, cell=frame.cell, pbc=frame.pbc)
        assert float(again["forces"].norm(dim=1).max()) <= 0.05 + 1e-9
        assert float(again["energy"]) == pytest.approx(float(found.energy[number]), abs=1e-9)


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
