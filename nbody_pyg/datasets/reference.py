"""Reference energies E0 of the elements, fitted in float64."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch_geometric.data import Data

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets.audit import require_labels
from nbody_pyg.datasets.frames import has_label, listed, shaped_label
from nbody_pyg.energy import Energies
from nbody_pyg.geometry import neighbour_list
from nbody_pyg.messages import symbols
from nbody_pyg.renamed import former

_LARGE = 50.0  # eV per atom; no chemical bond is that strong
_ALONE = 6.0  # angstrom; no crystal has first neighbours that far apart
logger = logging.getLogger(__name__)


def fit_atomic_energies(frames: Sequence[AtomicData], mode: str | Energies = "lstsq") -> dict[int, float]:
    r"""One energy per element, so that :math:`E - \sum_i E_0(z_i)` is small.

    .. math:: \min_{E_0} \sum_f \bigl( E_f - \sum_z n_{fz} E_0(z) \bigr)^2

    ==============  =================  ============
    symbol          code               unit
    ==============  =================  ============
    :math:`E_f`     ``frame.energy``   eV
    :math:`E_0(z)`  the result         eV
    ==============  =================  ============

    Args:
        frames: systems with energies.
        mode: ``"lstsq"``: least squares in float64. Where the compositions do not determine every element
            (one molecule only has one composition), the part that is not determined stays at the mean
            energy per atom: the fit is as good, and a log message says so.
            ``"mean"``: the mean energy per atom, for every element.
            ``"isolated"``: the energies of the frames that are isolated atoms (the lowest one of each element): one
            atom, without periodic images nearer than 6 angstrom.
            A mapping from atomic number or symbol to eV: checked and completed to a plain dictionary.

    Frames without an energy (missing or NaN) do not count, and neither do those whose energy is far off all others.

    Raises:
        ValueError: no frames or energies, unknown mode, an element of the frames without reference.

    Warns:
        UserWarning: \|E - E0\| per atom exceeds 50 eV: the references belong to another level of theory or
            unit, or those frames are wrong; they are named.
    """
    require_labels(frames, ["energy"], partial=True)
    known = [number for number, frame in enumerate(frames) if has_label(frame, "energy")]
    labels = [shaped_label(frames[i].energy, "energy", len(frames[i].z), f"frame {i}").detach().cpu() for i in known]
    energies = torch.cat(labels).double().numpy()
    owner = np.repeat(np.arange(len(frames)), [len(frame.z) for frame in frames])
    numbers, column = np.unique(np.concatenate([frame.z.cpu().numpy() for frame in frames]), return_inverse=True)
    species = numbers.tolist()
    counts = np.zeros((len(frames), len(species)))
    np.add.at(counts, (owner, column), 1.0)
    counts = counts[known]
    if isinstance(mode, Mapping):
        values = _from_mapping(mode, species)
    elif mode == "isolated":
        values = _from_isolated(energies, counts, species, np.array([is_isolated_atom(frames[i]) for i in known]))
    elif mode in _FITS:
        usual = _usual(energies, counts)
        values = _FITS[mode](energies[usual], counts[usual], species)
    else:
        raise ValueError(f"mode must be 'lstsq', 'mean', 'isolated' or a mapping element -> eV, got {mode!r}")
    left = np.abs(energies - counts @ values) / counts.sum(axis=1)
    if left.max() > _LARGE:
        odd = [known[i] for i in np.flatnonzero(left > _LARGE)]
        warnings.warn(
            f"after subtraction of the reference energies {left.max():.1f} eV per atom are left in "
            f"{listed(frames, odd)} ({len(odd)} of {len(known)}); references and frames seem to differ in "
            "level of theory or units, or these frames are wrong",
            stacklevel=2,
        )
    return dict(zip(species, values.tolist(), strict=True))


def _usual(energies: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which frames to fit to: all, but for those whose energy per atom is far off what the others have.

    A single wrong energy of 1e5 eV would move the references of all frames.
    """
    usual = np.ones(len(energies), dtype=bool)
    atoms = counts.sum(axis=1)
    weight = usual / atoms
    for step in range(30):  # towards the smallest sum of absolute errors per atom, which a few wrong ones do not move
        values = np.linalg.lstsq(counts * weight[:, None], energies * weight, rcond=1e-10)[0]
        left = np.abs(energies - counts @ values) / atoms
        if step == 0 and left.max() <= _LARGE:
            return usual
        weight = 1.0 / (atoms * np.sqrt(np.maximum(left, 1e-3)))
    far = left > max(_LARGE, 30.0 * float(np.median(left)))
    return usual if far.all() else ~far


def _mean_per_atom(energies: np.ndarray, counts: np.ndarray) -> float:
    return float(energies.sum() / counts.sum())


fit_reference = former("fit_reference", fit_atomic_energies)


def _from_mapping(given: Energies, species: Sequence[int]) -> np.ndarray:
    unknown = [key for key in given if isinstance(key, str) and not key.isdigit() and key not in atomic_numbers]
    if unknown:
        raise ValueError(f"mode names {unknown[0]!r}, which is no element symbol; use e.g. 'O' or 8")
    table = {
        atomic_numbers[key] if isinstance(key, str) and not key.isdigit() else int(key): float(value)
        for key, value in given.items()
    }
    missing = [z for z in species if z not in table]
    if missing:
        raise ValueError(f"mode gives no reference energy for {symbols(missing)}; add them to the mapping")
    values = np.array([table[z] for z in species])
    if not np.isfinite(values).all():
        raise ValueError(f"mode must hold finite energies, got {dict(given)}")
    return values


def is_isolated_atom(frame: Data) -> bool:
    """Whether a frame is one atom on its own: a crystal may have a cell of one atom, a single atom a wide cell."""
    if len(frame.z) != 1:
        return False
    index, _ = neighbour_list(frame.pos, _ALONE, None, frame.get("cell"), frame.get("pbc"))
    return index.shape[1] == 0


def _from_isolated(energies: np.ndarray, counts: np.ndarray, species: Sequence[int], single: np.ndarray) -> np.ndarray:
    values = []
    for column, z in enumerate(species):
        mine = energies[single & (counts[:, column] == 1)]
        if mine.size == 0:
            raise ValueError(
                f"mode 'isolated' needs a frame with an isolated atom of {chemical_symbols[z]}, there is none; "
                f"add it, give a mapping, or use mode='lstsq'"
            )
        values.append(mine.min())
    return np.array(values)


def _least_squares(energies: np.ndarray, counts: np.ndarray, species: Sequence[int]) -> np.ndarray:
    # Correcting the mean per atom by the solution of least norm keeps a sensible value in every direction
    # that the compositions leave open; where they leave none open it is plain least squares.
    mean = _mean_per_atom(energies, counts)
    base = np.full(len(species), mean)
    correction, _, rank, _ = np.linalg.lstsq(counts, energies - counts @ base, rcond=1e-10)
    if rank < len(species):
        logger.warning(
            "reference energies: %d composition%s cannot determine the %d elements %s one by one; "
            "the rest stays at the mean energy per atom, %.4f eV (the fit of the energies is not affected)",
            rank,
            "" if rank == 1 else "s",
            len(species),
            symbols(species),
            mean,
        )
    fitted: np.ndarray = base + correction
    return fitted


def _mean(energies: np.ndarray, counts: np.ndarray, species: Sequence[int]) -> np.ndarray:
    return np.full(len(species), _mean_per_atom(energies, counts))


_FITS = {"mean": _mean, "lstsq": _least_squares}
