"""check_potential and `nbody check`: a sound potential passes, and each planted fault is found and named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from ase.build import molecule
from torch import nn

from nbody_pyg import BondTree, NBodyNet, NestedShells, Potential
from nbody_pyg.cli import main
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import reference_record, reference_topology, save_model
from nbody_pyg.geometry import neighbour_list, safe_norm
from nbody_pyg.hierarchy import share_topology
from nbody_pyg.nn.repulsion import ZBLRepulsion
from nbody_pyg.system import System
from nbody_pyg.testing import check_potential
from nbody_pyg.testing.check import _Examiner
from nbody_pyg.testing.systems import join, reordered

SYMMETRIC = ["symmetry", "derivatives", "smoothness"]
REACH = {"H-H": 1.5, "C-H": 1.3, "H-O": 1.3, "C-C": 1.7, "C-O": 1.7}


class _Wrapped(nn.Module):
    """The energy of a sound network and a fault."""

    def __init__(self, net: NBodyNet) -> None:
        super().__init__()
        self.net, self.species = net, net.species


class HardCutoff(_Wrapped):
    """Each pair nearer than 3 angstrom has an energy: a step."""

    def forward(self, z, pos, batch):
        index, _ = neighbour_list(pos, 3.0, batch)
        vec = pos[index[0]] - pos[index[1]]
        pairs = 1e-3 * torch.exp(-safe_norm(vec))
        return self.net(z, pos, batch).index_add(0, batch[index[1]], pairs)


class Upright(_Wrapped):
    """Bonds that lie along z cost energy."""

    def forward(self, z, pos, batch):
        energy = self.net(z, pos, batch)
        mean = pos.new_zeros(len(energy), 3).index_add(0, batch, pos) / torch.bincount(batch)[:, None]
        height = (pos - mean[batch])[:, 2]
        return energy.index_add(0, batch, 1e-3 * height.square())


class Swirl(Potential):
    """Forces with a part that is no gradient: it turns around the centre."""

    def forward(self, *arguments, **keywords):
        out = super().forward(*arguments, **keywords)
        if "forces" in out:
            pos, batch = (arguments[1], arguments[2]) if len(arguments) > 2 else (arguments[0].pos, arguments[0].batch)
            pos = pos.to(out["forces"].dtype)
            count = torch.bincount(batch)[:, None].to(pos.dtype)
            mean = pos.new_zeros(len(count), 3).index_add(0, batch, pos) / count
            axis = out["forces"].new_zeros(len(count), 3).index_add(0, batch, (pos - mean[batch]) ** 3)
            out["forces"] = out["forces"] + 1e-3 * torch.linalg.cross(axis[batch], pos - mean[batch])
        return out


@pytest.fixture(scope="module")
def net() -> NBodyNet:
    torch.manual_seed(5)
    return NBodyNet([1, 6, 8], NestedShells((4.0,)), channels=4, lmax=1)


@pytest.fixture
def frames(molecules) -> list[System]:
    return [System.from_tensors(*molecules["ethanol"]), System.from_tensors(*molecules["methanol"])]


def repulsion() -> ZBLRepulsion:
    return ZBLRepulsion([1, 6, 8], REACH)


def test_a_sound_potential_passes(net, frames):
    seen = []
    report = check_potential(
        Potential(net, repulsion=repulsion()), frames, nve_steps=40, timestep=0.05, report=seen.append
    )
    assert report.passed, report.failures
    assert list(report.checks) == seen and len(seen) > 20
    assert report["smoothness"].figure > 2.5  # a window with two continuous derivatives
    assert 0 < report["rotations"].figure < 1e-10
    assert report["isolated atoms"].passed is None and "fitted" in report["isolated atoms"].note
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_step_at_a_cutoff_is_named(net, frames):
    report = check_potential(Potential(HardCutoff(net), repulsion=repulsion()), frames, only=SYMMETRIC)
    assert "smoothness" in {c.name for c in report.failures}
    assert report["smoothness"].figure < 0.5  # a step
    assert "a cutoff without a window" in report["smoothness"].note
    assert report["rotations"].passed and report["symmetric Jacobian"].passed


@pytest.mark.slow
def test_energy_that_depends_on_z_is_named(net, frames):
    report = check_potential(Potential(Upright(net), repulsion=repulsion()), frames, only=SYMMETRIC)
    # It tells mirror images in an oblique plane apart as well, and far copies are stretched along z.
    assert {"rotations", "reflections"} <= {c.name for c in report.failures}
    assert "how the system lies in space" in report["rotations"].note
    assert report["forces = -dE/dr"].passed and report["permutation"].passed and report["smoothness"].passed


@pytest.mark.slow
def test_forces_that_are_no_gradient_are_named(net, frames):
    report = check_potential(Swirl(net, repulsion=repulsion()), frames, only=SYMMETRIC)
    assert {"forces = -dE/dr", "symmetric Jacobian"} <= {c.name for c in report.failures}
    assert "not conservative" in report["symmetric Jacobian"].note
    assert report["smoothness"].passed and report["permutation"].passed


def test_a_hole_at_short_range_is_named(net, frames):
    report = check_potential(Potential(net, scale=30.0, repulsion=None), frames, only=["short_range"])
    walls = [check for check in report.failures if check.name.startswith("short range")]
    assert walls and all("attract each other inside the bond length" in check.note for check in walls)


def test_known_energies_of_atoms_are_compared(net, frames):
    metadata = {"config": {"data": {"e0": "isolated"}}}
    report = check_potential(Potential(net, repulsion=repulsion()), frames, only=["additivity"], metadata=metadata)
    assert report["isolated atoms"].passed is False and report["isolated atoms"].figure > 1e-3


@pytest.mark.slow
def test_fixed_parts_are_kept_along_paths(molecules):
    tree = NBodyNet([1, 6, 8], BondTree(cutoff=4.0), channels=4, lmax=1)
    frames = [System.from_tensors(*molecules["methanol"])]
    report = check_potential(Potential(tree, repulsion=repulsion()), frames, only=["smoothness"])
    assert report["smoothness"].passed


@pytest.mark.slow
def test_periodic_structures(net):
    generator = torch.Generator().manual_seed(2)
    cell = torch.eye(3, dtype=torch.float64)[None] * 6.0
    pos = torch.cartesian_prod(*[torch.arange(2.0)] * 3).double() * 3.0
    pos = pos + 0.2 * torch.randn(pos.shape, generator=generator, dtype=torch.float64)
    system = System.from_tensors(torch.tensor([1, 6, 8, 1, 8, 6, 1, 1]), pos, cell=cell, pbc=True)
    report = check_potential(Potential(net, repulsion=repulsion()), [system], nve_steps=20, timestep=0.05)
    assert report["stress = dE/d(strain)/V"].passed and report["extensivity"].passed
    assert report["NVE drift"].passed and report["smoothness"].passed


def test_command(net, molecules, tmp_path, capsys):
    z, pos = molecules["ethanol"]
    AtomicData(z=z, pos=pos).to_ase().write(tmp_path / "a.xyz")
    potential = Potential(net, {1: 0.0, 6: 0.0, 8: 0.0}, repulsion=repulsion())
    sample = {"z": z.tolist(), "pos": pos.tolist()}
    save_model(potential, tmp_path / "good.nbody", {"sample": sample})
    json_file = tmp_path / "check.json"
    words = ["check", str(tmp_path / "good.nbody"), "--only", "symmetry", "--json", str(json_file)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "PASS:" in out and "the training frame stored in the model file" in out
    assert json.loads(json_file.read_text())["checks"][0]["name"] == "rotations"
    save_model(Potential(net, scale=30.0, repulsion=None), tmp_path / "bad.nbody")
    assert (
        main(["check", str(tmp_path / "bad.nbody"), "--only", "short_range", "--frames", str(tmp_path / "a.xyz")]) == 3
    )
    out = capsys.readouterr().out
    assert "FAIL" in out and "attract each other" in out
    assert main(["check", str(tmp_path / "bad.nbody"), "--only", "taste"]) == 1
    assert "only must name sections among symmetry" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "bad.nbody"), "--frames", "nothing.xyz"]) == 1
    assert "no structures at nothing.xyz" in capsys.readouterr().err


def test_a_run_that_blows_up_fails_the_check():
    """It ends before there is a drift to judge."""

    class Cliff(torch.nn.Module):
        species = (1, 6, 8)

        def forward(self, z, pos, batch):
            return (1e6 * pos.sin().sum()).reshape(1)

    found = check_potential(Potential(Cliff()), nve_steps=20, only=["dynamics"])
    (line,) = found.checks
    assert line.name == "NVE drift" and line.passed is False and "stopped after step" in line.note


def test_a_structure_that_is_the_reference_molecule_has_its_bonds():
    """Alone, reordered, in a batch, and beside another molecule, as an MD run of the same model file has them."""
    torch.manual_seed(0)
    potential = Potential(NBodyNet([1, 6, 8], BondTree(4.0), channels=4, lmax=1)).double()
    hot, methane = molecule("CH3CH2OH"), molecule("CH4")
    metadata = {"reference": reference_record(AtomicData.from_ase(hot))}
    hot.set_distance(2, 3, 1.5, fix=0)
    frames = [AtomicData.from_ase(atoms) for atoms in (hot, methane)]
    examiner = _Examiner(potential, frames, metadata, (0, 0.5, 300.0), 0)
    own, other = examiner.systems
    wanted = float(potential(with_bonds(frames[0], metadata, potential))["energy"])
    found = float(potential(frames[0])["energy"])
    assert abs(wanted - found) > 1e-3 and "bonds" not in other.given
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    single, apart = examiner.subject([other])[0], replace(other, pos=other.pos + 50.0)
    for systems, expected in (
        ([own], wanted),
        ([reordered(own, order)], wanted),
        ([join(own, apart)], wanted + float(single)),
        ([join(apart, own)], wanted + float(single)),
    ):
        assert float(examiner.subject(systems)[0]) == pytest.approx(expected, abs=1e-9)
    assert examiner.subject([other, own])[0].tolist() == pytest.approx([float(single), wanted], abs=1e-9)
    bare = _Examiner(potential, frames, {}, (0, 0.5, 300.0), 0)
    assert "bonds" not in bare.systems[0].given
    assert float(bare.subject(bare.systems[:1])[0]) == pytest.approx(found, abs=1e-9)


def with_bonds(frame: AtomicData, metadata: dict, potential: Potential) -> AtomicData:
    scheme = potential.model.scheme
    return share_topology([frame], scheme, reference_topology(metadata, scheme, frame.z.tolist()))[0]
