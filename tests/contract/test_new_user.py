"""A new user's path: PyG's data set, a transform, DataLoader, model, training, as the README shows it.

The raw file lies where PyG's ``MD17`` would have put it, so nothing is downloaded.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from nbody_pyg.datasets import load_embedded
from nbody_pyg.units import energy_factor

MARK = "<!-- run by tests/contract/test_new_user.py"


@pytest.fixture
def in_a_folder_with_md17(tmp_path, monkeypatch):
    """The embedded ethanol frames in the exact form of revised MD17."""
    frames, factor = load_embedded("ethanol")[:24], energy_factor("kcal/mol")
    folder = tmp_path / "data" / "MD17" / "revised ethanol" / "raw" / "rmd17" / "npz_data"
    for place in (folder, tmp_path / "data" / "MD17" / "raw" / "rmd17" / "npz_data"):
        place.mkdir(parents=True)
        np.savez(
            place / "rmd17_ethanol.npz",
            nuclear_charges=frames[0].z.numpy().astype(np.uint8),
            coords=np.stack([f.pos.numpy() for f in frames]),
            energies=np.array([float(f.energy) / factor for f in frames]),
            forces=np.stack([f.forces.numpy() / factor for f in frames]),
            old_indices=np.arange(len(frames)), old_energies=np.zeros(len(frames)),
            old_forces=np.zeros((len(frames), 9, 3)),
        )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_path_of_the_readme_runs(root, in_a_folder_with_md17, capsys):
    text = (root / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(re.escape(MARK) + r".*?-->\n```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 20
    names: dict = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    assert "torch.Size([5])" in capsys.readouterr().out
    assert (in_a_folder_with_md17 / "runs" / "mine" / "last.ckpt").is_file()
    # PyG's own numbers and ours are the same, up to its units and its float32
    theirs, ours = names["dataset"][3], names["frames"][3]
    np.testing.assert_allclose(theirs.force.numpy() * energy_factor("kcal/mol"), ours.forces.numpy(), atol=1e-5)
    assert names["potential"](names["val"][0])["forces"].abs().max() > 1e-3
