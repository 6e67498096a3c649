"""Tables, verdicts and plots of made-up records."""

from __future__ import annotations

import math

import pytest

from nbody_pyg.compare.plots import learning_curves, pareto
from nbody_pyg.compare.report import comparison_rows, groups, markdown, search_rows, target_rows, verdicts
from nbody_pyg.compare.runner import summary
from nbody_pyg.messages import aligned

pytestmark = pytest.mark.layout


def record(name, model, force, energy, latency=5e-3, seed=0, purpose="final", lr=0.01, status="done", **point):
    training = {"optimizer": "soap", "lr": lr, "batch_size": 4, "seed": seed, "budget_seconds": 300.0}
    errors = {"forces_mae": force, "energy_mae": energy}
    curve = [
        {"step": s, "cpu_seconds": 3.0 * s, "test": {k: v * 100 / s for k, v in errors.items()}} for s in (1, 10, 100)
    ]
    return {
        "point": {
            "name": name, "title": name.upper(), "model": model, "purpose": purpose, "training": training,
            "data": {"rmd17": "aspirin"}, **point,
        },
        "title": name.upper(), "status": status, "steps": 3000, "cpu_seconds": 300.0, "parameters": 60_000,
        "memory_bytes": 20e6, "latency": {"median_s": latency}, "frames": {"train": 950, "val": 50, "test": 1000},
        "val": errors, "test": {"test": errors} if purpose == "final" else {}, "curve": curve,
    }  # fmt: skip


@pytest.fixture
def group():
    records = [
        record("nbody", "nbody", 12.0, 5.0, 7e-3, seed=0), record("nbody", "nbody", 14.0, 7.0, 9e-3, seed=1),
        record("painn", "painn", 30.0, 4.0, 6e-3), record("mace", "mace", 26.0, 9.0, 20e-3),
    ]  # fmt: skip
    (found,) = groups(records)
    return found


def test_table_has_a_row_for_each_model_best_first_and_spreads_over_seeds(group):
    head, rows = comparison_rows(group)
    assert [row[0] for row in rows] == ["NBODY", "MACE", "PAINN"]
    cells = dict(zip(head, rows[0], strict=True))
    assert cells["F MAE meV/A"] == "13.00 ± 1.41"
    assert cells["E MAE meV"] == "6.00 ± 1.41"
    assert (cells["E+F ms"], cells["ms/step"], cells["memory MB"]) == ("8.0", "100.0", "20")
    assert (cells["parameters"], cells["lr"]) == ("60,000", "0.01")
    assert dict(zip(head, rows[1], strict=True))["F MAE meV/A"] == "26.00"
    assert "300 s of training CPU time (950 train, 50 val, 1000 test)" in group.title
    lines = markdown(head, rows).splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {len(head) + 1}
    text = aligned(head, rows, range(2, len(head))).splitlines()
    assert all(len(line) <= len(text[1]) for line in text)


def test_losses_are_said_as_plainly_as_wins_and_first(group):
    lines = verdicts(group)
    words = [line.split()[0] for line in lines]
    assert words == ["LOSES", "LOSES", "equal", "equal", "WINS"]
    assert "energy MAE: 6.00 meV against 4.00 of PAINN, 1.50 x" in lines[0]
    assert "E+F of one molecule: 8.00 ms against 6.00 of PAINN, 1.33 x" in lines[1]
    assert "force MAE: 13.00 meV/A against 26.00 of MACE, 0.50 x" in lines[-1]


def test_runs_of_other_budgets_or_frames_are_other_tables():
    one, other = record("nbody", "nbody", 1.0, 1.0), record("painn", "painn", 2.0, 2.0)
    other["point"]["training"]["budget_seconds"] = 60.0
    few = record("painn", "painn", 2.0, 2.0)
    few["point"]["data"] = {"rmd17": "aspirin", "num_train": 50}
    found = groups([one, other, few])
    assert [(g.dataset, g.limit) for g in found] == [("aspirin", "300 s"), ("aspirin", "60 s"), ("aspirin-50", "300 s")]
    assert all(verdicts(g) == [] for g in found)


def test_a_failed_run_stands_in_the_table():
    failed = record("painn", "painn", math.nan, math.nan, status="failed")
    failed |= {"test": {}, "val": {}, "latency": {}}
    (found,) = groups([record("nbody", "nbody", 1.0, 1.0), failed])
    head, rows = comparison_rows(found)
    assert dict(zip(head, rows[-1], strict=True))["F MAE meV/A"] == "failed"


