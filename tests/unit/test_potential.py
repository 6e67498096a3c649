from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.fd import calculate_numerical_stress
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from nbody_pyg.geometry import edge_vectors, neighbour_list, safe_norm
from nbody_pyg.hierarchy import BondTree, NestedShells
from nbody_pyg.potential import AtomicReference, Potential
from nbody_pyg.radial import smooth_cutoff

F64 = torch.float64


class ToyModel(nn.Module):
    """Pair and three-body terms with a C2 window: smooth, extensive, and different for each element."""

    def __init__(self, cutoff: float = 3.5, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.charge = nn.Parameter(torch.linspace(0.5, 1.5, 20, dtype=dtype))

    def forward(self, z, pos, batch=None, *, cell=None, pbc=None):
        pos = pos.to(self.charge.dtype)
        if batch is None:
            batch = torch.zeros_like(z)
        index, shift = neighbour_list(pos, self.cutoff, batch, cell, pbc)
        vec = edge_vectors(pos, index, shift, cell, batch)
        r = safe_norm(vec)
        window = smooth_cutoff(r, self.cutoff)
        pair = self.charge[z[index[0]]] * self.charge[z[index[1]]] * torch.exp(-r) * window
        density = torch.zeros_like(pos).index_add(0, index[1], vec * (self.charge[z[index[0]]] * window)[:, None])
        atom = torch.zeros_like(pos[:, 0]).index_add(0, index[1], pair)
        atom = atom + 0.1 * self.charge[z] * (density * density).sum(dim=-1)
        num_graphs = int(batch[-1]) + 1 if cell is None else cell.shape[0]
        return torch.zeros(num_graphs, dtype=pos.dtype).index_add(0, batch, atom)


def molecule(seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pos = torch.randn(size, 3, generator=generator, dtype=F64) * 1.4
    return torch.randint(1, 10, (size,), generator=generator), pos


def two_graphs() -> tuple[Tensor, Tensor, Tensor]:
    (z1, p1), (z2, p2) = molecule(1, 5), molecule(2, 7)
    batch = torch.tensor([0] * 5 + [1] * 7)
    return torch.cat([z1, z2]), torch.cat([p1, p2]), batch


def crystal(seed: int = 0, mixed: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    cell = torch.tensor(np.eye(3) * 4.0 + rng.normal(size=(3, 3)) * 0.4)
    pos = torch.tensor(rng.random((5, 3))) @ cell + torch.tensor(rng.normal(size=(5, 3)) * 0.3)
    pbc = torch.tensor([[True, not mixed, True]])
    return torch.tensor([1, 8, 6, 1, 7]), pos, cell.reshape(1, 3, 3), pbc


def finite_difference_forces(potential: Potential, z: Tensor, pos: Tensor, h: float = 1e-4, **kwargs) -> Tensor:
    forces = torch.zeros_like(pos)
    for i in range(pos.shape[0]):
        for k in range(3):
            energies = []
            for step in (-2, -1, 1, 2):
                moved = pos.clone()
                moved[i, k] += step * h
                energies.append(potential(z, moved, compute_forces=False, **kwargs)["energy"].sum())
            a, b, c, d = energies
            forces[i, k] = -(a - 8 * b + 8 * c - d) / (12 * h)
    return forces


class PotentialCalculator(Calculator):
    implemented_properties = ("energy", "free_energy", "forces", "stress")

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        out = self.potential(
            torch.tensor(atoms.numbers),
            torch.tensor(atoms.positions),
            cell=torch.tensor(atoms.cell.array[None]),
            pbc=torch.tensor(atoms.pbc[None]),
            compute_stress=True,
        )
        stress = out["stress"][0].numpy()
        self.results = {
            "energy": out["energy"].item(),
            "free_energy": out["energy"].item(),
            "forces": out["forces"].numpy(),
            "stress": stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]],
        }


# ------------------------------------------------------------------------------------------ forces
def test_forces_are_the_finite_difference_of_the_energy():
    z, pos = molecule()
    potential = Potential(ToyModel(), AtomicReference({n: -10.0 * n for n in range(1, 10)}), scale=2.5)
    forces = potential(z, pos)["forces"]
    numeric = finite_difference_forces(potential, z, pos)
    assert forces.abs().max() > 0.1
    assert (forces - numeric).abs().max() < 1e-8 * forces.abs().max()
    assert forces.sum(dim=0).abs().max() < 1e-12


@pytest.mark.parametrize("mixed", [False, True])
def test_forces_under_periodic_boundaries(mixed):
    z, pos, cell, pbc = crystal(mixed=mixed)
    potential = Potential(ToyModel())
    forces = potential(z, pos, cell=cell, pbc=pbc)["forces"]
    numeric = finite_difference_forces(potential, z, pos, cell=cell, pbc=pbc)
    assert forces.abs().max() > 0.1
    assert (forces - numeric).abs().max() < 1e-8 * forces.abs().max()


@pytest.mark.parametrize("mixed", [False, True])
def test_stress_is_that_of_ase_in_sign_and_unit(mixed):
    z, pos, cell, pbc = crystal(3, mixed)
    atoms = Atoms(z.numpy(), pos.numpy(), cell=cell[0].numpy(), pbc=pbc[0].numpy())
    atoms.calc = PotentialCalculator(Potential(ToyModel(), scale=0.7))
    analytic = atoms.get_stress()
    numeric = calculate_numerical_stress(atoms, eps=1e-5)
    assert np.abs(analytic).min() > 1e-5
    np.testing.assert_allclose(analytic, numeric, rtol=0, atol=1e-8)


def test_stress_of_a_compressed_crystal_is_negative():
    atoms = bulk("Ar", "fcc", a=3.6)  # the toy model is repulsive
    atoms.numbers[:] = 8
    atoms.calc = PotentialCalculator(Potential(ToyModel()))
    assert atoms.get_stress()[:3].max() < -1e-3


def test_stress_of_a_batch_is_that_of_its_graphs():
    systems = [crystal(seed) for seed in (0, 1)]
    potential = Potential(ToyModel())
    alone = [potential(z, pos, cell=cell, pbc=pbc, compute_stress=True) for z, pos, cell, pbc in systems]
    data = [Data(z=z, pos=pos, cell=cell, pbc=pbc) for z, pos, cell, pbc in systems]
    together = potential(Batch.from_data_list(data), compute_stress=True)
    for key in ("energy", "forces", "stress"):
        torch.testing.assert_close(together[key], torch.cat([a[key] for a in alone]), rtol=0, atol=1e-12)
    stress = together["stress"]
    assert stress.shape == (2, 3, 3)
    torch.testing.assert_close(stress, stress.transpose(1, 2), rtol=0, atol=1e-14)


def test_one_atom_and_no_edges_give_zero_forces():
    potential = Potential(ToyModel())
    for z, pos in (
        (torch.tensor([6]), torch.zeros(1, 3, dtype=F64)),
        (torch.tensor([6, 1]), torch.eye(3, dtype=F64)[:2] * 50),
    ):
        out = potential(z, pos, create_graph=True)
        assert out["forces"].shape == pos.shape
        assert (out["forces"] == 0).all()


def test_model_that_ignores_positions_gives_zero_forces():
    class Constant(nn.Module):
        def forward(self, z, pos, batch):
            return torch.ones(1, dtype=pos.dtype)

    z, pos = molecule()
    assert (Potential(Constant())(z, pos)["forces"] == 0).all()


# --------------------------------------------------------------------------------------- autograd
def test_results_carry_a_graph_only_in_training():
    z, pos = molecule()
    potential = Potential(ToyModel())
    assert not any(t.requires_grad for t in potential(z, pos).values())
    out = potential(z, pos, create_graph=True)
    loss = out["forces"].square().sum() + out["energy"].square().sum()
    loss.backward()
    gradient = potential.model.charge.grad
    assert gradient.abs().max() > 1e-3
    h, (kept,) = 1e-5, [potential.model.charge.detach().clone()]
    element = int(z[0])

    def value(delta: float) -> float:
        with torch.no_grad():
            potential.model.charge.copy_(kept)
            potential.model.charge[element] += delta
        result = potential(z, pos)
        return float(result["forces"].square().sum() + result["energy"].square().sum())

    assert abs((value(h) - value(-h)) / (2 * h) - float(gradient[element])) < 1e-6


def test_works_under_no_grad_and_leaves_the_input_alone():
    z, pos = molecule()
    potential = Potential(ToyModel())
    expected = potential(z, pos)["forces"]
    with torch.no_grad():
        forces = potential(z, pos)["forces"]
    torch.testing.assert_close(forces, expected, rtol=0, atol=0)
    assert not pos.requires_grad
    assert pos.grad is None
    assert all(p.grad is None for p in potential.parameters())


def test_inference_mode_is_refused_for_forces_and_fine_for_energies():
    z, pos = molecule()
    potential = Potential(ToyModel())
    expected = potential(z, pos)
    with torch.inference_mode():
        assert potential(z, pos, compute_forces=False)["energy"] == expected["energy"]
        with pytest.raises(RuntimeError, match=r"inference_mode.*torch.no_grad"):
            potential(z, pos)
        made_inside = pos.clone()
    torch.testing.assert_close(potential(z, made_inside)["forces"], expected["forces"], rtol=0, atol=0)


def test_gradients_reach_positions_that_the_user_tracks():
    z, pos = molecule()
    pos.requires_grad_(True)
    out = Potential(ToyModel())(z, pos, create_graph=True)
    (slope,) = torch.autograd.grad(out["energy"].sum(), pos)
    torch.testing.assert_close(slope, -out["forces"], rtol=0, atol=1e-13)


def test_hessian_and_its_product_agree_with_differences_of_forces():
    z, pos = molecule(4, 5)
    potential = Potential(ToyModel(), scale=1.7)
    hessian = potential.hessian(z, pos)
    assert hessian.shape == (15, 15)
    assert hessian.abs().max() > 0.1
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-11)
    vector = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    product = potential.hessian_vector_product(vector, z, pos)
    torch.testing.assert_close(product.flatten(), hessian @ vector.flatten(), rtol=0, atol=1e-11)
    h = 1e-5
    numeric = -(potential(z, pos + h * vector)["forces"] - potential(z, pos - h * vector)["forces"]) / (2 * h)
    torch.testing.assert_close(product, numeric, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"vector must have the shape of pos \[5, 3\], got \[4, 3\]"):
        potential.hessian_vector_product(vector[:4], z, pos)
    two = Batch.from_data_list([Data(z=z, pos=pos), Data(z=z[:4], pos=pos[:4])])
    with pytest.raises(ValueError, match="hessian takes one system, got a batch of 2"):
        potential.hessian(two)


