"""Inner cutoffs: constant features at short range, in every scheme and in every way to evaluate."""

from __future__ import annotations

import pytest
import torch

import factories
from nbody_pyg import BondTree, NBodyNet, NestedShells, Potential, ShellsAndPieces, SmoothSurvivors
from nbody_pyg.data import AtomicData
from nbody_pyg.deploy import load_model, save_model
from nbody_pyg.kernels import use_backend
from nbody_pyg.nn.inner_cutoff import FLAT_FROM, INNER_FACTOR, InnerCutoff, inner_cutoffs
from nbody_pyg.nn.repulsion import SEEN_FACTOR, ZBLRepulsion
from nbody_pyg.system import System
from nbody_pyg.testing import assert_conservative, assert_equivariant, assert_extensive, assert_smooth
from nbody_pyg.testing.short_range import push_dimers
from nbody_pyg.testing.subject import Subject
from nbody_pyg.training.finetune import tuned_model

#: So long that bonds of a molecule lie below them, some on the slope and some on the flat part.
LENGTHS = {"H-C": 1.25, "C-O": 1.7, "C-C": 1.6, "H-O": 1.3, "H-H": 2.1}
SCHEMES = {
    "shells": lambda: NestedShells((3.0, 4.0)),
    "equal shells": lambda: NestedShells((3.5, 3.5)),
    "bonds": BondTree,
    "pieces": lambda: ShellsAndPieces((3.0, 4.0), 6.0),
    "survivors": SmoothSurvivors,
}


def potential(scheme=None, **options) -> Potential:
    return factories.potential(scheme, seed=2, inner_cutoff=LENGTHS, **options)


def energy(model: Potential, z: torch.Tensor, pos: torch.Tensor) -> float:
    return model(z, pos)["energy"].item()


def lengths_of(r: torch.Tensor, limit: float = 1.25) -> torch.Tensor:
    """Limited lengths of pairs C-H."""
    inner = InnerCutoff([1, 6], {"C-H": limit})
    index = torch.tensor([[1], [0]]).expand(2, len(r))
    vec = r.unsqueeze(-1) * torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3.0
    return inner(index, vec, torch.tensor([0, 1])).norm(dim=-1)


def test_lengths():
    r = torch.linspace(0.1, 2.0, 400, dtype=torch.float64)
    s = lengths_of(r)
    above, flat = r >= 1.25, r <= FLAT_FROM * 1.25
    assert torch.equal(s[above], r[above]) or float((s - r)[above].abs().max()) < 1e-15
    assert torch.allclose(s[flat], torch.full_like(s[flat], 0.965 * 1.25), atol=1e-14)
    assert bool((torch.diff(s[~flat]) > 0).all())  # the length never falls with the distance


def test_two_continuous_derivatives():
    at = torch.tensor([1.25, FLAT_FROM * 1.25], dtype=torch.float64)
    for side in (-1e-9, 1e-9):
        r = (at + side).requires_grad_()
        first = torch.autograd.grad(lengths_of(r).sum(), r, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), r)[0]
        assert torch.allclose(first, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-6)
        assert torch.allclose(second, torch.zeros(2, dtype=torch.float64), atol=1e-6)


def test_an_atom_is_no_neighbour_of_itself():
    inner = InnerCutoff([1, 6], {})
    vec = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = inner(torch.tensor([[0, 0], [0, 1]]), vec, torch.tensor([0, 1]))
    assert torch.equal(found[0], vec[0]) and found[1].norm().item() > 0.4
    (slope,) = torch.autograd.grad(found.square().sum(), vec)
    assert bool(torch.isfinite(slope).all())


def test_vectors_above_are_the_same_tensor():
    vec = torch.tensor([[0.0, 0.0, 1.4]])
    assert InnerCutoff([1], {"H-H": 1.4})(torch.tensor([[0], [1]]), vec, torch.tensor([0, 0])) is vec


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme, molecules):
    model = potential(SCHEMES[scheme]())
    z, pos = molecules["ethanol"]
    plain = Potential(NBodyNet.from_config({**model.model.config(), "inner_cutoff": None}), None).double()
    plain.model.load_state_dict(model.model.state_dict())
    assert abs(energy(model, z, pos) - energy(plain, z, pos)) > 1e-6
    far = torch.tensor([6, 6, 8, 1]), 2.2 * torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).double()
    assert energy(model, *far) == pytest.approx(energy(plain, *far), abs=1e-12)
    systems = [System.from_tensors(z, pos)]
    assert_equivariant(model, systems=systems)
    assert_conservative(model, systems=systems, step=1e-4)  # third derivatives jump at the limits
    assert_extensive(model, systems=systems)