def test_searches_show_every_rate_and_the_chosen_one():
    records = [
        record("painn", "painn", f, 1.0, purpose="search", lr=lr) for lr, f in ((1e-3, 9.0), (3e-3, 8.0), (1e-2, 8.5))
    ]
    records.append(record("painn", "painn", 1.0, 1.0, purpose="search", lr=0.03, status="failed"))
    head, rows = search_rows(records)
    assert head[-5:] == ["0.001", "0.003", "0.01", "0.03", "chosen"]
    assert rows == [["aspirin", "PAINN", "soap", "300 s", "9.0", "8.0", "8.5", "failed", "0.003"]]


def energies_only(name, model, energy, **point) -> dict:
    """A record of a run on QM9: no errors of forces anywhere."""
    found = record(name, model, 1.0, energy, data={"qm9": "U0", "num_train": 100}, **point)
    found["point"]["training"]["force_weight"] = 0
    for errors in (found["val"], *found["test"].values(), *(row["test"] for row in found["curve"])):
        errors.pop("forces_mae", None)
    return found


def test_energies_order_the_table_where_no_forces_are_learned():
    """The better variant of ours, by the validation, is the one that stands beside the peers."""
    records = [
        energies_only("mace", "mace", 9.0), energies_only("wide", "nbody", 7.0),
        energies_only("painn", "painn", 4.0), energies_only("deep", "nbody", 6.0),
    ]  # fmt: skip
    (found,) = groups(records)
    head, rows = comparison_rows(found)
    energy, force = (head.index(name) for name in ("E MAE meV", "F MAE meV/A"))
    assert [(row[energy], row[force]) for row in rows] == [(e, "-") for e in ("4.00", "6.00", "7.00", "9.00")]
    assert found.dataset == "U0-dimenet-100"
    assert "LOSES  energy MAE: 6.00 meV against 4.00 of PAINN, 1.50 x" in verdicts(found)
    assert not any("force" in line for line in verdicts(found))


def test_searches_without_forces_show_energies():
    records = [energies_only("painn", "painn", e, purpose="search", lr=lr) for lr, e in ((1e-3, 9.0), (3e-3, 8.0))]
    _, rows = search_rows(records)
    assert rows == [["U0-dimenet-100 (energies, meV)", "PAINN", "soap", "300 s", "9.0", "8.0", "0.003"]]


def of_target(name, model, error, target="homo", **point) -> dict:
    """A record of a run on a target of QM9, with the error in the unit of training."""
    found = record(name, model, 1.0, 1.0, data={"qm9": target, "num_train": 100}, **point)
    found["point"]["training"]["force_weight"] = 0
    key = "energy_mae" if target == "U0" else f"{target}_mae"
    errors = {key: error, "homo_r2": 0.5}
    found["val"], found["test"] = errors, {"test": errors} if found["test"] else {}
    for row in found["curve"]:
        row["test"] = {key: error * 100 / row["step"]}
    return found


def test_a_table_of_a_property_has_its_name_and_the_usual_unit():
    (found,) = groups([of_target("painn", "painn", 0.05), of_target("nbody", "nbody", 0.0401)])
    head, rows = comparison_rows(found)
    assert head[-3:] == ["homo ms", "memory MB", "homo MAE meV"]
    assert [(row[0], row[-1]) for row in rows] == [("NBODY", "40.10"), ("PAINN", "50.00")]
    assert found.dataset == "homo-dimenet-100"
    assert verdicts(found)[-1] == "WINS   homo MAE: 40.10 meV against 50.00 of PAINN, 0.80 x"
    assert not any("energy" in line or "force" in line or "E+F" in line for line in verdicts(found))
    (small,) = groups([of_target("painn", "painn", 0.0123, "mu"), of_target("nbody", "nbody", 0.0117, "mu")])
    head, rows = comparison_rows(small)
    assert head[-1] == "mu MAE D" and [row[-1] for row in rows] == ["0.0117", "0.0123"]
    assert "WINS   mu MAE: 0.0117 D against 0.0123 of PAINN, 0.95 x" in verdicts(small)


def test_a_failed_run_of_a_property_has_one_column_of_errors():
    failed = of_target("visnet", "visnet", math.nan, "mu", status="failed")
    failed |= {"test": {}, "val": {}, "latency": {}, "curve": []}
    (found,) = groups([failed, of_target("nbody", "nbody", 0.5, "mu")])
    head, rows = comparison_rows(found)
    assert [row[-1] for row in rows] == ["0.5000", "failed"] and {len(row) for row in rows} == {len(head)}