# ------------------------------------------------------------------------------------- precision
def test_reference_energies_stay_exact_in_a_float32_model():
    exact = -1234567.123456789
    reference = AtomicReference({"H": exact, 8: -2041.8})
    z, pos = molecule()
    z = torch.where(z > 4, 8, 1)
    potential = Potential(ToyModel(), reference, scale=1.0 / 3.0).float()
    assert potential.dtype == torch.float32
    for variant in (
        potential,
        potential.half().float(),
        copy.deepcopy(potential).double(),
        potential.to("cpu", torch.float32),
    ):
        assert variant.reference.energies[1] == exact
        assert float(variant.scale) == 1.0 / 3.0
        assert variant.scale.dtype == variant.reference.values.dtype == F64
    out = potential(z, pos)
    assert out["energy"].dtype == F64
    assert out["interaction_energy"].dtype == torch.float32
    assert out["forces"].dtype == torch.float32
    total = sum(reference.energies[int(n)] for n in z)
    assert float(out["energy"] - out["interaction_energy"].double()) == pytest.approx(total, abs=1e-9)
    fresh = Potential(ToyModel(), AtomicReference({"H": 0.0, "O": 0.0})).float()
    fresh.load_state_dict(potential.state_dict())
    assert fresh.reference.energies[1] == exact


