"""One meaning of charges and spins: read in one place, the same in every command, seen by the calculator's cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from nbody_pyg import AtomicData, NBodyNet, NestedShells, Potential
from nbody_pyg.cli.frames import read_structures
from nbody_pyg.cli.main import main
from nbody_pyg.data import electronic_state_of
from nbody_pyg.datasets import label_audit, load_embedded, read_frames
from nbody_pyg.deploy import Committee, NBodyCalculator, explain_energy, load_model, relax, save_model
from nbody_pyg.training import TrainingConfig, fit
from nbody_pyg.training.config import parse_config
from nbody_pyg.training.evaluation import evaluate
from nbody_pyg.training.prepare import DataSets, build_potential, load_data

FAST = ["--model.channels", "4", "--model.lmax", "1", "--training.dtype", "float64", "--output.plot", "false"]


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return atoms


def charged_models(**options) -> dict[str, Potential]:
    """A network with inputs, one with latent charges, one with both."""
    given = {
        "inputs": {"inputs": ("charge", "spin")},
        "long range": {"long_range": {"method": "direct", "coulomb": True}},
        "both": {"inputs": ("charge",), "long_range": "direct"},
    }
    models = {}
    for name, arguments in given.items():
        torch.manual_seed(0)
        net = NBodyNet([1, 6, 8], NestedShells((3.5,)), channels=4, lmax=1, **arguments, **options)
        models[name] = Potential(net, {1: -13.0, 6: -1000.0, 8: -2000.0}).double()
    return models


WHOLE = [0, 0, 1, -1, 1, 0, 0, 0, 0]
#: How a structure may say that it is a cation, and that it is nothing.
STATES = {
    "charge": {"charge": 1},
    "float": {"charge": np.float32(1.0)},
    "array": {"charge": np.array([1.0])},
    "total_charge": {"total_charge": 1},
    "twice": {"charge": 1, "total_charge": 1.0},
    "whole": {"initial_charges": WHOLE},
    "whole and charge": {"initial_charges": WHOLE, "charge": 1},
    "partial": {"initial_charges": [0.5, 0.25, -0.35, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]},
    "partial and charge": {"initial_charges": [0.111] * 9, "charge": 1},
    "zeros and charge": {"initial_charges": [0.0] * 9, "charge": 1},
    "zeros": {"initial_charges": [0.0] * 9},
    "partial, neutral": {"initial_charges": [0.4, -0.2, -0.2, 0, 0, 0, 0, 0, 0]},
    "nothing": {},
}


def structure(state: dict) -> Atoms:
    atoms = ethanol()
    for key, value in state.items():
        if key.endswith("_charges"):
            atoms.set_array(key, np.array(value, dtype=float))
        else:
            atoms.info[key] = value
    return atoms


@pytest.mark.parametrize("name", STATES)
def test_what_a_structure_says(name):
    found = electronic_state_of(structure(STATES[name]))
    total = found["charges"].sum() if "charges" in found else found.get("charge", torch.zeros(1))
    assert float(total) == (0.0 if name in ("zeros", "partial, neutral", "nothing") else 1.0)
    assert ("charges" in found) == ("whole" in name)
    again = electronic_state_of(AtomicData.from_ase(structure(STATES[name])).to_ase())
    assert found.keys() == again.keys() and all(torch.equal(found[key], again[key]) for key in found)


@pytest.mark.parametrize("key", ["spin", "multiplicity", "spin_multiplicity", "total_spin"])
def test_multiplicities(key):
    assert electronic_state_of(structure({key: 3}))["spin"].tolist() == [3.0]


def test_formal_charges_that_are_no_whole_numbers_have_a_name_of_their_own():
    third = [1 / 3] * 3 + [0.0] * 6
    found = electronic_state_of(structure({"formal_charges": third, "charge": 1}))
    assert found["charges"].tolist() == third
    again = electronic_state_of(AtomicData.from_ase(structure({"formal_charges": third})).to_ase())
    assert torch.equal(again["charges"], found["charges"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"charge": 1, "total_charge": 0}, r"info\['charge'\] is 1, but info\['total_charge'\] is 0"),
        ({"charge": 0, "initial_charges": WHOLE}, "initial_charges add up to 1 e, but the total charge is 0"),
        ({"charge": 1, "initial_charges": [0.1] * 9}, "initial_charges add up to 0.9 e, but the total charge is 1"),
        ({"initial_charges": [0.1] * 9}, "no whole numbers, so no formal charges, and add up to 0.9 e"),
        ({"charge": float("nan")}, r"info\['charge'\] must be one finite number, got nan"),
        ({"charge": "one"}, "must be one finite number, got 'one'"),
        ({"charge": np.ones(9)}, "must be one finite number"),
        ({"charge": True}, "must be one finite number, got True"),
        ({"spin": 0}, r"info\['spin'\] must be the spin multiplicity 2S \+ 1, a whole number from 1 \(singlet\) on"),
        ({"spin": 1.5}, "must be the spin multiplicity"),
        ({"spin": 1, "multiplicity": 2}, r"info\['spin'\] is 1, but info\['multiplicity'\] is 2"),
        ({"initial_charges": [float("nan")] * 9}, "initial_charges must hold one finite number for each of 9 atoms"),
    ],
)
def test_contradictions_are_errors_everywhere(state, message, tmp_path):
    atoms = structure(state)
    save_model(charged_models()["inputs"], tmp_path / "m.nbody")
    for reader in (electronic_state_of, AtomicData.from_ase):
        with pytest.raises(ValueError, match=message):
            reader(atoms)
    atoms.calc = NBodyCalculator(tmp_path / "m.nbody")
    with pytest.raises(ValueError, match=message):
        atoms.get_potential_energy()
    atoms.calc = None
    if isinstance(state.get("charge"), bool):
        return  # a file has no such type
    path = tmp_path / "in.traj"
    write(path, [ethanol(), atoms])
    for reader in (read_frames, read_structures):
        with pytest.raises(ValueError, match=f"frame 1 of .*in.traj.*{message}"):
            reader(str(path))


def test_charges_among_results_are_results():
    """ASE reads columns 'charge' and 'charges' into the results of a calculator, where calculators put theirs."""
    atoms = ethanol()
    for charges, message in (
        (np.array(WHOLE, dtype=float), "name the column initial_charges"),
        (np.full(9, 1 / 9), "computed charges of the atoms add up to 1 e, but the total charge is 0"),
    ):
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, charges=charges)
        with pytest.raises(ValueError, match=message):
            AtomicData.from_ase(atoms)
    atoms.info["charge"] = 1
    assert AtomicData.from_ase(atoms).charge.tolist() == [1.0]
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, charges=np.linspace(-0.3, 0.3, 9))
    del atoms.info["charge"]
    assert not {"charge", "charges"} & set(AtomicData.from_ase(atoms).keys())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inputs", "long range", "both"])
def test_one_energy_in_every_command(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = charged_models()[name]
    save_model(model, "m.nbody")
    save_model(model, "n.nbody")
    energies = []
    for number, state in enumerate(STATES.values()):
        write("one.xyz", structure(state))
        atoms = read("one.xyz")
        given = read_frames("one.xyz")[0]
        expected = float(model(given)["energy"])
        energies.append(expected)
        found = {"structures": float(model(read_structures("one.xyz")[0])["energy"])}
        found["explanation"] = explain_energy(model, given).total
        found["relax"] = float(relax(model, [given, given], max_steps=1).start_energy[1])
        found["evaluate"] = float(evaluate(model, [given]).energy)
        for key, calculator in (
            ("calculator", NBodyCalculator("m.nbody")),
            ("committee", Committee(["m.nbody", "n.nbody"])),
        ):
            atoms.calc = calculator
            found[key] = atoms.get_potential_energy()
        assert found == pytest.approx(dict.fromkeys(found, expected), abs=1e-10)
        if number not in (0, 5, 9):
            continue
        assert main(["evaluate", "m.nbody", "one.xyz", "--no-plot", "--out", f"e{number}"]) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if "info['charge']" in line]
        assert all(row.rstrip().endswith("input") for row in rows) and len(rows) == (number != 5)
        predicted = read(f"e{number}/one_predictions.xyz")
        written = {"evaluate": predicted.get_potential_energy()}
        predicted.calc = NBodyCalculator("m.nbody")
        written["evaluate, again"] = predicted.get_potential_energy()
        words = ["md", "m.nbody", "one.xyz", "--steps", "1", "--every", "1", "--out", f"md{number}"]
        assert main(words) == 0
        first = read(f"md{number}/trajectory.xyz", index=0)
        written["md"] = first.get_potential_energy()
        words = ["relax", "m.nbody", "one.xyz", "--fmax", "1e9", "--dtype", "float64", "--out", f"r{number}.xyz"]
        assert main(words) == 0
        relaxed = read(f"r{number}.xyz")
        written["relax"] = relaxed.get_potential_energy()
        capsys.readouterr()
        assert main(["energies", "m.nbody", "one.xyz"]) == 0
        written["energies"] = float(capsys.readouterr().out.split(":")[1].split()[0])
        assert written == pytest.approx(dict.fromkeys(written, expected), abs=1e-6)  # as files print them
        assert main(["check", "m.nbody", "--frames", "one.xyz", "--only", "symmetry"]) == 0
    assert len({round(energy, 6) for energy in energies}) == (2 if name == "inputs" else 3)


def test_the_cache_sees_charges_and_spins():
    model = charged_models()["inputs"]
    for calculator in (NBodyCalculator(model), Committee([model, model])):
        atoms, seen = ethanol(), []
        atoms.calc = calculator
        for state in ({}, {"charge": 1}, {"charge": -1}, {"spin": 2}, {"total_charge": 2}, {"charge": 1}):
            atoms.info.clear()
            atoms.info.update(state)
            fresh = structure(state)
            fresh.calc = NBodyCalculator(model)
            seen.append(atoms.get_potential_energy())
            assert seen[-1] == pytest.approx(fresh.get_potential_energy(), abs=1e-10)
            assert not atoms.calc.check_state(atoms) and atoms.calc.calculation_required(fresh, ["energy"]) is False
            assert np.abs(atoms.get_forces() - fresh.get_forces()).max() < 1e-10
        assert len({round(energy, 6) for energy in seen}) == 5
        charge = np.array([1.0])
        atoms.info = {"charge": charge}
        before = atoms.get_potential_energy()
        charge[0] = 3.0  # in place
        assert abs(atoms.get_potential_energy() - before) > 1e-6


def labelled(states, offset=lambda q, s: 9.0 * q + 2.0 * (s - 1)) -> list[Atoms]:
    """Ethanol with several charges and spins, whose energies differ by an offset, and forces by a factor."""
    out = []
    for number, frame in enumerate(load_embedded("ethanol")[:12]):
        state = states[number % len(states)]
        atoms = frame.to_ase()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        shift = offset(state.get("charge", 0), state.get("spin", 1))
        atoms.info.update(state)
        atoms.calc = SinglePointCalculator(atoms, energy=energy + shift, forces=forces)
        out.append(atoms)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("states", "inputs", "assumed"),
    [
        pytest.param([{}], None, {}, marks=pytest.mark.slow),
        pytest.param([{"charge": 0}], None, {}, marks=pytest.mark.slow),
        pytest.param([{"charge": 0, "spin": 1}, {}], None, {}, marks=pytest.mark.slow),
        ([{"charge": -1, "spin": 2}], None, {"charge": -1.0, "spin": 2.0}),
        pytest.param([{"charge": 0}, {"charge": 1}], ["charge"], {}, marks=pytest.mark.slow),
        pytest.param([{}, {"charge": 1}], ["charge"], {}, marks=pytest.mark.slow),
        pytest.param(
            [{"charge": 1, "spin": 1}, {"charge": 1, "spin": 3}], ["spin"], {"charge": 1.0}, marks=pytest.mark.slow
        ),
        ([{"charge": 0, "spin": 1}, {"charge": 1, "spin": 2}], ["charge", "spin"], {}),
    ],
)
def test_networks_get_the_inputs_that_vary(states, inputs, assumed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("t.xyz", labelled(states))
    words = ["train", "--data.train", "t.xyz", "--data.num_val", "4", *FAST, "--training.max_steps", "4"]
    assert main([*words, "--output.folder", "r"]) == 0
    out, model = capsys.readouterr().out, load_model("r/model.nbody")
    assert (list(model.model.inputs) or None) == inputs and model.model.assumed == assumed
    for key in inputs or ():
        assert f"input   {key}" in out
    for key in assumed:
        assert f"fixed   {key}" in out
    if states == [{"charge": 0}]:
        assert [line.split()[-1] for line in out.splitlines() if "info['charge']" in line] == ["used", "used"]
    # What the file of a run says is what the next run does
    assert main(["train", "r/config.yaml", "--output.folder", "again"]) == 0
    assert load_model("again/model.nbody").model.inputs == tuple(inputs or ())
    assert main(["check", "r/model.nbody", "--only", "symmetry"]) == 0
    assert main(["info", "r/model.nbody"]) == 0
    assert all(f"fixed {key}" in capsys.readouterr().out for key in list(assumed)[:1])
    write("other.xyz", [structure({"charge": 5, "spin": 5})])
    refused = sorted({"charge", "spin"} - set(inputs or ()))
    for command in (
        ["evaluate", "r/model.nbody", "other.xyz", "--no-plot"],
        ["relax", "r/model.nbody", "other.xyz"],
        ["energies", "r/model.nbody", "other.xyz"],
        ["md", "r/model.nbody", "other.xyz", "--steps", "1"],
        ["check", "r/model.nbody", "--frames", "other.xyz"],
    ):
        if not refused:
            continue
        assert main(command) == 1
        error = capsys.readouterr().err
        assert f"{refused[0]} is 5, but the model has no input for it" in error and "Traceback" not in error
        if command[0] in ("evaluate", "relax", "check"):
            assert "frame 0 of" in error


def test_frames_that_are_unlike_the_training_frames_are_found_before_it(tmp_path):
    write(tmp_path / "t.xyz", labelled([{"charge": 0}]))
    write(tmp_path / "v.xyz", labelled([{"charge": 0}, {"charge": 1}]))
    data = {"train": str(tmp_path / "t.xyz"), "num_val": 0, "test": {"ions": str(tmp_path / "v.xyz")}}
    config = parse_config({"data": data, "training": {"max_steps": 1}, "model": {"channels": 4, "lmax": 1}})
    with pytest.raises(ValueError, match="frame 1 of the ions frames: charge is 1, but the model has no input for it"):
        build_potential(config, load_data(config.data))


def test_fit_refuses_what_the_network_cannot_learn(tmp_path):
    frames = [AtomicData.from_ase(atoms) for atoms in labelled([{}, {"charge": 1}])]
    net = NBodyNet([1, 6, 8], NestedShells((3.5,)), channels=4, lmax=1)
    settings = TrainingConfig(max_steps=2, batch_size=4)
    with pytest.raises(
        ValueError, match=r"charge must be the same in all training frames.* got 0 in frame 0 and 1 in frame 1"
    ):
        fit(Potential(net), frames, (), settings, tmp_path, show_progress=False)
    net = NBodyNet([1, 6, 8], NestedShells((3.5,)), channels=4, lmax=1, inputs=("charge",))
    assert fit(Potential(net), frames, frames[:3], settings, tmp_path, show_progress=False).steps == 2


def test_files_in_arrays(tmp_path):
    frames = load_embedded("ethanol")[:3]
    arrays = {"z": frames[0].z.numpy(), "R": np.stack([f.pos.numpy() for f in frames]), "E": np.zeros(3)}
    units = {"e_unit": "eV", "r_unit": "Ang"}
    np.savez(tmp_path / "a.npz", **arrays, **units, charge=np.array([0, 1, -1]), multiplicity=2)
    found = read_frames(tmp_path / "a.npz")
    assert [float(f.charge) for f in found] == [0.0, 1.0, -1.0] and [float(f.spin) for f in found] == [2.0] * 3
    assert "charge" in str(label_audit(found)) and found.sources["charge"] == ("charge",)
    np.savez(tmp_path / "b.npz", **arrays, **units, charge=np.zeros((3, 9)))
    with pytest.raises(ValueError, match=r"charge must have shape \[\] or \[3\], got \[3, 9\]"):
        read_frames(tmp_path / "b.npz")


def test_frames_that_say_nothing_are_neutral_beside_those_that_do(tmp_path):
    write(tmp_path / "t.xyz", labelled([{}, {"charge": 1}, {"spin": 2}]))
    frames = read_frames(tmp_path / "t.xyz")
    assert [float(f.charge) for f in frames[:3]] == [0, 1, 0] and [float(f.spin) for f in frames[:3]] == [1, 1, 2]


def test_an_ion_is_no_isolated_atom(tmp_path):
    atoms = labelled([{"charge": 0}, {"charge": 1}])
    for symbol, energy in (("H", -30.0), ("C", -35.0), ("O", -40.0)):
        for charge in (0, 1, -1):
            single = Atoms(symbol, info={"charge": charge})
            single.calc = SinglePointCalculator(single, energy=energy + (10.0 if charge > 0 else -1.0 if charge else 0))
            atoms.append(single)
    write(tmp_path / "t.xyz", atoms)
    data = {"train": str(tmp_path / "t.xyz"), "num_val": 0, "e0": "isolated"}
    config = parse_config(
        {"data": data, "training": {"max_steps": 1, "force_weight": 0}, "model": {"channels": 4, "lmax": 1}}
    )
    found = build_potential(config, load_data(config.data))
    assert found.reference.energies == {1: -30.0, 6: -35.0, 8: -40.0}


@pytest.mark.slow
def test_two_charge_states_are_learned(tmp_path):
    """Energies that differ by 9 eV, and forces of which one state has half again as much."""
    frames, source = [], load_embedded("ethanol")[:60]
    mean = torch.cat([frame.energy for frame in source]).mean()
    for frame in source:
        for charge in (0, 1):
            new = AtomicData(z=frame.z, pos=frame.pos, charge=torch.tensor([float(charge)]))
            new.energy = mean + (frame.energy - mean) * (1 + 0.5 * charge) + 9.0 * charge
            new.forces = frame.forces * (1 + 0.5 * charge)
            frames.append(new)
    config = parse_config(
        {
            "data": {"train": "unused"},
            "training": {"max_steps": 600, "batch_size": 8, "validate_every": 200},
            "model": {"channels": 8, "lmax": 1},
        }
    )
    data = DataSets(frames[:100], frames[100:])
    model = build_potential(config, data)
    data = data.with_topology(model.model.scheme)
    fit(model, data.train, data.val, config.training, tmp_path, show_progress=False)
    found = evaluate(model, data.val)
    difference = (found.energy[1::2] - found.energy[::2]) - torch.cat(
        [b.energy - a.energy for a, b in zip(data.val[::2], data.val[1::2], strict=True)]
    )
    assert float(difference.abs().max()) < 0.05
    apart = [(b - a, w.forces - v.forces) for a, b, v, w in _pairs(found.forces, data.val)]
    got, wanted = (torch.stack(column) for column in zip(*apart, strict=True))
    assert float(wanted.abs().mean()) > 0.1 and float((got - wanted).abs().mean()) < 0.25 * float(wanted.abs().mean())


def _pairs(forces, frames):
    return zip(forces[::2], forces[1::2], frames[::2], frames[1::2], strict=True)