def test_one_table_over_the_targets():
    values = {"mu": 0.0301, "homo": 0.041, "r2": 0.331, "U0": 14.0}
    records = [
        of_target(m, m, e * (2 if m == "painn" else 1), t) for t, e in values.items() for m in ("nbody", "painn")
    ]
    records.append(of_target("schnet", "schnet", 0.5, "r2"))
    failed = of_target("schnet", "schnet", math.nan, "mu", status="failed")
    records.append(failed | {"test": {}, "val": {}})
    few = of_target("nbody", "nbody", 9.0, "mu")
    few["point"]["data"]["num_train"] = 50  # alone: no table of its own
    ((title, head, rows),) = target_rows(groups([*records, few]))
    assert title == "QM9, MAE by target: dimenet-100, 300 s of training CPU time (950 train, 50 val, 1000 test)"
    assert head == ["model", "optimizer", "mu D", "homo meV", "r2 a0^2", "U0 meV"]
    assert {row[0]: row[2:] for row in rows} == {
        "NBODY": ["0.0301", "41.00", "0.3310", "14.00"],
        "PAINN": ["0.0602", "82.00", "0.6620", "28.00"],
        "SCHNET": ["failed", "-", "0.5000", "-"],
    }
    assert target_rows(groups([few])) == []


def test_searches_on_a_property_say_which():
    records = [of_target("painn", "painn", e, purpose="search", lr=lr) for lr, e in ((1e-3, 0.09), (3e-3, 0.08))]
    _, rows = search_rows(records)
    assert rows == [["homo-dimenet-100 (homo, meV)", "PAINN", "soap", "300 s", "90.0", "80.0", "0.003"]]


def test_plots_of_a_property_have_its_unit(tmp_path):
    (found,) = groups([of_target("painn", "painn", 0.05), of_target("nbody", "nbody", 0.04)])
    (panel,) = learning_curves(found, tmp_path / "curves.png").axes
    assert panel.get_ylabel() == "homo MAE on test frames, meV"
    assert panel.lines[0].get_ydata().tolist() == pytest.approx([4000.0, 400.0, 40.0])
    front = pareto(found, tmp_path / "pareto.png").axes[0]
    assert (front.get_xlabel(), front.get_ylabel()) == ("homo of one molecule, CPU ms", "homo MAE, meV")
    assert {line.get_label(): line.get_ydata()[0] for line in front.lines[:2]} == {"NBODY": 40.0, "PAINN": 50.0}


def test_the_line_of_a_finished_run_names_what_was_learned():
    homo, energy = of_target("nbody", "nbody", 0.0412), energies_only("nbody", "nbody", 4.2)
    assert summary(homo) == "3000 steps, 100.0 ms each, val homo 41.20 meV, test homo 41.20 meV"
    assert summary(energy).endswith("val E 4.20 meV, test E 4.20 meV")
    assert summary(record("nbody", "nbody", 2.0, 4.0)).endswith("test E 4.00 meV F 2.00 meV/A")


def test_plots_have_a_curve_and_a_point_for_each_model(group, tmp_path):
    figure = learning_curves(group, tmp_path / "curves.png")
    left = figure.axes[0]
    assert len(left.lines) == 4  # two seeds of ours
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["NBODY", "MACE", "PAINN"]
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert left.lines[0].get_xdata().tolist() == [3.0, 30.0, 300.0]
    front = pareto(group, tmp_path / "pareto.png").axes[0]
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in front.lines[:3]}
    assert points == {"NBODY": (8.0, 13.0), "MACE": (20.0, 26.0), "PAINN": (6.0, 30.0)}
    # The front leaves out what is both slower and less accurate than another.
    assert list(front.lines[3].get_xdata()) == [6.0, 8.0]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("curves.png", "pareto.png"))


def test_plots_show_energies_where_no_forces_are_learned(tmp_path):
    records = [energies_only("painn", "painn", 4.0), energies_only("deep", "nbody", 6.0)]
    (found,) = groups(records)
    (panel,) = learning_curves(found, tmp_path / "curves.png").axes
    assert len(panel.lines) == 2 and "energy MAE" in panel.get_ylabel()
    front = pareto(found, tmp_path / "pareto.png").axes[0]
    assert "energy MAE" in front.get_ylabel()
    assert {line.get_label(): line.get_ydata()[0] for line in front.lines[:2]} == {"PAINN": 4.0, "deep: DEEP": 6.0}