def test_meta_device_keeps_the_dtype_of_the_reference():
    reference = AtomicReference({"H": -13.6}).to("meta")
    assert reference.values.dtype == F64
    assert reference.to_empty(device="cpu").values.dtype == F64


def test_default_dtype_is_left_alone():
    before = torch.get_default_dtype()
    Potential(ToyModel(), AtomicReference(dict.fromkeys(range(1, 10), -1.0)))(*molecule())
    assert torch.get_default_dtype() is before


# ------------------------------------------------------------------------------------ the inputs
def test_data_and_tensors_give_the_same():
    z, pos, batch = two_graphs()
    potential = Potential(ToyModel(), AtomicReference({n: -float(n) for n in range(1, 10)}))
    expected = potential(z, pos, batch)
    assert expected["energy"].shape == (2,)
    parts = [Data(z=z[batch == b], pos=pos[batch == b]) for b in (0, 1)]
    got = potential(Batch.from_data_list(parts))
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-13)
    hand_made = potential(Data(z=z, pos=pos, batch=batch))
    torch.testing.assert_close(hand_made["forces"], expected["forces"], rtol=0, atol=1e-13)
    single = potential(parts[0])
    torch.testing.assert_close(single["energy"], expected["energy"][:1], rtol=0, atol=1e-12)


