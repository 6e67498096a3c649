"""Adapters of the peers: physics of each where it is installed, and what they do to the process."""

from __future__ import annotations

import dataclasses
import os
import random
import sys

import ase.data
import numpy as np
import pytest
import torch
from torch_geometric.data import Batch

from nbody_pyg import NestedShells
from nbody_pyg.compare import registry
from nbody_pyg.compare.graph import CutoffGraph
from nbody_pyg.compare.peer import Facts, MissingPeer, undisturbed
from nbody_pyg.compare.registry import MODELS, build_peer, entry, version
from nbody_pyg.data import AtomicData
from nbody_pyg.potential import Potential
from nbody_pyg.properties import Property, PropertyModel, Statistics
from nbody_pyg.training.loader import FrameLoader

#: Arguments with which every peer is small.
TINY = {
    "schnet": {"hidden_channels": 8, "num_filters": 8, "num_interactions": 2, "num_gaussians": 8},
    "dimenet": {
        "hidden_channels": 8, "num_blocks": 1, "int_emb_size": 4, "basis_emb_size": 4, "out_emb_channels": 8,
        "num_spherical": 3, "num_radial": 3, "output_initializer": "glorot_orthogonal",
    },
    "visnet": {"hidden_channels": 8, "num_heads": 2, "num_layers": 2, "num_rbf": 8},
    "visnet-l2": {"hidden_channels": 8, "num_heads": 2, "num_layers": 2, "num_rbf": 8},
    "painn": {"features": 8, "layers": 2, "num_basis": 8},
    "schnet-spk": {"features": 8, "layers": 2, "num_basis": 8},
    "tensornet": {"features": 8, "num_layers": 1, "num_rbf": 8},
    "nequip": {"num_features": [8, 4], "radial_mlp_width": 8},
    "nequip-l2": {"num_features": 4, "num_layers": 2, "radial_mlp_width": 8},
    "mace": {"irreps": "8x0e", "lmax": 2, "correlation": 2, "readout": 4},
    "mace-128": {"irreps": "4x0e+4x1o", "lmax": 2, "correlation": 2, "readout": 4},
}  # fmt: skip
PEERS = [name for name, found in MODELS.items() if found.build]
FACTS = Facts((1, 6, 7, 8, 9), 4.0, 6.0, torch.float64)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers' own making


@pytest.fixture(scope="module")
def built() -> dict[str, Potential]:
    return {}


def marked(name: str, *more: str):
    """sympy takes some ten seconds to write down the functions of DimeNet++."""
    return pytest.param(name, *more, marks=pytest.mark.slow) if name == "dimenet" else (name, *more) if more else name


@pytest.fixture(params=[marked(name) for name in PEERS])
def peer(request, built) -> Potential:
    name = request.param
    if name not in built:
        try:
            built[name] = Potential(build_peer(name, FACTS, seed=1, **TINY[name]), scale=2.0).eval()
        except MissingPeer as error:
            pytest.skip(str(error))
    return built[name]


def test_every_peer_has_a_tiny_form():
    assert sorted(TINY) == sorted(PEERS)


