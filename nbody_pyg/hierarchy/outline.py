"""Smooth outlines of groups of atoms in a drawing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Sharpness of the smooth minimum of distances (per angstrom): lower values merge neighbouring atoms more.
_SHARPNESS = 5.0
_SPACING, _MAX_POINTS = 0.05, 160


def outlines(xy: np.ndarray, atoms: Sequence[int], bonds: np.ndarray, margin: float) -> list[np.ndarray]:
    """Closed curves at about ``margin`` around some atoms and the bonds between them, without holes.

    The level set of a smooth minimum of the distances to all atoms and bonds: rounded, and merged where atoms are
    close.

    Args:
        xy: places of all atoms in the drawing, [N, 2].
        atoms: the atoms to enclose.
        bonds: bonds of the whole molecule, [2, M].
        margin: distance of the curve, angstrom.
    """
    from matplotlib.figure import Figure
    from matplotlib.path import Path

    inside = set(atoms)
    ends = [(a, a) for a in atoms] + [(s, t) for s, t in bonds.T.tolist() if s < t and {s, t} <= inside]
    start, stop = xy[[s for s, _ in ends]], xy[[t for _, t in ends]]
    low, high = xy[list(atoms)].min(axis=0) - 2.5 * margin, xy[list(atoms)].max(axis=0) + 2.5 * margin
    spacing = max(_SPACING, float((high - low).max()) / _MAX_POINTS)
    x, y = (np.arange(low[k], high[k] + spacing, spacing) for k in range(2))
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 1, 2)
    along = stop - start
    length = np.maximum((along**2).sum(-1), 1e-12)
    t = np.clip(((points - start) * along).sum(-1) / length, 0.0, 1.0)
    distance = np.linalg.norm(points - start - t[..., None] * along, axis=-1)
    nearest = distance.min(axis=1)
    # Each atom counts about three times (itself and its bonds), which must not push its outline outwards.
    crowd = np.exp(-_SHARPNESS * (distance - nearest[:, None])).sum(axis=1)
    field = nearest - np.log(np.maximum(crowd / 3.0, 1.0)) / _SHARPNESS
    curves = Figure().subplots().contour(x, y, field.reshape(len(y), len(x)), [margin]).allsegs[0]
    paths = [Path(curve) for curve in curves]
    return [
        curve
        for curve, path in zip(curves, paths, strict=True)
        if not any(other is not path and other.contains_point(curve[0]) for other in paths)
    ]