def test_models_with_columns_and_tuples_work():
    class Column(ToyModel):
        def forward(self, z, pos, batch=None):
            return super().forward(z, pos, batch).unsqueeze(-1), None

    z, pos, batch = two_graphs()
    torch.testing.assert_close(
        Potential(Column())(z, pos, batch)["forces"], Potential(ToyModel())(z, pos, batch)["forces"]
    )


def test_pyg_schnet_runs_with_forces():
    from torch_geometric.nn import SchNet

    def graph(pos, batch):
        index, _ = neighbour_list(pos, 4.0, batch)
        return index, safe_norm(edge_vectors(pos, index))

    torch.manual_seed(0)
    net = SchNet(hidden_channels=16, num_filters=16, num_interactions=2, num_gaussians=8, interaction_graph=graph)
    potential = Potential(net.double())
    z, pos, batch = two_graphs()
    forces = potential(z, pos, batch)["forces"]
    assert forces.abs().max() > 1e-6
    z, pos = z[batch == 0], pos[batch == 0]
    numeric = finite_difference_forces(potential, z, pos)
    assert (forces[:5] - numeric).abs().max() < 1e-6 * forces.abs().max()


def test_topology_is_handed_to_models_that_take_it():
    seen = {}

    class Takes(ToyModel):
        def forward(self, z, pos, batch=None, *, cell=None, pbc=None, topology=None):
            seen["topology"] = topology
            return super().forward(z, pos, batch)

    z, pos = molecule()
    data = Data(z=z, pos=pos, num_parts_1=torch.tensor([1]))
    data.child_1 = torch.stack([torch.arange(6), torch.zeros(6, dtype=torch.long)])
    Potential(Takes())(data)
    assert seen["topology"].num_levels == 2
    assert seen["topology"].size(0) == 6
    Potential(Takes())(z, pos)
    assert seen["topology"] is None
    model = Takes()
    model.scheme = NestedShells(radii=(3.0,))
    Potential(model)(model.scheme(Data(z=z, pos=pos)))
    assert seen["topology"].num_levels == 3
    with pytest.raises(ValueError, match="data must hold the hierarchy of NestedShells"):
        Potential(model)(BondTree()(Data(z=z, pos=pos)))


@pytest.fixture
def unchecked(request):
    """Our own messages: where jaxtyping's hook is on, it refuses a wrong shape before we can."""
    if request.config.getoption("jaxtyping_packages", default=None):
        pytest.skip("the import hook reports wrong shapes first")