def test_smooth_where_pairs_reach_their_limits(molecules):
    model = potential(NestedShells((3.0, 4.0)), repulsion=None)
    path = (torch.tensor([6, 1]), *(torch.tensor([[0.0, 0.0, 0.0], [r, 0.3, 0.1]]).double() for r in (0.7, 1.6)))
    assert assert_smooth(model, paths=[path], continuity=2) > 2.5


def test_pairs_are_constant_inside():
    model = potential(NestedShells((3.0, 4.0)), repulsion=None)
    z = torch.tensor([6, 1])
    found = [energy(model, z, torch.tensor([[0.0, 0, 0], [0, 0, r]]).double()) for r in (0.3, 0.6, 0.99, 1.3)]
    assert found[0] == pytest.approx(found[1], abs=1e-12) == pytest.approx(found[2], abs=1e-12)
    assert abs(found[3] - found[0]) > 1e-8


@pytest.mark.parametrize("backend", ["auto"])
def test_backends(backend, molecules):
    model = potential(NestedShells((3.0, 4.0)))
    z, pos = molecules["ethanol"]
    data = AtomicData(z=z, pos=pos)
    with use_backend("torch"):
        wanted = model(data)
    with use_backend(backend):
        found = model(data)
    assert wanted["forces"].abs().max() > 1e-3
    for key in ("energy", "forces"):
        assert torch.allclose(found[key], wanted[key], rtol=0, atol=1e-10)


def test_model_files_keep_them(tmp_path):
    model = potential(NestedShells((3.0, 4.0)))
    save_model(model, tmp_path / "model.nbody")
    assert load_model(tmp_path / "model.nbody").model.config() == model.model.config()
    assert model.model.config()["inner_cutoff"]["H-O"] == 1.3


def test_from_a_repulsion():
    repulsion = ZBLRepulsion([1, 6], {"C-H": SEEN_FACTOR})
    found = inner_cutoffs(repulsion)
    assert set(found) == {"H-H", "H-C", "C-C"} and found["H-C"] == pytest.approx(INNER_FACTOR)


def test_fine_tuning_drops_and_adds_pairs(molecules):
    z, pos = molecules["ethanol"]
    frame = AtomicData(z=z, pos=pos, energy=torch.zeros(1).double(), forces=torch.zeros_like(pos))
    frame.z = torch.where(z == 8, 16, z)
    tuned, _ = tuned_model(potential(NestedShells((3.0, 4.0))), [frame])
    found = tuned.model.config()["inner_cutoff"]
    assert "H-O" not in found
    # The frame has C-H bonds shorter than the 1.25 angstrom of the model: a length below them takes its place
    shortest = torch.cdist(pos[z == 6], pos[z == 1]).min().item()
    assert found["H-C"] == pytest.approx(0.85 * INNER_FACTOR * shortest) and found["H-C"] < shortest < 1.25
    assert found["S-S"] == pytest.approx(ZBLRepulsion([16]).reach["S-S"])


def test_a_network_cannot_pull_atoms_through_the_repulsion():
    wild = factories.potential(NestedShells((3.5, 5.0)), scale=3e3, seed=3)
    config = {**wild.model.config(), "inner_cutoff": {name: 1.5 * r for name, r in wild.repulsion.reach.items()}}
    tame = Potential(NBodyNet.from_config(config), None, 3e3).double()
    tame.model.load_state_dict(wild.model.state_dict())
    assert max(push.hole for push in push_dimers(Subject(wild, torch.float64), wild.species)) > 1000
    assert all(push.weakest > 0 for push in push_dimers(Subject(tame, torch.float64), tame.species))


@pytest.mark.parametrize(
    ("given", "message"),
    [({"C-Qq": 1.0}, "one of the pairs"), ({"C-H": -1.0}, "positive finite"), ({"C": 1.0}, "one of the pairs")],
)
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        NBodyNet([1, 6, 8], inner_cutoff=given)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="mapping"):
        NBodyNet([1, 6, 8], inner_cutoff=1.0)
    with pytest.raises(ValueError, match="points"):
        NBodyNet(None, inner_cutoff={})


def test_a_system_far_from_its_limits_is_not_touched(molecules):
    z, pos = molecules["ethanol"]
    model = factories.potential(NestedShells((3.0, 4.0)), inner_cutoff={})
    system = System.from_tensors(z, pos)
    seen = []
    model.model.inner_cutoff.register_forward_hook(lambda module, given, found: seen.append(found is given[1]))
    model.evaluate(system)
    assert seen == [True, True]
