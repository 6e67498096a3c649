"""The label table, and the error that stops a training without labels."""

from __future__ import annotations

import math

import pytest
import torch

from nbody_pyg.data import AtomicData
from nbody_pyg.datasets import Frames, label_audit, require_labels


def frame(**labels) -> AtomicData:
    data = AtomicData(z=torch.tensor([8, 1, 1, 6]), pos=torch.randn(4, 3, dtype=torch.float64))
    for key, value in labels.items():
        data[key] = value
    return data


def energy(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.fixture
def frames() -> Frames:
    forces = torch.arange(12, dtype=torch.float64).reshape(4, 3) - 5.5
    systems = [frame(energy=energy(-2.0), forces=forces), frame(energy=energy(-4.0))]
    return Frames(systems, name="x.xyz", sources={"energy": ["info['E']"]}, available=["E", "my_dipole"])


def test_counts_and_ranges(frames):
    table = label_audit(frames)
    energies, forces = table.rows
    assert (energies.label, energies.found, energies.total, energies.keys) == ("energy", 2, 2, ("info['E']",))
    assert (energies.minimum, energies.maximum, energies.mean, energies.std) == (-4.0, -2.0, -3.0, 1.0)
    assert (forces.found, forces.total) == (1, 2)
    assert forces.std == pytest.approx(math.sqrt(143 / 12))
    assert table.count("forces") == (1, 2)
    assert table.count("stress") == (0, 2)


def test_the_table_reads_well(frames):
    text = str(label_audit({"train": frames, "test": [frame(alpha=energy(3.0))]}))
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["source", "label", "read", "from"]
    assert "info['E']" in lines[1]
    assert "2/2" in lines[1]
    assert "eV/A" in lines[2]
    assert any(line.split()[:2] == ["test", "alpha"] for line in lines)  # a label of the user's own
    assert any(line.split()[:2] == ["test", "energy"] and "0/1" in line for line in lines)


def test_required_labels(frames):
    require_labels(frames, ["energy"])
    require_labels(frames, ["energy", "forces"], partial=True)
    with pytest.raises(
        ValueError, match=r"'forces' is in only 1 of the 2 frames of x.xyz \(missing first in frame 1\)"
    ):
        require_labels(frames, ["energy", "forces"])
    with pytest.raises(ValueError, match=r"'dipole' is in none of the 2 frames of x.xyz; did you mean my_dipole\?"):
        require_labels(frames, ["dipole"], partial=True)
    with pytest.raises(ValueError, match="Name its key with dipole_key when reading"):
        require_labels({"val": frames}, ["dipole"])
    with pytest.raises(ValueError, match="val holds no frame"):
        require_labels({"train": frames, "val": []}, ["energy"])


def test_plain_lists_hint_at_their_own_keys():
    with pytest.raises(ValueError, match=r"'energy' is in none of the 1 frames of frames; did you mean enrgy"):
        require_labels([frame(enrgy=energy(1.0))], ["energy"])


def test_nan_counts_as_missing():
    nan = energy(float("nan"))
    frames = [frame(energy=energy(1.0)), frame(energy=nan)]
    table = label_audit(frames)
    assert table.count("energy") == (1, 2) and table.rows[0].mean == 1.0
    with pytest.raises(ValueError, match=r"'energy' is in only 1 of the 2"):
        require_labels(frames, ["energy"])
    with pytest.raises(ValueError, match=r"'energy' is in none of the 2 frames of frames; where it stands, it is NaN"):
        require_labels([frame(energy=nan), frame(energy=nan)], ["energy"], partial=True)


@pytest.mark.parametrize(("label", "shape", "size"), [("forces", (4, 3), 1e3), ("stress", (1, 3, 3), 30.0)])
def test_outliers_are_named_by_their_number_in_the_file(label, shape, size):
    systems = [frame(**{label: torch.linspace(-0.5, 0.7, math.prod(shape)).double().reshape(shape)}) for _ in range(9)]
    whole = Frames(systems, name="a/x.xyz")
    assert not label_audit(whole).notes
    systems[6][label][..., 1] = -size
    (note,) = label_audit({"train": Frames(systems, name="a/x.xyz").select([8, 6, 2])}).notes
    assert f"{label} up to {size:g} eV" in note and "in frame 6 of x.xyz (1 of 3)" in note
    for each in systems:  # all of that size: no outlier
        each[label][..., 1] = -size
    assert not label_audit(Frames(systems)).notes


def test_structures_of_another_set_that_stand_in_train_are_told():
    systems = [frame(energy=energy(1.0)) for _ in range(4)]
    moved = frame(energy=energy(1.0))
    moved.pos = systems[2].pos + 1e-7
    single = AtomicData(z=torch.tensor([8]), pos=torch.zeros(1, 3), energy=energy(1.0))
    groups = {"train": Frames([*systems, single], name="a.xyz"), "test": [frame(energy=energy(2.0)), moved, single]}
    (note,) = label_audit(groups).notes
    assert note.startswith("1 of the 3 structures of test stand in train too, for example frame 1 as frame 2 of a.xyz")
    moved.pos = systems[2].pos + 0.01
    assert not label_audit(groups).notes


def test_equal_energies_of_different_frames():
    """Such as the zeros of a file that was converted from one without energies."""
    torch.manual_seed(0)
    forces = torch.randn(4, 3, dtype=torch.float64)
    turned = forces.flip(0)[:, [1, 2, 0]]

    def notes(*frames):
        return "\n".join(label_audit({"train": frames}).notes)

    one = frame(energy=energy(0.0), forces=forces)
    assert "train: every energy is 0 eV while the forces differ" in notes(
        one, frame(energy=energy(0.0), forces=2 * forces)
    )
    assert "every energy" not in notes(one, frame(energy=energy(-1.0), forces=2 * forces))
    assert "every energy" not in notes(one, frame(energy=energy(0.0), forces=turned))
    assert "every energy" not in notes(one, frame(forces=2 * forces))
