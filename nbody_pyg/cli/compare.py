"""nbody compare: our network and its peers, or variants of it, under one protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbody_pyg.compare.config import compare_parser, load_compare
from nbody_pyg.compare.plots import learning_curves, pareto
from nbody_pyg.compare.protocol import Outcome
from nbody_pyg.compare.protocol import compare as carry_out
from nbody_pyg.compare.report import (
    Group,
    aligned,
    comparison_rows,
    groups,
    load_records,
    markdown,
    search_rows,
    verdicts,
)
from nbody_pyg.compare.runner import Runner, Stopped


def compare(path: str | None, words: Sequence[str] = (), wants_help: bool = False) -> int:
    """Run what the configuration file and the options describe; returns the exit status."""
    if wants_help:
        compare_parser().print_help()
        return 0
    config = load_compare(path, words)
    out = Path(config.out)
    if config.report:
        records = load_records(out)
        if not records:
            raise FileNotFoundError(f"no finished run in {out}; leave --report away to run the comparison")
        return _show(Outcome([r for r in records if _is(r, "search")], [r for r in records if _is(r, "final")]), out)
    runner = Runner(out, config.python, config.isolate, note=lambda line: print(line, flush=True))
    try:
        outcome = carry_out(config, runner, note=lambda line: print(line, flush=True))
    except Stopped as stopped:
        print(stopped)
        return stopped.status
    return _show(outcome, out)


def _is(record: dict[str, Any], purpose: str) -> bool:
    return record["point"]["purpose"] == purpose


def _show(outcome: Outcome, out: Path) -> int:
    """Print the tables, write them with the records and plots."""
    out.mkdir(parents=True, exist_ok=True)
    page = []
    if outcome.searches:
        head, rows = search_rows(outcome.searches)
        title = "Search: MAE on the validation frames, of forces (meV/A) where nothing else is said"
        print(f"\n{title}\n{aligned(head, rows)}")
        page += [f"### {title}", markdown(head, rows)]
    for group in groups(outcome.finals):
        head, rows = comparison_rows(group)
        lines = verdicts(group)
        print(f"\n{group.title}\n{aligned(head, rows)}\n")
        print(*(f"  {line}" for line in lines), sep="\n")
        page += [f"### {group.title}", markdown(head, rows), *(f"- {line}" for line in lines)]
        page += _draw(group, out)
    for name, reason in outcome.missing.items():
        print(f"missing: {name}: {reason}")
        page.append(f"- missing: {name}: {reason}")
    (out / "table.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    records = {"searches": outcome.searches, "finals": outcome.finals, "missing": outcome.missing}
    (out / "results.json").write_text(json.dumps(records, indent=1, default=float) + "\n", encoding="utf-8")
    print(f"\nwritten to {out}: table.md, results.json, {', '.join(sorted(p.name for p in out.glob('*.png')))}")
    return 0 if outcome.searches or outcome.finals else 1


def _draw(group: Group, out: Path) -> list[str]:
    stem = f"{group.dataset}-{group.limit}".replace(" ", "")
    learning_curves(group, out / f"curves-{stem}.png")
    pareto(group, out / f"pareto-{stem}.png")
    return [f"![learning curves](curves-{stem}.png) ![error against time](pareto-{stem}.png)"]
