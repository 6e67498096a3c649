"""Frames whose electronic steps did not converge are named, and left out if the user says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write

from nbody_pyg.cli import main
from nbody_pyg.datasets import label_audit, read_frames
from nbody_pyg.datasets.readers import find_files, join_frames

LARGEST = 4  # NELM
COUNTS = (3, 4, 2, 4)  # electronic steps of each ionic step
SMEARING = 0.02  # eV: energy without smearing minus free energy


def xml(counts=COUNTS) -> str:
    """A vasprun.xml of two atoms of silicon."""

    def array(name: str, rows) -> str:
        lines = "".join(f"<v>{' '.join(map(str, row))}</v>" for row in rows)
        return f'<varray name="{name}">{lines}</varray>'

    def structure(name: str, step: int) -> str:
        cell = array("basis", np.eye(3) * 5.43)
        named = f' name="{name}"' if name else ""
        return (f'<structure{named}><crystal>{cell}</crystal>'
                f'{array("positions", [[0, 0, 0], [0.25, 0.25, 0.25 + step / 100]])}</structure>')  # fmt: skip

    def energy(free: float) -> str:
        return (f'<energy><i name="e_fr_energy">{free}</i><i name="e_wo_entrp">{free}</i>'
                f'<i name="e_0_energy">{free + SMEARING}</i></energy>')  # fmt: skip

    steps = ""
    for step, count in enumerate(counts):
        free = -10.0 - step / 10
        scf = "".join(f"<scstep>{energy(free)}</scstep>" for _ in range(count))
        forces = array("forces", [[0.1, 0.2, 0.3 + step], [-0.1, -0.2, -0.3 - step]])
        stress = array("stress", np.diag([10.0, 20.0, 30.0]))
        steps += f"<calculation>{scf}{structure('', step)}{forces}{stress}{energy(free)}</calculation>"
    atoms = "".join("<rc><c>Si</c><c>1</c></rc>" for _ in range(2))
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?><modeling>'
        f"<kpoints>{array('kpointlist', [[0, 0, 0]])}{array('weights', [[1]])}</kpoints>"
        f'<parameters><separator name="electronic"><i type="int" name="NELM">{LARGEST}</i></separator></parameters>'
        f'<atominfo><array name="atoms"><set>{atoms}</set></array></atominfo>'
        f"{structure('initialpos', 0)}{steps}</modeling>"
    )


def outcar(counts=COUNTS, said: bool = False) -> str:
    """An OUTCAR of two atoms of silicon; ``said``: it has the line of newer versions about EDIFF."""
    lines = [" POTCAR:    PAW_PBE Si 05Jan2001", " POTCAR:    PAW_PBE Si 05Jan2001", "   ISPIN  =      1  spin",
             "   ions per type =               2", "   k-points           NKPTS =      1   NBANDS=      8",
             " k-points in reciprocal lattice and weights: K", "   0.0  0.0  0.0  1.0",
             f"   NELM   =    {LARGEST};   NELMIN=  2; NELMDL= -5     # of ELM steps"]  # fmt: skip
    for step, count in enumerate(counts):
        lines += [f"------------ Iteration    {step + 1}({number + 1:4d})  ----------" for number in range(count)]
        if count < LARGEST or said:
            lines.append("------------------------ aborting loop because EDIFF is reached ----------")
        lines += ["      direct lattice vectors                 reciprocal lattice vectors"]
        lines += ["     " + "  ".join(f"{x:.9f}" for x in (*row, *row)) for row in np.eye(3) * 5.43]
        lines += ["  in kB      10.0      20.0      30.0       0.0       0.0       0.0",
                  " POSITION                                       TOTAL-FORCE (eV/Angst)", " " + "-" * 80]  # fmt: skip
        lines += [f"   0.0 0.0 0.0    0.1 0.2 {0.3 + step}", f"   1.3575 1.3575 1.36    -0.1 -0.2 {-0.3 - step}"]
        free = -10.0 - step / 10
        lines += ["  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)", "  " + "-" * 50,
                  f"  free  energy   TOTEN  = {free} eV",
                  "", f"  energy  without entropy=  {free}  energy(sigma->0) =  {free + SMEARING}"]  # fmt: skip
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("name", "text"), [("vasprun.xml", xml()), ("OUTCAR", outcar())])
def test_vasp_steps_that_reached_nelm_are_named_and_left_out_if_asked(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    frames = read_frames(tmp_path / name)
    assert [float(f.energy) for f in frames] == pytest.approx([-9.98 - step / 10 for step in range(4)])
    assert float(frames[1].forces[0, 2]) == 1.3 and float(frames[0].stress[0, 2, 2]) < -0.01
    shown = str(label_audit(frames))
    title = f"{tmp_path.name}/{name}"
    assert f"{title}: electronic structure not converged in frames 1 and 3 (2 in all), kept; drop_unconverged" in shown
    assert f"{title}: energy is read from 'energy'; 'free_energy' holds other values, up to 0.01 eV per atom" in shown
    kept = read_frames(tmp_path / name, drop_unconverged=True)
    assert kept.numbers == (0, 2) and [float(f.energy) for f in kept] == pytest.approx([-9.98, -10.18])
    assert "frames 1 and 3 (2 in all), left out" in str(label_audit(kept))
    assert [float(f.energy) for f in read_frames(tmp_path / name, index="1:3", drop_unconverged=True)] == [
        pytest.approx(-10.18)
    ]
    free = read_frames(tmp_path / name, keys={"energy": "free_energy"})
    assert float(free[0].energy) == pytest.approx(-10.0) and not any("holds other" in note for note in free.notes)


def test_a_loop_that_reached_ediff_at_its_last_step_has_converged(tmp_path):
    (tmp_path / "OUTCAR").write_text(outcar(said=True))
    assert not any("not converged" in note for note in read_frames(tmp_path / "OUTCAR").notes)
    (tmp_path / "OUTCAR").write_text(outcar((4, 4)))
    with pytest.raises(ValueError, match=r"no frame of .*OUTCAR converged; leave drop_unconverged out"):
        read_frames(tmp_path / "OUTCAR", drop_unconverged=True)


def test_runs_in_many_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(13):
        Path(f"run{number:02d}").mkdir()
        Path(f"run{number:02d}/OUTCAR").write_text(outcar(said=number == 1))
    whole = join_frames([read_frames(path) for path in find_files("run*/OUTCAR")])
    notes = [note for note in label_audit({"train": whole}).notes if "not converged" in note]
    assert [note[:12] for note in notes] == [f"run{n:02d}/OUTCAR" for n in range(11) if n != 1]
    assert "2 more notes like the last one" in label_audit({"train": whole}).notes
    assert len(whole) == 52 and whole.name == "13 files"


@pytest.mark.slow
def test_files_of_ase_tell_it_by_a_key(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    systems = []
    for number in range(6):
        atoms = Atoms("H2O", [[0, 0, 0], [0.9, 0, 0], [0.2, 0.9, 0.1 * number]])
        atoms.info |= {"REF_energy": -1.0 - number, "converged": number not in (2, 5), "config_type": "water"}
        atoms.arrays["REF_forces"] = np.full((3, 3), 0.1 * number)
        systems.append(atoms)
    write("a.xyz", systems)
    assert "not converged in frames 2 and 5" in str(label_audit(read_frames("a.xyz")))
    words = ["train", "--data.train", "a.xyz", "--data.num_val", "1", "--model.channels", "2", "--model.lmax", "1",
             "--training.max_steps", "1", "--output.plot", "false", "--output.folder", "r",
             "--init", "none"]  # fmt: skip
    assert main([*words, "--data.drop_unconverged", "true"]) == 0
    out = capsys.readouterr().out
    assert "frames 2 and 5 (2 in all), left out" in out and "3/3" in out
    assert main([*words, "--output.folder", "s"]) == 0
    assert "frames 2 and 5 (2 in all), kept" in capsys.readouterr().out
    assert main(["evaluate", "r/model.nbody", "a.xyz", "--out", "e", "--no-plot"]) == 0
    back = read(next(Path("e").glob("*.xyz")), ":")
    assert [atoms.info["converged"] for atoms in back] == [n not in (2, 5) for n in range(6)]