def bad_inputs():
    z, pos = molecule()
    nan = pos.clone()
    nan[3, 1] = float("nan")
    good = torch.zeros(6, dtype=torch.long)
    cell, pbc = torch.eye(3, dtype=F64)[None] * 5, torch.tensor([[True, True, True]])
    return [
        ((z.double(), pos), {}, TypeError, r"z must hold integers .* got torch.float64; cast it"),
        ((z, pos.long()), {}, TypeError, r"pos must be a floating tensor, got torch.int64"),
        ((z[:5], pos), {}, ValueError, r"z must have shape \[6\].* got \[5\]"),
        ((z[:, None], pos), {}, ValueError, r"z must have shape \[6\].* got \[6, 1\]"),
        ((z, pos[:, :2]), {}, ValueError, r"pos must have shape \[num_atoms, 3\], got \[6, 2\]"),
        ((z, nan), {}, ValueError, r"pos must be finite, but atom\(s\) 3 have NaN"),
        ((z, pos, good[:4]), {}, ValueError, r"batch must have shape \[6\].* got \[4\]"),
        ((z, pos, good.flip(0) + torch.arange(6).flip(0)), {}, ValueError, "batch must be sorted"),
        ((z, pos, good.double()), {}, TypeError, "batch must be an integer tensor, got torch.float64"),
        ((z[:0], pos[:0]), {}, ValueError, "z holds no atom"),
        ((z, None), {}, TypeError, "pos must be a tensor, got None"),
        ((z, pos), {"cell": cell[:, :2], "pbc": pbc}, ValueError, r"cell must have shape .* got \[1, 2, 3\]"),
        ((z, pos), {"cell": cell.repeat(2, 1, 1), "pbc": pbc}, ValueError, r"each of the 1 graphs, got 2"),
        ((z, pos), {"cell": cell, "pbc": pbc[:, :2]}, ValueError, r"pbc must be a bool .* got \[1, 2\]"),
        ((z, pos), {"pbc": pbc}, ValueError, r"pbc is .* but cell is None"),
        ((z, pos), {"compute_stress": True}, ValueError, "compute_stress needs a periodic cell"),
        ((Data(z=z, pos=pos), pos), {}, TypeError, "pass either a Data or tensors"),
        ((Data(pos=pos),), {}, ValueError, r"data must hold 'z' .* its keys are \['pos'\]"),
    ]


@pytest.mark.parametrize("case", range(len(bad_inputs())))
def test_bad_input_is_named(case, unchecked):
    args, kwargs, error, message = bad_inputs()[case]
    with pytest.raises(error, match=message):
        Potential(ToyModel())(*args, **kwargs)


def test_unknown_element_is_named():
    potential = Potential(ToyModel(), AtomicReference({"H": -13.6, "O": -2041.8}))
    z, pos = molecule()
    z = torch.tensor([1, 8, 6, 6, 1, 7])
    with pytest.raises(ValueError, match=r"z must hold elements of the reference energies \(H, O\), got C, N; give"):
        potential(z, pos)


@pytest.mark.parametrize(
    ("energies", "message"),
    [
        ({}, "at least one element"),
        ({"Xx": 1.0}, "'Xx', which is no element symbol"),
        ({1: 0.0, "H": 1.0}, "names H twice"),
        ({1: float("nan")}, r"energies\[1\] must be finite"),
        ({119: 1.0}, "atomic number 119, which must lie in 1..118"),
    ],
)
def test_bad_references_are_named(energies, message):
    with pytest.raises(ValueError, match=message):
        AtomicReference(energies)


def test_constructor_errors_and_wrong_outputs_are_named(unchecked):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        Potential(molecule)
    with pytest.raises(TypeError, match="already a Potential"):
        Potential(Potential(ToyModel()))
    with pytest.raises(TypeError, match="reference must be an AtomicReference, a dict or None, got int"):
        Potential(ToyModel(), 3)
    with pytest.raises(ValueError, match=r"scale must be finite and not zero, got 0\.0"):
        Potential(ToyModel(), scale=0.0)

    class PerAtom(nn.Module):
        def forward(self, z, pos, batch):
            return pos.sum(dim=-1)

    with pytest.raises(ValueError, match=r"PerAtom must return one energy per graph, \[1\] or \[1, 1\], got \[6\]"):
        Potential(PerAtom())(*molecule())

    class Open(nn.Module):
        def forward(self, z, pos, batch):
            return pos.sum().reshape(1)

    z, pos, cell, pbc = crystal()
    with pytest.raises(ValueError, match="Open has no argument 'cell', so it cannot treat a periodic system"):
        Potential(Open())(z, pos, cell=cell, pbc=pbc)


def test_reference_reads_well():
    reference = AtomicReference({"O": -2041.8, 1: -13.6})
    assert repr(reference) == "AtomicReference(H=-13.6, O=-2041.8 eV)"
    assert reference.species == (1, 8)
    assert "AtomicReference" in repr(Potential(ToyModel(), {"H": -13.6}))
