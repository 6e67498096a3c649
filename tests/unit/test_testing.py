"""Each helper must accept a sound model and reject the mutants that it exists for."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3
from torch import Tensor, nn
from torch_geometric.data import Data

from nbody_pyg.geometry import edge_vectors, neighbour_list, safe_norm
from nbody_pyg.hierarchy import BondTree
from nbody_pyg.potential import AtomicReference, Potential
from nbody_pyg.radial import smooth_cutoff
from nbody_pyg.system import System
from nbody_pyg.testing import (
    assert_batch_independent,
    assert_conservative,
    assert_equivariant,
    assert_extensive,
    assert_permutation_invariant,
    assert_separable,
    assert_size_transfer,
    assert_smooth,
    assert_translation_invariant,
    random_molecule,
    rotate_features,
    wigner_matrix,
)

F64 = torch.float64
CUTOFF = 4.0


# ------------------------------------------------------------------------------- a sound model
def edges(z, pos, batch, cell=None, pbc=None, cutoff=CUTOFF):
    index, shift = neighbour_list(pos, cutoff, batch, cell, pbc)
    vec = edge_vectors(pos, index, shift, cell, batch)
    return index, vec, safe_norm(vec)


def per_graph(values: Tensor, batch: Tensor) -> Tensor:
    return torch.zeros(int(batch[-1]) + 1, dtype=values.dtype).index_add(0, batch, values)


def weight(z: Tensor) -> Tensor:
    return 0.5 + 0.1 * z.to(F64)


def atomic(z, pos, batch, cell=None, pbc=None, window=smooth_cutoff):
    """Pair energy and the square of a vector density, for each atom."""
    index, vec, r = edges(z, pos, batch, cell, pbc)
    w = window(r, CUTOFF)
    pair = weight(z)[index[0]] * weight(z)[index[1]] * torch.exp(-r) * w
    density = torch.zeros_like(pos).index_add(0, index[1], vec * (weight(z)[index[0]] * w)[:, None])
    energy = torch.zeros_like(pos[:, 0]).index_add(0, index[1], pair)
    return energy + 0.05 * weight(z) * density.square().sum(dim=-1)


def sound(z, pos, batch, cell=None, pbc=None):
    return per_graph(atomic(z, pos, batch, cell, pbc), batch)


class Sound(nn.Module):
    """The same as a module in float32, which the helpers must lift to float64."""

    species = (1, 7, 8)

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([1.25]))

    def forward(self, z, pos, batch=None):
        assert self.factor.dtype == pos.dtype
        assert set(z.tolist()) <= {1, 7, 8}
        return (self.factor * sound(z, pos, batch)).unsqueeze(-1)


def dipole(z, pos, batch):
    """Dipole (1o), and a traceless tensor with an axial vector (2e + 1e), of each molecule."""
    index, _, r = edges(z, pos, batch)
    charge = weight(z) * torch.zeros_like(pos[:, 0]).index_add(0, index[1], smooth_cutoff(r, CUTOFF))
    num_graphs = int(batch[-1]) + 1
    mean = torch.zeros(num_graphs, 3, dtype=pos.dtype).index_add(0, batch, pos)
    mean = mean / torch.bincount(batch)[:, None]
    local = pos - mean[batch]
    vector = torch.zeros(num_graphs, 3, dtype=pos.dtype).index_add(0, batch, charge[:, None] * local)
    other = torch.zeros(num_graphs, 3, dtype=pos.dtype).index_add(0, batch, charge.square()[:, None] * local)
    tensor = o3.spherical_harmonics(2, local, normalize=False) * charge[:, None]
    tensor = torch.zeros(num_graphs, 5, dtype=pos.dtype).index_add(0, batch, tensor)
    return [vector, torch.cat([tensor, torch.linalg.cross(vector, other)], dim=-1)]


# ------------------------------------------------------------------------------------- mutants
def along_z(z, pos, batch):
    index, vec, r = edges(z, pos, batch)
    return sound(z, pos, batch) + 1e-6 * per_graph((vec[:, 2].square() * smooth_cutoff(r, CUTOFF)), batch[index[1]])


def handed(z, pos, batch):
    """Sum over atoms of a triple product of three densities: turns sign under inversion."""
    index, vec, r = edges(z, pos, batch)
    densities = []
    for power in (1, 2, 3):
        scaled = vec * (weight(z)[index[0]] ** power * torch.exp(-power * r) * smooth_cutoff(r, CUTOFF))[:, None]
        densities.append(torch.zeros_like(pos).index_add(0, index[1], scaled))
    a, b, c = densities
    return sound(z, pos, batch) + per_graph((a * torch.linalg.cross(b, c)).sum(dim=-1), batch)


def by_index(z, pos, batch):
    start = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(batch).cumsum(0)])[batch]
    rank = (torch.arange(len(z)) - start).to(F64)
    return per_graph(atomic(z, pos, batch) * (1 + 1e-6 * rank), batch)


def capped(z, pos, batch, cap=32):
    index, _, r = edges(z, pos, batch)
    first = torch.searchsorted(index[1], torch.arange(len(z)))
    keep = torch.arange(index.shape[1]) - first[index[1]] < cap
    pair = weight(z)[index[0]] * torch.exp(-r) * smooth_cutoff(r, CUTOFF)
    return per_graph(pair[keep], batch[index[1][keep]])


def detached(z, pos, batch):
    return sound(z, pos, batch) + 1e-4 * sound(z, 1.1 * pos.detach(), batch)


def fully_detached(z, pos, batch):
    return sound(z, pos.detach(), batch)


def direct_forces(z, pos, batch):
    """Forces of a sound model plus a part that is the gradient of nothing."""
    out = Potential(_Module(sound))(z, pos, batch)
    index, vec, r = edges(z, pos, batch)
    extra = vec * (weight(z)[index[0]] * smooth_cutoff(r, CUTOFF))[:, None]
    swirl = 1e-4 * torch.zeros_like(pos).index_add(0, index[1], extra)
    return {"energy": out["energy"], "forces": out["forces"] + swirl}


class _Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z, pos, batch):
        return self.function(z, pos, batch)


def no_window(z, pos, batch):
    """Energy steps by 1e-4 x exp(-4) x the weights, about 1e-6 eV, where a pair crosses the cutoff."""
    index, _, r = edges(z, pos, batch, cutoff=3.1)
    pair = 1e-4 * weight(z)[index[0]] * torch.exp(-r)
    return sound(z, pos, batch) + per_graph(pair, batch[index[1]])


def linear_window(z, pos, batch):
    return per_graph(atomic(z, pos, batch, window=lambda r, c: 1 - r / c), batch)


def quadratic_window(z, pos, batch):
    return per_graph(atomic(z, pos, batch, window=lambda r, c: (1 - r / c).square()), batch)


def leaky(z, pos, batch):
    energy = sound(z, pos, batch)
    return energy + 1e-6 * (energy - energy.mean())


def softmaxed(z, pos, batch):
    energy = atomic(z, pos, batch)
    norm = per_graph(torch.exp(energy), batch)
    return per_graph(torch.exp(energy) / norm[batch] * energy, batch)


def averaged(z, pos, batch):
    return sound(z, pos, batch) / torch.bincount(batch)


def absolute(z, pos, batch):
    return sound(z, pos, batch) + 1e-6 * per_graph(torch.sin(pos).sum(dim=-1), batch)


def constant(z, pos, batch):
    return per_graph(weight(z), batch) + 0.0 * sound(z, pos, batch)


def zero(z, pos, batch):
    return 0.0 * sound(z, pos, batch)


HELPERS = (
    assert_equivariant,
    assert_permutation_invariant,
    assert_translation_invariant,
    assert_batch_independent,
    assert_extensive,
    assert_conservative,
    assert_smooth,
)


# ----------------------------------------------------------------------------------- acceptance
@pytest.mark.parametrize(
    ("helper", "kind"),
    [
        (helper, kind)
        for helper in HELPERS
        for kind in ("function", "module", "potential", "dict")
        # a scan takes seconds: two of the four ways in are enough
        if helper is not assert_smooth or kind in ("function", "potential")
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_sound_model_passes(helper, kind):
    subject = {
        "function": sound,
        "module": Sound(),
        "potential": Potential(Sound(), AtomicReference({1: -13e3, 8: -2e6}), scale=2.0),
        "dict": lambda z, pos, batch: Potential(_Module(sound))(z, pos, batch),
    }[kind]
    assert helper(subject) < 1e-6 or helper is assert_smooth
    if kind in ("module", "potential"):
        assert next(subject.parameters()).dtype == torch.float32
        assert subject.training


@pytest.mark.parametrize("helper", HELPERS[:-1], ids=lambda h: h.__name__)
def test_periodic_systems_pass(helper):
    cell = torch.tensor([[[5.0, 0.3, 0.0], [-0.4, 4.6, 0.5], [0.2, 0.0, 5.2]]], dtype=F64)
    items = []
    for seed in (0, 1):
        molecule = random_molecule(5 + seed, seed=seed)
        pbc = torch.tensor([[True, seed == 0, True]])
        items.append(Data(z=molecule.z, pos=molecule.pos, cell=cell * (1 + 0.1 * seed), pbc=pbc))
    assert helper(sound, systems=items) < 1e-6


@pytest.mark.slow
def test_smoothness_reports_the_order():
    assert assert_smooth(sound, continuity=2) > 2.5
    assert 1.6 < assert_smooth(quadratic_window) < 2.5
    with pytest.raises(AssertionError, match="continuity 2 needs 3"):
        assert_smooth(quadratic_window, continuity=2)


def test_bond_trees_are_smooth_while_their_topology_is_frozen():
    class Grouped(nn.Module):
        """Squared distances between the centres of bonded groups: exact only for a fixed topology."""

        def __init__(self):
            super().__init__()
            self.scheme = BondTree()

        def forward(self, z, pos, batch, *, topology=None):
            if topology is None:
                topology = self.scheme.topology(z, pos, batch)
            hierarchy = self.scheme.hierarchy(topology, z, pos)
            energy = sound(z, pos, batch)
            for level in hierarchy.levels[1:]:
                spread = level.child_vec.square().sum(dim=-1)
                energy = energy.index_add(0, level.batch[level.child_index[1]], 0.01 * spread)
            return energy

    z = torch.tensor([6, 1, 1, 1, 8, 1])
    pos = torch.tensor(
        [
            [-0.05, 0.67, 0.01],
            [-1.08, 1.0, 0.03],
            [0.46, 1.07, -0.88],
            [0.45, 1.04, 0.91],
            [-0.05, -0.76, -0.02],
            [0.86, -1.06, 0.03],
        ],
        dtype=F64,
    )
    end = pos.clone()
    end[5] += torch.tensor([2.5, -2.0, 0.5])
    model = Potential(Grouped())
    with pytest.raises(AssertionError, match="energy not smooth near"):
        assert_smooth(model, paths=[(z, pos, end)])
    assert assert_smooth(model, paths=[(z, pos, end)], frozen_topology=True) > 1.5
    with pytest.raises(ValueError, match="frozen_topology needs a model with a scheme"):
        assert_smooth(sound, paths=[(z, pos, end)], frozen_topology=True)


def test_tuples_and_own_paths_are_taken():
    molecule = random_molecule(6)
    assert_permutation_invariant(
        sound, systems=[(molecule.z, molecule.pos), System.from_tensors(molecule.z, molecule.pos * 1.1)]
    )
    end = molecule.pos.clone()
    end[0] += torch.tensor([0.3, 0.1, 0.2])
    assert_smooth(sound, paths=[(molecule.z, molecule.pos, end)])


# ------------------------------------------------------------------------------------ rejection
@pytest.mark.parametrize("mutant", [constant, zero], ids=lambda m: m.__name__)
@pytest.mark.parametrize("helper", HELPERS, ids=lambda h: h.__name__)
def test_constant_output_is_vacuous(helper, mutant):
    with pytest.raises(AssertionError, match="vacuous"):
        helper(mutant)


@pytest.mark.parametrize(
    ("helper", "mutant", "message"),
    [
        (assert_equivariant, along_z, r"rotation .*: energy: error .* at index \[0\] exceeds"),
        (assert_equivariant, handed, r"improper rotation .*: energy: error"),
        (assert_permutation_invariant, by_index, "energy: error"),
        (assert_permutation_invariant, capped, r"system 3 \(48 atoms\): energy: error"),
        (assert_translation_invariant, absolute, "moved by 0.37 angstrom: energy: error"),
        (assert_batch_independent, leaky, "as one batch: energy: error"),
        (assert_extensive, softmaxed, "1000 angstrom apart: energy: error"),
        (assert_extensive, averaged, "1000 angstrom apart: energy: error"),
        (assert_conservative, detached, r"atom \d+[xyz]: force .* but -dE/dr = .* relative error"),
        (assert_conservative, fully_detached, r"largest force is 0\.0e\+00; look for a detach"),
        (assert_conservative, direct_forces, "relative error"),
        (assert_smooth, no_window, r"energy not smooth near .* fall as h\^-?0\.[01]"),
        (assert_smooth, linear_window, r"not smooth near .* fall as h\^"),
        (assert_smooth, lambda z, pos, batch: capped(z, pos, batch, 4), "not smooth near"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_mutant_is_rejected(helper, mutant, message):
    with pytest.raises(AssertionError, match=message):
        helper(mutant)


def test_handed_energy_passes_when_only_rotations_are_asked_for():
    assert assert_equivariant(handed, improper=False) < 1e-10


def test_asymmetric_jacobian_is_rejected_without_an_energy():
    def swirl(z, pos, batch):
        index, vec, r = edges(z, pos, batch)
        push = vec * (weight(z)[index[0]] * smooth_cutoff(r, CUTOFF))[:, None]
        return {"forces": torch.zeros_like(pos).index_add(0, index[1], push)}

    def spring(z, pos, batch):
        return {"forces": Potential(_Module(sound))(z, pos, batch)["forces"]}

    with pytest.raises(AssertionError, match="Jacobian of the forces is not symmetric"):
        assert_conservative(swirl)
    assert assert_conservative(spring) < 1e-6


def test_discontinuous_forces_without_gradient_are_rejected():
    def jumping(z, pos, batch):
        out = Potential(_Module(sound))(z, pos, batch)
        index, vec, _ = edges(z, pos, batch, cutoff=3.1)
        return {
            "energy": out["energy"],
            "forces": out["forces"] + 1e-5 * torch.zeros_like(pos).index_add(0, index[1], vec),
        }

    with pytest.raises(AssertionError, match="forces not smooth near"):
        assert_smooth(jumping)


def test_nan_is_rejected():
    def broken(z, pos, batch):
        return sound(z, pos, batch) + torch.where(pos[:, 0].max() > 5.0, torch.nan, 0.0)

    with pytest.raises(AssertionError, match="not finite"):
        assert_translation_invariant(broken)


# -------------------------------------------------------------------------- covariant functions
def test_covariant_functions_of_atoms():
    assert assert_equivariant(dipole, ["1o", "2e + 1e"]) < 1e-10
    with pytest.raises(AssertionError, match=r"output 1 \(1x2e\+1x1o\) under improper rotation"):
        assert_equivariant(dipole, ["1o", "2e + 1o"])
    with pytest.raises(AssertionError, match=r"output 0 \(3x0e\)"):
        assert_equivariant(dipole, ["3x0e", "2e + 1e"])
    with pytest.raises(ValueError, match="irreps_out has 1 entries but the model returns 2"):
        assert_equivariant(dipole, "1o")
    with pytest.raises(ValueError, match=r"output 0 must have 5 components \(1x2e\)"):
        assert_equivariant(dipole, ["2e", "2e + 1e"])


def test_layers_of_features_in_both_layouts():
    torch.manual_seed(0)
    product = o3.FullyConnectedTensorProduct("3x0e + 2x1o + 1x2e", "2x1o + 1x1e", "2x0e + 2x0o + 3x1o + 2x1e + 2x2e")
    args = (product.irreps_out, [product.irreps_in1, product.irreps_in2])
    assert assert_equivariant(product, *args, tolerance=1e-6) < 1e-6
    with pytest.raises(AssertionError, match="under"):
        assert_equivariant(lambda x, y: product.double()(x, y) + 1e-5, *args, tolerance=1e-6)
    channels = torch.randn(4, 5, dtype=F64, generator=torch.Generator().manual_seed(0))

    def mix(x):
        return (x.reshape(-1, 3, 4) @ channels).flatten(1)

    assert assert_equivariant(mix, "5x1o", "4x1o", layout="ir_mul") < 1e-12
    with pytest.raises(AssertionError):
        assert_equivariant(mix, "5x1o", "4x1o", layout="mul_ir")
    with pytest.raises(AssertionError, match="block 5x1o of output 0 is zero, so the test is vacuous"):
        assert_equivariant(lambda x: 0.0 * mix(x), "5x1o", "4x1o", layout="ir_mul")
    assert assert_equivariant(lambda x: 0.0 * mix(x), "5x1o", "4x1o", layout="ir_mul", allow_zero=True) == 0.0


@pytest.mark.parametrize("l", range(7))
def test_wigner_matrices_are_a_representation(l):
    generator = torch.Generator().manual_seed(l)
    a, b = (torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=generator))[0] for _ in range(2))
    a, b = a * torch.linalg.det(a), -b * torch.linalg.det(b)
    x = torch.randn(5, 3, dtype=F64, generator=generator)
    for parity in ("e", "o"):
        da, db, dab = (wigner_matrix(f"{l}{parity}", m) for m in (a, b, a @ b))
        torch.testing.assert_close(da @ db, dab, rtol=0, atol=1e-13)
        torch.testing.assert_close(da @ da.T, torch.eye(2 * l + 1, dtype=F64), rtol=0, atol=1e-13)
    natural = wigner_matrix(f"{l}{'eo'[l % 2]}", b)
    harmonics = o3.spherical_harmonics(l, x, normalize=True)
    turned = o3.spherical_harmonics(l, x @ b.T, normalize=True)
    torch.testing.assert_close(turned, harmonics @ natural.T, rtol=0, atol=1e-13)


def test_rotating_features_checks_its_input():
    with pytest.raises(ValueError, match="x must have 4 components for irreps 1x0e\\+1x1o, got 3"):
        rotate_features(torch.zeros(2, 3), "0e + 1o", torch.eye(3))
    with pytest.raises(ValueError, match="layout must be 'mul_ir'"):
        rotate_features(torch.zeros(2, 3), "1o", torch.eye(3), layout="m")


# ------------------------------------------------------------------------------- the test itself
def test_random_molecules_are_fit_for_the_purpose():
    for seed in range(20):
        molecule = random_molecule(5, seed=seed)
        centred = molecule.pos - molecule.pos.mean(dim=0)
        assert torch.linalg.svdvals(centred)[-1] > 0.5
        assert len(set(molecule.z.tolist())) == 3
        assert torch.pdist(molecule.pos).min() > 0.95
    assert torch.equal(random_molecule(6, seed=3).pos, random_molecule(6, seed=3).pos)


def test_planar_systems_are_refused():
    flat = random_molecule(6)
    flat = System.from_tensors(flat.z, flat.pos * torch.tensor([1.0, 1.0, 0.0], dtype=F64))
    with pytest.raises(ValueError, match="four atoms that do not lie in a plane"):
        assert_equivariant(sound, systems=[flat])


def slots(z, pos, batch):
    """Sums over the first hundred atoms of a graph: right for few copies, wrong for many."""
    values = atomic(z, pos, batch)
    first = torch.searchsorted(batch, batch)
    return per_graph(torch.where(torch.arange(len(batch)) - first < 100, values, 0.0 * values), batch)


def equilibrated(z, pos, batch):
    """Charges that share out the excess of the whole graph equally, at any distance: a constant force of the size."""
    values = atomic(z, pos, batch)
    total = per_graph(values, batch)
    return total - 0.5 * total.square() / torch.bincount(batch).to(total.dtype)


def coulomb(z, pos, batch):
    """Charges +1 and -1 in turn, unscreened."""
    index, _, r = edges(z, pos, batch, cutoff=1e5)
    charge = 1.0 - 2.0 * (z % 2).to(pos.dtype)
    pair = 0.5 * charge[index[0]] * charge[index[1]] / r
    return per_graph(torch.zeros_like(pos[:, 0]).index_add(0, index[1], pair), batch)


def test_separability_of_sound_models():
    assert assert_separable(sound) < 1e-9
    assert assert_size_transfer(sound) < 1e-9
    ions = [System.from_tensors(torch.tensor([1, 1, 3, 2]), random_molecule(4, seed=s).pos) for s in (0, 1)]
    assert assert_separable(coulomb, systems=ions, decay=1) > 1e-4


@pytest.mark.parametrize(
    ("helper", "mutant", "message"),
    [
        (assert_separable, softmaxed, r"systems 0 and 1, 125 angstrom apart: energy differs by"),
        (assert_separable, averaged, "energy differs by"),
        (assert_separable, equilibrated, "differs by"),
        (assert_size_transfer, averaged, r"2 copies of system 0: energy per copy: error"),
        (assert_size_transfer, slots, r"27 copies of system 0: energy per copy: error"),
    ],
)
def test_models_that_know_the_whole_system_are_rejected(helper, mutant, message):
    with pytest.raises(AssertionError, match=message):
        helper(mutant)


def test_slots_pass_for_two_systems():
    """Why a helper for many copies exists beside that for two."""
    assert_extensive(slots)
    assert_separable(slots)


def test_charges_do_not_pass_for_neutral_systems():
    ions = [System.from_tensors(torch.tensor([1, 1, 3, 2]), random_molecule(4, seed=s).pos) for s in (0, 1)]
    with pytest.raises(AssertionError, match=r"energy differs by .* \(decay D\^-3\)"):
        assert_separable(coulomb, systems=ions, decay=3)


def test_bad_arguments_are_named():
    molecule = random_molecule(6)
    with pytest.raises(ValueError, match="systems is empty"):
        assert_conservative(sound, systems=[])
    with pytest.raises(TypeError, match="systems must hold System, Data"):
        assert_conservative(sound, systems=["water"])
    with pytest.raises(TypeError, match="model must be callable as energy"):
        assert_conservative(3.0)
    with pytest.raises(ValueError, match="at least two geometries"):
        assert_batch_independent(sound, systems=[molecule])
    with pytest.raises(ValueError, match="starts where it ends"):
        assert_smooth(sound, paths=[(molecule.z, molecule.pos, molecule.pos)])
    with pytest.raises(ValueError, match="inputs must hold 1 tensors"):
        assert_equivariant(lambda x: x, "1o", "1o", inputs=[])
    periodic = System.from_tensors(molecule.z, molecule.pos, cell=torch.eye(3, dtype=F64)[None] * 6)
    with pytest.raises(ValueError, match="systems must be open for the default paths"):
        assert_smooth(sound, systems=[periodic])
    with pytest.raises(ValueError, match="all periodic or all open"):
        assert_batch_independent(sound, systems=[molecule, periodic])
    with pytest.raises(ValueError, match="at least two open geometries"):
        assert_separable(sound, systems=[molecule])
    with pytest.raises(ValueError, match="distances must grow"):
        assert_separable(sound, distances=(10.0, 5.0))
    with pytest.raises(ValueError, match="systems must be open; repeat a cell"):
        assert_size_transfer(sound, systems=[periodic])
    with pytest.raises(ValueError, match="counts must be 2 or more"):
        assert_size_transfer(sound, counts=(1,))
    with pytest.raises(ValueError, match="through_changes needs a model with a scheme"):
        assert_smooth(sound, through_changes=True)