@pytest.mark.slow
def test_forces_are_derivatives_and_train(peer, molecules):
    z, pos = molecules["chiral"]
    found = peer(z, pos)
    assert found["forces"].abs().max() > 1e-4
    direction = torch.randn(pos.shape, dtype=pos.dtype, generator=torch.Generator().manual_seed(3))
    step = 1e-4
    energies = [peer(z, pos + s * step * direction, compute_forces=False)["energy"] for s in (1, -1)]
    slope = (energies[0] - energies[1]) / (2 * step)
    assert slope.item() == pytest.approx(-(found["forces"] * direction).sum().item(), rel=1e-5, abs=1e-7)
    result = peer(z, pos, create_graph=True)
    (result["forces"].square().sum() + result["interaction_energy"].sum()).backward()
    gradients = [p.grad for p in peer.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    peer.zero_grad(set_to_none=True)


def test_energy_does_not_know_the_frame_nor_the_order(peer, molecules, random_rotation):
    z, pos = molecules["chiral"]
    found = peer(z, pos)
    turn, order = random_rotation(1), torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    moved = peer(z[order], (pos @ turn.T + 3.0)[order])
    assert moved["energy"].item() == pytest.approx(found["energy"].item(), abs=1e-6)
    torch.testing.assert_close(moved["forces"], (found["forces"] @ turn.T)[order], rtol=0, atol=1e-6)
    mirrored = peer(z, -pos)
    assert mirrored["energy"].item() == pytest.approx(found["energy"].item(), abs=1e-6)


def test_batch_equals_singles(peer, molecules):
    frames = [AtomicData(z=z, pos=pos) for z, pos in (molecules[n] for n in ("methanol", "chiral", "ethanol"))]
    frames = [peer.model.scheme(frame) for frame in frames]
    together = peer(FrameLoader(frames, 3).batch([0, 1, 2]))
    alone = [peer(frame) for frame in frames]
    torch.testing.assert_close(together["energy"], torch.cat([r["energy"] for r in alone]), rtol=0, atol=1e-9)
    torch.testing.assert_close(together["forces"], torch.cat([r["forces"] for r in alone]), rtol=0, atol=1e-9)
    # Nothing is kept from call to call, and edges searched for are the edges stored.
    again = peer(frames[0].z, frames[0].pos)
    torch.testing.assert_close(again["forces"], alone[0]["forces"], rtol=0, atol=1e-12)


def test_cells(peer, generator):
    """Narrower than the cutoff, so that atoms see their own images."""
    cell = torch.diag(torch.tensor([3.1, 3.5, 4.2], dtype=torch.float64)) + 0.2 * torch.randn(
        3, 3, dtype=torch.float64, generator=generator
    )
    z = torch.tensor([1, 6, 8, 6])
    corners = torch.tensor([[0.0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], dtype=torch.float64)
    pos = (corners + 0.05 * torch.randn(4, 3, dtype=torch.float64, generator=generator)) @ cell
    pbc = torch.tensor([True] * 3)
    if not peer.model.periodic:
        with pytest.raises(ValueError, match="takes no periodic cells; leave this model out"):
            peer(z, pos, cell=cell, pbc=pbc)
        stored = peer.model.scheme(AtomicData(z=z, pos=pos, cell=cell[None], pbc=pbc[None]))
        with pytest.raises(ValueError, match="takes no periodic cells; leave this model out"):
            peer(stored)
        return
    two = Batch.from_data_list([AtomicData(z=z, pos=pos, cell=cell[None], pbc=pbc[None]) for _ in range(2)])
    given = two.z, two.pos, two.batch, two.cell, two.pbc
    assert peer.model.scheme.topology(*given).periodic.tolist() == [True, True]
    torch.testing.assert_close(*peer(two)["energy"], rtol=0, atol=1e-9)
    found = peer(z, pos, cell=cell, pbc=pbc, compute_stress=True)
    assert found["forces"].abs().max() > 1e-4 and found["stress"].abs().min() > 1e-8
    assert abs(found["energy"] - peer(z, pos)["energy"]).item() > 1e-3, "images count"
    both = torch.cat([pos, pos + cell[0]])
    twice = torch.cat([2 * cell[:1], cell[1:]])
    double = peer(torch.cat([z, z]), both, cell=twice, pbc=pbc, compute_stress=True)
    torch.testing.assert_close(double["energy"], 2 * found["energy"], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(double["forces"], torch.cat([found["forces"]] * 2), rtol=0, atol=1e-7)
    torch.testing.assert_close(double["stress"], found["stress"], rtol=0, atol=1e-7)
    strain = torch.tensor([[1.0, 0.3, 0], [0.3, -0.5, 0.2], [0, 0.2, 0.7]], dtype=torch.float64)

    def energy(size: float) -> float:
        turn = torch.eye(3, dtype=torch.float64) + size * strain
        return peer(z, pos @ turn, cell=cell @ turn, pbc=pbc, compute_forces=False)["energy"].item()

    slope = (energy(1e-4) - energy(-1e-4)) / 2e-4
    assert slope == pytest.approx(
        (found["stress"][0] * strain).sum().item() * cell.det().abs().item(), rel=1e-4, abs=1e-7
    )


def test_the_edges_are_those_that_are_handed_in(peer, molecules):
    z, pos = molecules["chiral"]
    topology = peer.model.scheme.topology(z, pos)
    full = peer(z, pos, topology=topology)["energy"]
    index = topology.pair_index[0]
    fewer = type(topology)(topology.num_parts, topology.child_index, (index[:, (index != 4).all(dim=0)], None))
    assert abs(peer(z, pos, topology=fewer)["energy"] - full) > 1e-6


#: The readouts that each peer has; the others have sums and means over the atoms.
PLACED = {"schnet": "centre", "dimenet": "sum", "painn": "centre", "schnet-spk": "centre"}
READOUTS = [
    marked(n, kind) for n in PEERS for kind in ("intensive", "dipole_norm", "r2") if kind == "intensive" or n in PLACED
]


def of_property(name: str, readout: str) -> PropertyModel:
    """A tiny peer that learns a property, with every part of its statistics."""
    try:
        peer = build_peer(name, dataclasses.replace(FACTS, readout=readout), seed=1, **TINY[name])
    except MissingPeer as error:
        pytest.skip(str(error))
    table = {z: 0.1 * z for z in FACTS.species}
    known = Statistics(0.5, 2.0, table, table if readout == "r2" else None)
    return PropertyModel(peer, [Property("p", readout)], {"p": known}).eval()


def _baseline(model: PropertyModel, frame: AtomicData) -> torch.Tensor:
    """Mean and values of the elements, which the statistics add to the output of the peer."""
    known = model.statistics["p"]
    model.statistics = {"p": dataclasses.replace(known, scale=0.0)}
    value = model(frame)["p"].detach()
    model.statistics = {"p": known}
    return value


@pytest.mark.parametrize(("name", "readout"), READOUTS)
def test_a_property_does_not_know_the_frame(name, readout, molecules, random_rotation):
    model = of_property(name, readout)
    z, pos = molecules["chiral"]
    frame = model.scheme(AtomicData(z=z, pos=pos))
    value = model(frame)["p"]
    assert value.shape == (1,) and value.dtype == torch.float64
    raw = (value - _baseline(model, frame)) / 2.0
    assert abs(raw.item()) > 1e-3
    order = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    for determinant in (1, -1):
        turn = random_rotation(determinant)
        moved = AtomicData(z=z[order], pos=(pos @ turn.T + 3.0)[order])
        # nequip and mace store tables in float32
        tolerance = 1e-6 if name.startswith(("nequip", "mace")) else 1e-10
        assert model(moved)["p"].item() == pytest.approx(value.item(), rel=0, abs=tolerance)


@pytest.mark.parametrize(("name", "readout"), READOUTS)
def test_a_property_of_a_batch_is_that_of_its_molecules_and_trains(name, readout, molecules):
    model = of_property(name, readout)
    frames = [AtomicData(z=z, pos=pos) for z, pos in (molecules[n] for n in ("methanol", "chiral", "ethanol"))]
    frames = [model.scheme(frame) for frame in frames]
    together = model(FrameLoader(frames, 3).batch([0, 1, 2]))["p"]
    alone = torch.cat([model(frame)["p"] for frame in frames])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    assert len({round(v, 6) for v in alone.tolist()}) == 3
    together.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients) and sum(float(g.abs().sum()) for g in gradients) > 0


@pytest.mark.parametrize("name", [marked(name) for name in PEERS])
def test_a_mean_is_the_sum_over_the_number_of_atoms(name, molecules):
    mean, total = (of_property(name, readout) for readout in ("intensive", "extensive"))
    frame = mean.scheme(AtomicData(z=molecules["chiral"][0], pos=molecules["chiral"][1]))
    base = _baseline(mean, frame)
    found, wanted = (float(model(frame)["p"] - base) for model in (mean, total))
    assert abs(found) > 1e-6
    assert len(frame.z) * found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", [marked(name) for name in sorted(PLACED)])
@pytest.mark.parametrize("readout", ["dipole_norm", "r2"])
def test_dipoles_and_extents_are_those_of_charges_about_the_centre_of_mass(name, readout, molecules):
    """The charges are taken from inside the models, and the equation is written out."""
    model = of_property(name, readout)
    z, pos = molecules["chiral"]
    frame = model.scheme(AtomicData(z=z, pos=pos))
    inside = model.model.model
    if PLACED[name] == "sum":  # the sum over atoms of the authors of DimeNet++
        energy = Potential(build_peer(name, FACTS, seed=1, **TINY[name]))(z, pos, compute_forces=False)["energy"]
        assert float((model(frame)["p"] - _baseline(model, frame)) / 2.0) == pytest.approx(energy.item(), rel=1e-9)
        return
    last = inside.lin2 if name == "schnet" else inside["readout"].outnet
    found: list = []
    last.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    value = (model(frame)["p"] - _baseline(model, frame)) / 2.0
    charges = last.forward(found[0])
    local = torch.zeros(1, 3)
    if isinstance(charges, tuple):
        charges, local = charges[0], charges[1].squeeze(-1)
        assert local.abs().max() > 1e-4
    if name != "schnet" and readout == "dipole_norm":
        charges = charges - charges.mean()  # neutral
    mass = torch.tensor(ase.data.atomic_masses)[z].unsqueeze(1)
    arm = pos - (mass * pos).sum(0) / mass.sum()
    if readout == "dipole_norm":
        wanted = (charges * arm + local).sum(0).norm()
    else:
        wanted = (charges * arm.square().sum(1, keepdim=True)).sum()
    assert abs(wanted.item()) > 1e-3
    assert value.item() == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.parametrize("name", [marked(name) for name in PEERS if name not in PLACED])
@pytest.mark.parametrize("readout", ["dipole_norm", "r2", "dipole"])
def test_a_readout_that_a_peer_does_not_have_is_refused(name, readout):
    of_property(name, "extensive")  # it is installed
    with pytest.raises(ValueError, match=f"with the readout extensive or intensive, got '{readout}'; leave this model"):
        of_property(name, readout)


def test_a_peer_of_one_readout_is_no_model_of_another():
    peer = build_peer("schnet", dataclasses.replace(FACTS, readout="r2"), **TINY["schnet"])
    for readout in ("dipole_norm", "extensive"):
        with pytest.raises(ValueError, match=rf"one property with readout 'r2' .*, got \['{readout}'\]"):
            PropertyModel(peer, [Property("p", readout)])
    with pytest.raises(ValueError, match="'dipole'; leave this model out"):
        build_peer("schnet", dataclasses.replace(FACTS, readout="dipole"), **TINY["schnet"])


def test_triplets_are_all_paths_of_two_edges(molecules):
    from nbody_pyg.compare.adapters.pyg import triplets

    z, pos = molecules["chiral"]
    index = CutoffGraph(2.2).topology(z, pos).pair_index[0]
    i, j, idx_i, idx_j, idx_k, kj, ji = triplets(index, len(z))
    edges = list(zip(*index.tolist(), strict=True))
    assert list(zip(j.tolist(), i.tolist(), strict=True)) == edges
    found = set(zip(idx_k.tolist(), idx_j.tolist(), idx_i.tolist(), strict=True))
    wanted = {(k, j, i) for k, j in edges for jj, i in edges if j == jj and k != i}
    assert found == wanted
    assert len(idx_k) == len(wanted) > 10
    for n in range(len(idx_k)):
        assert edges[kj[n]] == (idx_k[n], idx_j[n])
        assert edges[ji[n]] == (idx_j[n], idx_i[n])


def test_cutoff_graph_is_a_valid_scheme_with_the_edges_of_a_shell(molecules):
    z, pos = molecules["chiral"]
    graph = CutoffGraph(2.5)
    topology = graph.topology(z, pos).validate()
    shell = NestedShells((2.5,)).topology(z, pos).child_index[1]
    assert topology.pair_index[0].tolist() == shell[:, shell[0] != shell[1]].tolist()
    frame = graph(AtomicData(z=z, pos=pos))
    assert graph.read(frame).pair_index[0].shape[1] > 0
    with pytest.raises(ValueError, match="holds that of"):
        CutoffGraph(3.0).read(frame)
    with pytest.raises(ValueError, match="cutoff must be a positive"):
        CutoffGraph(-1.0)


def test_weights_depend_on_the_seed_alone():
    one, again, other = (
        build_peer("schnet", FACTS, seed=seed, **TINY["schnet"]).model.lin1.weight for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_what_a_peer_changes_is_put_back():
    before = (torch.get_default_dtype(), dict(os.environ), torch.get_rng_state(), random.getstate())
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002

    def spoil() -> None:
        torch.set_default_dtype(torch.float64)
        os.environ["NBODY_PEER"] = "1"
        os.environ.pop("PATH")
        np.random.rand(3)  # noqa: NPY002
        random.random()
        raise RuntimeError("spoiled")

    with pytest.raises(RuntimeError, match="spoiled"), undisturbed(3):
        spoil()
    assert (torch.get_default_dtype(), dict(os.environ)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert random.getstate() == before[3]
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("name", "package"),
    [("painn", "schnetpack"), ("nequip", "nequip"), ("mace", "mace"), ("tensornet", "torchmdnet")],
)
def test_a_missing_peer_is_named_with_its_pip_line(name, package, monkeypatch):
    for loaded in [key for key in sys.modules if key == package or key.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(registry, "_version", lambda distribution: None)
    with pytest.raises(MissingPeer, match=rf"is not installed: pip install .*{entry(name).distribution}"):
        build_peer(name, FACTS)


def test_names_of_the_registry():
    with pytest.raises(ValueError, match="did you mean painn"):
        entry("paynn")
    with pytest.raises(ValueError, match="our own network"):
        build_peer("nbody", FACTS)
    assert version("schnet").startswith("torch_geometric 2")
    for found in MODELS.values():
        assert found.optimizer in found.lr
        assert set(found.lr) == {"adam", "soap"}
        assert not found.build or found.install.startswith("pip install")
