"""Energy by subsystem: parts sum to the whole, for every scheme."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import factories
from nbody_pyg import BondTree, NestedShells, Potential, ShellsAndPieces
from nbody_pyg.cli import main
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import explain_energy, plot_energy_parts, save_model
from nbody_pyg.nn.repulsion import ZBLRepulsion

pytestmark = pytest.mark.layout

SCHEMES = {
    "shells": NestedShells((4.0, 3.0)),
    "tree": BondTree(cutoff=4.0),
    "pieces": ShellsAndPieces((4.0, 3.0), 6.0),
    "bare tree": BondTree(cutoff=4.0, group_cutoff=None, piece_cutoff=None),
}


def potential(scheme) -> Potential:
    # A reach beyond the bonds, so that the repulsion is part of the sum.
    repulsion = ZBLRepulsion([1, 6, 8], {"C-H": 1.3, "C-C": 1.7})
    return factories.potential(scheme, {1: -13.6, 6: -1030.5, 8: -2041.8}, 1.7, repulsion, seed=1)


def test_the_energy_of_a_neighbourhood_is_that_of_its_centre(ethanol):
    found = explain_energy(potential(SCHEMES["pieces"]), ethanol)
    shells = dataclasses.replace(found, own={k: found.own[k] for k in (1, 2)})
    assert torch.allclose(shells.on_atoms(), found.own[1] + found.own[2] + found.repulsion, rtol=0, atol=1e-12)
    assert found.own[1].std() > 1e-3 and found.own[3].abs().max() > 1e-3


@pytest.mark.parametrize("name", SCHEMES)
def test_parts_sum_to_the_whole(name, ethanol):
    model = potential(SCHEMES[name])
    found = explain_energy(model, ethanol)
    whole = model(ethanol)
    assert found.total == pytest.approx(float(whole["energy"]), abs=1e-10)
    assert sum(found.by_level.values()) == pytest.approx(float(whole["energy"]), abs=1e-10)
    assert float(found.on_atoms().sum()) == pytest.approx(float(whole["interaction_energy"]), abs=1e-10)
    assert float(found.repulsion.sum()) > 0.01
    # Untrained shells have nothing on the atoms but a shift, which starts at zero.
    signal = {k: float(values.abs().max()) for k, values in found.own.items()}
    assert all(size > 1e-6 for k, size in signal.items() if k or name not in ("shells", "pieces")), signal


def test_energies_within_parts_nest(ethanol):
    model = potential(SCHEMES["tree"])
    found = explain_energy(model, ethanol)
    top = found.topology.num_levels - 1
    assert float(found.within(top)[0]) == pytest.approx(float(model(ethanol)["interaction_energy"]), abs=1e-10)
    # A group holds its own energy and that of its atoms.
    child, parent = found.topology.child_index[1]
    atoms = found.own[0] + found.repulsion
    for part in range(found.topology.size(1)):
        expected = float(atoms[child[parent == part]].sum() + found.own[1][part])
        assert float(found.within(1)[part]) == pytest.approx(expected, abs=1e-12)


def test_two_structures_of_one_molecule(ethanol):
    model = potential(SCHEMES["tree"])
    other = AtomicData(z=ethanol.z, pos=ethanol.pos * 1.02)
    tree = model.model.scheme.topology(ethanol.z, ethanol.pos)
    difference = explain_energy(model, other, model.model.scheme.update(tree, other.z, other.pos)).minus(
        explain_energy(model, ethanol, tree)
    )
    assert difference.total == pytest.approx(float(model(other)["energy"] - model(ethanol)["energy"]), abs=1e-9)
    assert float(difference.reference.abs().max()) == 0.0
    with pytest.raises(ValueError, match="other must have the same atoms and parts"):
        difference.minus(explain_energy(model, AtomicData(z=ethanol.z[:5], pos=ethanol.pos[:5])))


def test_periodic(generator):
    model = potential(SCHEMES["shells"])
    pos = torch.cartesian_prod(*[torch.arange(2.0)] * 3).double() * 2.6
    pos = pos + 0.1 * torch.randn(pos.shape, generator=generator).double()
    frame = AtomicData(z=torch.tensor([1, 6, 8, 1, 1, 6, 8, 1]), pos=pos)
    frame.cell, frame.pbc = 5.2 * torch.eye(3, dtype=torch.float64)[None], torch.ones(1, 3, dtype=torch.bool)
    assert explain_energy(model, frame).total == pytest.approx(float(model(frame)["energy"]), abs=1e-10)


def test_errors(ethanol):
    found = explain_energy(potential(SCHEMES["shells"]), ethanol)
    with pytest.raises(ValueError, match=r"has parts that overlap.*use on_atoms\(\)"):
        found.within(1)
    with pytest.raises(ValueError, match=r"level must lie in 0\.\.3, got 7"):
        found.within(7)

    class Foreign(torch.nn.Module):
        def forward(self, z, pos, batch):
            return pos.square().sum().reshape(1)

    with pytest.raises(ValueError, match="Foreign gives one energy per system and nothing below it"):
        Potential(Foreign()).energies(ethanol)


@pytest.mark.parametrize("name", ["shells", "tree"])
def test_picture(name, ethanol, tmp_path):
    figure = plot_energy_parts(explain_energy(potential(SCHEMES[name]), ethanol))
    figure.savefig(tmp_path / "a.png", dpi=50)
    words = [text.get_text() for text in figure.axes[1].texts] + [t.get_text() for t in figure.axes[2].texts]
    assert any(word.endswith("eV") for word in words)


def test_command(ethanol, tmp_path, capsys):
    save_model(potential(SCHEMES["tree"]), tmp_path / "m.nbody")
    for factor in (1.0, 1.01):
        AtomicData(z=ethanol.z, pos=factor * ethanol.pos).to_ase().write(tmp_path / "a.xyz", append=True)
    words = ["energies", str(tmp_path / "m.nbody"), str(tmp_path / "a.xyz"), "--level", "groups"]
    assert main([*words, "--plot", str(tmp_path / "a.png"), "--minus", "1"]) == 0
    out = capsys.readouterr().out
    assert "frame 0 of" in out and "minus frame 1" in out and "within each of groups" in out and "CH3" in out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert main([*words, "--index", "9"]) == 1
    assert "index must lie in 0..1" in capsys.readouterr().err
    AtomicData(z=ethanol.z[1:], pos=ethanol.pos[1:]).to_ase().write(tmp_path / "a.xyz", append=True)
    assert main([*words, "--minus", "2"]) == 1
    assert "--minus must name a frame with the atoms of frame 0, in its order" in capsys.readouterr().err
