"""plot_hierarchy: what is drawn, and that drawing leaves matplotlib as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.path import Path
from torch_geometric.data import Batch

from nbody_pyg.data import AtomicData
from nbody_pyg.hierarchy import BondTree, FromAssignment, NestedShells, plot_hierarchy
from nbody_pyg.hierarchy.outline import outlines

pytestmark = pytest.mark.layout

SCHEMES = [BondTree(), NestedShells((1.7, 3.0)), FromAssignment(parts=[[0, 1, 3, 4, 5, 6, 7], [0, 2, 8]])]


def _texts(figure) -> set[str]:
    return {text.get_text() for ax in figure.axes for text in ax.texts}


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: type(scheme).__name__)
def test_it_draws_every_scheme(scheme, molecules, tmp_path):
    figure = plot_hierarchy(molecules["ethanol"], scheme)
    target = tmp_path / "hierarchy.png"
    figure.savefig(target, dpi=60)
    assert target.stat().st_size > 5_000
    assert {spec.name for spec in scheme.levels} <= _texts(figure), "a row for each level"
    assert figure.get_suptitle().endswith(type(scheme).__name__)
    assert figure.axes[0].patches, "clusters are outlined"


def test_formulae_and_colours_of_a_tree(molecules):
    figure = plot_hierarchy(molecules["ethanol"], BondTree(), title="mine")
    assert figure.get_suptitle() == "mine"
    assert {"CH$_{2}$", "CH$_{3}$", "OH", "C$_{2}$H$_{6}$O"} <= _texts(figure)
    boxes = {t.get_text(): t.get_bbox_patch() for t in figure.axes[1].texts if t.get_bbox_patch() is not None}
    hulls = {tuple(np.round(patch.get_edgecolor()[:3], 6)) for patch in figure.axes[0].patches}
    for group in ("CH$_{2}$", "CH$_{3}$", "OH"):
        assert tuple(np.round(boxes[group].get_facecolor()[:3], 6)) in hulls, "the same colour in both panels"


def test_a_stored_hierarchy_a_single_atom_and_a_cell(molecules):
    z, pos = molecules["ethanol"]
    stored = BondTree()(AtomicData(z=z, pos=pos))
    assert "level 4" in _texts(plot_hierarchy(stored))
    one = (torch.tensor([11]), torch.zeros(1, 3, dtype=torch.float64))
    assert "Na" in _texts(plot_hierarchy(one, BondTree()))
    cell = 8.0 * torch.eye(3, dtype=torch.float64)[None]
    cut = AtomicData(z=z, pos=pos % 8.0, cell=cell, pbc=torch.ones(1, 3, dtype=torch.bool))
    figure = plot_hierarchy(cut, BondTree())
    low, high = figure.axes[0].get_xlim()
    assert high - low < 8.5, "the molecule is drawn in one piece"


def test_what_it_refuses(molecules):
    z, pos = molecules["ethanol"]
    with pytest.raises(ValueError, match="must hold a hierarchy"):
        plot_hierarchy((z, pos))
    with pytest.raises(ValueError, match="must be a single graph, got a batch"):
        plot_hierarchy(Batch.from_data_list([AtomicData(z=z, pos=pos)] * 2), BondTree())
    with pytest.raises(ValueError, match="focus must be a part from 0 to 8, got 40"):
        plot_hierarchy((z, pos), NestedShells(), focus=40)


def test_an_outline_encloses_its_atoms_and_has_no_hole():
    angle = torch.arange(6) * torch.pi / 3
    ring = 1.4 * torch.stack([angle.cos(), angle.sin()], dim=1).numpy()
    bonds = np.array([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    curves = outlines(ring, range(6), np.sort(bonds, axis=0), margin=0.5)
    assert len(curves) == 1
    assert Path(curves[0]).contains_points(np.vstack([ring, [[0.0, 0.0]]])).all()
    distance = np.linalg.norm(curves[0][:, None] - ring, axis=-1).min(axis=1)
    assert distance.min() > 0.35
    assert distance.max() < 1.0
    apart = outlines(np.array([[0.0, 0.0], [9.0, 0.0]]), [0, 1], np.zeros((2, 0), dtype=int), margin=0.5)
    assert len(apart) == 2
