"""Coulomb energies through the levels of SmoothSurvivors: an identity for exact V, converging with the degree."""

from __future__ import annotations

import pytest
import torch

from nbody_pyg import SmoothSurvivors
from nbody_pyg.hierarchy import Hierarchy
from nbody_pyg.nn.handoff import coulomb_energy

F64 = torch.float64


def _charges(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Charges of +-1 at 0.05 per cubic angstrom, none nearer than 1 angstrom to another."""
    generator = torch.Generator().manual_seed(seed)
    side, cells = (count / 0.05) ** (1 / 3), round(count ** (1 / 3) + 0.5)
    grid = torch.cartesian_prod(*[torch.arange(cells, dtype=F64)] * 3)
    grid = grid[torch.randperm(cells**3, generator=generator)[:count]] * side / cells
    pos = grid + (side / cells - 1.0) * (torch.rand(count, 3, generator=generator, dtype=F64) - 0.5)
    charges = torch.where(torch.rand(count, generator=generator, dtype=F64) < 0.5, 1.0, -1.0).to(F64)
    return torch.tensor([6, 8, 7, 1])[torch.arange(count) % 4], pos, charges


def _direct(charges: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    index = torch.triu_indices(len(pos), len(pos), 1)
    return (charges[index[0]] * charges[index[1]] / (pos[index[0]] - pos[index[1]]).norm(dim=1)).sum()


def _hierarchy(scheme: SmoothSurvivors, z: torch.Tensor, pos: torch.Tensor) -> Hierarchy:
    return scheme.hierarchy(scheme.topology(z, pos.detach()), z, pos)


ONE = (SmoothSurvivors((2.5,), (4.0, None)), [(9.0, 12.0)])
TWO = (SmoothSurvivors((1.6, 2.6), (3.0, 4.0, None)), [(5.5, 6.5), (14.0, 17.0)])


@pytest.mark.parametrize(("scheme", "exchanges"), [ONE, TWO], ids=["one level", "two levels"])
def test_energy_converges_to_the_direct_sum(scheme, exchanges):
    z, pos, charges = _charges(200)
    hierarchy, exact = _hierarchy(scheme, z, pos), _direct(charges, pos)
    assert torch.pdist(pos).max() > exchanges[-1][1], "the last level does some of the work"
    errors = [float((coulomb_energy(charges, hierarchy, exchanges, lmax)[0] - exact).abs()) / 200 for lmax in (0, 2, 4)]
    assert errors[0] > 1e-5, "monopoles alone are not enough, or nothing is tested"
    assert errors[1] < 2e-4
    assert errors[2] < 1e-5


def test_no_exchange_within_the_system_is_the_direct_sum():
    z, pos, charges = _charges(60)
    energy = coulomb_energy(charges, _hierarchy(ONE[0], z, pos), [(100.0, 110.0)], 0)
    torch.testing.assert_close(energy[0], _direct(charges, pos), rtol=1e-12, atol=1e-12)


def test_forces_and_symmetry(rotation):
    z, pos, charges = _charges(90)
    permutation = torch.randperm(90, generator=torch.Generator().manual_seed(1))

    def energy_and_slope(z, pos, charges):
        pos = pos.clone().requires_grad_(True)
        energy = coulomb_energy(charges, _hierarchy(ONE[0], z, pos), ONE[1], 3)
        return energy.detach(), torch.autograd.grad(energy.sum(), pos)[0]

    energy, slope = energy_and_slope(z, pos, charges)
    turned, turned_slope = energy_and_slope(z[permutation], (pos @ rotation.T + 3.0)[permutation], charges[permutation])
    torch.testing.assert_close(turned, energy, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned_slope, (slope @ rotation.T)[permutation], rtol=0, atol=1e-11)
    exact_pos = pos.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(_direct(charges, exact_pos), exact_pos)
    assert (slope - exact).abs().max() < 0.02 * exact.abs().max()


def test_bad_exchanges_are_named():
    z, pos, charges = _charges(40)
    hierarchy = _hierarchy(TWO[0], z, pos)
    with pytest.raises(ValueError, match=r"exchanges must hold one \(start, stop\) per level of parts \(2\)"):
        coulomb_energy(charges, hierarchy, [(5.0, 6.0)])
    with pytest.raises(ValueError, match=r"exchanges\[1\] must start .* beyond the stop of exchanges\[0\] at 6"):
        coulomb_energy(charges, hierarchy, [(5.0, 6.0), (7.0, 9.0)])
    with pytest.raises(ValueError, match=r"exchanges\[0\] must be 0 < start < stop"):
        coulomb_energy(charges, hierarchy, [(6.0, 5.0), (20.0, 22.0)])
    with pytest.raises(ValueError, match=r"charges must have shape \[40\]"):
        coulomb_energy(charges[:3], hierarchy, [(5.0, 6.0), (20.0, 22.0)])


#: Largest errors per atom at lmax 2, 3, 4, e^2/angstrom: the reference of the method.
REFERENCE = torch.tensor([2.3e-4, 2.6e-5, 2.3e-6], dtype=F64)


def _typical_errors(scheme: SmoothSurvivors, exchanges: list[tuple[float, float]], draws: int) -> torch.Tensor:
    """Errors per atom at lmax 2, 3, 4. Those of single draws scatter about zero: the root mean square must fall."""
    errors = []
    for seed in range(draws):
        z, pos, charges = _charges(2000, seed)
        hierarchy, exact = _hierarchy(scheme, z, pos), _direct(charges, pos)
        energies = [coulomb_energy(charges, hierarchy, exchanges, lmax)[0] for lmax in (2, 3, 4)]
        errors.append((torch.stack(energies) - exact) / 2000)
    return torch.stack(errors).square().mean(0).sqrt()


@pytest.mark.slow
def test_two_thousand_charges():
    typical = _typical_errors(SmoothSurvivors((3.5,), (4.8, None)), [(14.0, 18.0)], draws=3)
    assert (typical < REFERENCE).all(), typical
    assert typical[0] > 1e-6, "monopoles alone are not enough, or nothing is tested"


@pytest.mark.slow
def test_two_thousand_charges_on_two_levels():
    """The second level holds a fifth of the pairs completely, and as many again in part."""
    scheme, exchanges = SmoothSurvivors((2.5, 4.0), (3.5, 5.5, None)), [(10.0, 13.0), (24.0, 30.0)]
    z, pos, charges = _charges(2000)
    assert (torch.pdist(pos) > exchanges[1][1]).double().mean() > 0.2
    typical = _typical_errors(scheme, exchanges, draws=1)
    assert (typical < REFERENCE).all(), typical
    alone = coulomb_energy(charges, _hierarchy(scheme, z, pos), exchanges, lmax=0)[0]
    assert (alone - _direct(charges, pos)).abs() / 2000 > REFERENCE[0], "monopoles alone are not enough"
