"""nbody compare: train our network and other models, or variants of it, under one protocol."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbody_pyg.atomic_write import write_json, write_text
from nbody_pyg.cli.arguments import require_device
from nbody_pyg.compare.config import CompareConfig, load_compare
from nbody_pyg.compare.contestants import contestants
from nbody_pyg.compare.plots import learning_curves, pareto
from nbody_pyg.compare.protocol import Outcome
from nbody_pyg.compare.protocol import compare as carry_out
from nbody_pyg.compare.report import (
    Group,
    comparison_rows,
    failures,
    groups,
    load_records,
    markdown,
    search_rows,
    target_rows,
    verdicts,
)
from nbody_pyg.compare.runner import Runner, Stopped
from nbody_pyg.messages import aligned
from nbody_pyg.training.config import parse_config
from nbody_pyg.training.prepare import explicit

#: Exit status when a run failed, or a model is missing.
FAILED = 3


def compare(path: str | None, words: Sequence[str] = ()) -> int:
    """Run what the configuration file and the options describe; returns the exit status."""
    config = load_compare(path, words)
    out = Path(config.out)
    if config.report:
        records = load_records(out)
        if not records:
            raise FileNotFoundError(f"no finished run in {out}; leave --report out to run the comparison")
        return _show(Outcome([r for r in records if _is(r, "search")], [r for r in records if _is(r, "final")]), out)
    _check(config)
    runner = Runner(out, config.python, config.isolate, lambda line: print(line, flush=True), config.timeout)
    try:
        outcome = carry_out(config, runner, note=lambda line: print(line, flush=True))
    except Stopped as stopped:
        print(stopped)
        return stopped.status
    return _show(outcome, out)


def _check(config: CompareConfig) -> None:
    """Find mistakes in the settings of all models before the first run."""
    if (device := config.training.get("device")) not in (None, "auto"):
        require_device(device)
    for name, python in config.python.items():
        if shutil.which(python) is None:
            raise ValueError(f"python: cannot run {python!r} for {name}; give the interpreter of its environment")
    for each in contestants(config):
        model = dict(each.arguments) if each.model == "nbody" else {}
        training = {**config.training, **each.training, "max_steps": 1}
        data = config.datasets()[0]
        explicit(parse_config({"data": dict(data), "training": training, "model": model}).model)


def _is(record: dict[str, Any], purpose: str) -> bool:
    return bool(record["point"]["purpose"] == purpose)


def _show(outcome: Outcome, out: Path) -> int:
    """Print the tables; write them, the records and the plots."""
    out.mkdir(parents=True, exist_ok=True)
    records = {"searches": outcome.searches, "finals": outcome.finals, "missing": outcome.missing}
    _keep_others(records, out)
    page: list[str] = []
    plots: list[str] = []
    if outcome.searches:
        head, rows = search_rows(outcome.searches)
        title = "Search: MAE on the validation frames, of forces (meV/A) unless stated"
        print(f"\n{title}\n{aligned(head, rows, range(2, len(head)))}")
        page += [f"### {title}", markdown(head, rows)]
    found = groups(outcome.finals)
    for title, head, rows in target_rows(found):
        print(f"\n{title}\n{aligned(head, rows, range(2, len(head)))}")
        page += [f"### {title}", markdown(head, rows)]
    for group in found:
        head, rows = comparison_rows(group)
        lines = verdicts(group)
        if not group.tests and any(record["status"] != "failed" for row in group.rows for record in row.records):
            lines.append("no test frames, so no errors: give some with data.test, or set data.num_train")
        print(f"\n{group.title}\n{aligned(head, rows, range(2, len(head)))}\n")
        print(*(f"  {line}" for line in lines), sep="\n")
        page += [f"### {group.title}", markdown(head, rows), *(f"- {line}" for line in lines)]
        names = _draw(group, out, taken=plots)
        page.append(f"![learning curves]({names[0]}) ![error against time]({names[1]})")
        plots += names
    failed = [
        *failures([*outcome.searches, *outcome.finals]),
        *(f"missing: {name}: {reason}" for name, reason in outcome.missing.items()),
    ]
    print(*failed, sep="\n")
    page += [f"- {line}" for line in failed]
    write_text(out / "table.md", "\n\n".join(page) + "\n")
    write_json(out / "results.json", records, default=float)
    print(f"\nwritten to {out}: {', '.join(['table.md', 'results.json', *sorted(plots)])}")
    return FAILED if failed else 0


def _keep_others(records: dict[str, Any], out: Path) -> None:
    """Rename earlier tables if they hold runs that are not among these."""

    def runs(found: Any) -> set[str]:
        each = [*found["searches"], *found["finals"]]
        return {json.dumps(record["point"], sort_keys=True, default=str) for record in each}

    try:
        before = runs(json.loads((out / "results.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):  # damaged, or written by another program
        before = {"unknown"}
    if before <= runs(json.loads(json.dumps(records, default=float))):
        return
    number = next(n for n in itertools.count(1) if not (out / f"results-{n}.json").exists())
    for name in ("results.json", "table.md"):
        if (out / name).exists():
            kept = (out / name).with_stem(f"{Path(name).stem}-{number}")
            (out / name).replace(kept)
            print(f"{out / name} holds other runs; it is kept as {kept.name}")


def _draw(group: Group, out: Path, taken: Sequence[str]) -> list[str]:
    stem = f"{group.dataset}-{group.limit}".replace(" ", "")
    # Two groups may have the same names of frames and limit
    ends = itertools.chain([""], (f"-{n}" for n in itertools.count(1)))
    end = next(e for e in ends if f"curves-{stem}{e}.png" not in taken)
    names = [f"{kind}-{stem}{end}.png" for kind in ("curves", "pareto")]
    learning_curves(group, out / names[0])
    pareto(group, out / names[1])
    return names
