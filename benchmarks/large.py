"""Large molecules and separated charges: flat networks, hierarchies and peers with one CPU budget.

    python benchmarks/large.py --data FOLDER --sets ac_ala3_nhme --seconds 240
    python benchmarks/large.py --data FOLDER --only flat2 flat2+charges painn --seeds 0 1 2
    python benchmarks/large.py --data FOLDER --add "pieces={scheme: {name: BondTree}, sweeps: up}" --only flat2 pieces

FOLDER has the files of datasets/make_large.py. Each network is trained in a process of its own, one after another, with
the loss and the batch size that ``nbody train`` chooses from the training frames. A finished run is not run again.
NAME+charges is a network with latent charges over all pairs of atoms (``long_range``) that neighbours exchange,
NAME+own one with charges from the states of the atoms; a name of the registry of ``nbody compare`` is a peer. Errors
are means over the seeds. Step times are those of the training, with the optimizer; E+F of one frame is timed in turn
with that of flat2.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from report import arguments, show, start, write
from timing import Timing, interleave

from nbody_pyg.compare import MODELS, MissingPeer, Point, Runner
from nbody_pyg.compare.point import build
from nbody_pyg.compare.report import markdown
from nbody_pyg.messages import nearest
from nbody_pyg.required import required
from nbody_pyg.training.config import parse_config, parse_value
from nbody_pyg.training.defaults import choose_defaults
from nbody_pyg.training.loader import FrameLoader
from nbody_pyg.training.prepare import DataSets, load_data

WIDE = "32x0e + 32x1o + 32x2e"
#: Name -> section "model" of a configuration.
NETWORKS: dict[str, dict[str, Any]] = {
    "flat1": {"scheme": {"name": "NestedShells", "radii": [5.0]}},
    "flat2": {"scheme": {"name": "NestedShells", "radii": [3.5, 5.0]}},
    "flat3": {"scheme": {"name": "NestedShells", "radii": [3.5, 5.0, 5.0]}},
    "pieces": {
        "scheme": {"name": "ShellsAndPieces"},
        "irreps": {"shell 1": WIDE, "shell 2": WIDE, "pieces": "8x0e + 8x1o + 8x2e"},
    },
    "bondtree": {"scheme": {"name": "BondTree"}},
    "survivors": {"scheme": {"name": "SmoothSurvivors"}},
}
#: Every E+F time is divided by that of this network.
REFERENCE = "flat2"
#: Suffix of a name -> option ``long_range`` of the network.
CHARGES: dict[str, Any] = {"charges": "direct", "own": {"method": "direct", "states": True, "transfers": False}}
DEFAULT = ["flat1", "flat2", "flat3", *(f"flat{n}+charges" for n in (1, 2, 3)), "pieces", "bondtree", "survivors"]
#: Settings of training that the frames decide.
CHOSEN = ("energy_per", "energy_weight", "batch_size")
ERRORS = {"E meV": "energy_mae", "E meV/atom": "energy_per_atom_mae", "F meV/A": "forces_mae"}


def files(name: str, folder: Path) -> dict[str, Any]:
    """Section "data" of a set: its training, validation and test files.

    Raises: FileNotFoundError: no training file.
    """
    found = {path.stem.removeprefix(f"{name}_"): str(path) for path in sorted(folder.glob(f"{name}_*.extxyz"))}
    if not {"train", "val"} <= set(found):
        raise FileNotFoundError(f"no {name}_train.extxyz and {name}_val.extxyz in {folder}; make_large.py makes them")
    return {"train": found.pop("train"), "val": found.pop("val"), "test": found}


def model(name: str, added: Mapping[str, Any]) -> dict[str, Any] | None:
    """Section "model" of a network; None for a peer.

    Raises: ValueError: no such name.
    """
    known = {**NETWORKS, **added}
    base, _, suffix = name.partition("+")
    if name in MODELS and name != "nbody":
        return None
    if base not in known or suffix not in {"", *CHARGES}:
        raise ValueError(f"--only must hold names of networks, got {name!r}; {nearest(base, [*known, *MODELS])}")
    # None: no charges, also where nbody train would choose them
    return {"long_range": None, **known[base], **({"long_range": CHARGES[suffix]} if suffix else {})}


def added(text: str) -> tuple[str, dict[str, Any]]:
    """A network from NAME={KEY: VALUE, ...}, with the keys of the section "model"."""
    name, _, rest = text.partition("=")
    arguments = parse_value(rest, "--add")
    if not name or not isinstance(arguments, dict):
        raise ValueError(f"--add must be NAME={{KEY: VALUE}}, got {text!r}; try 'wide={{channels: 48}}'")
    return name, arguments


def prepare(name: str, folder: Path, seconds: float) -> tuple[dict[str, Any], dict[str, Any], DataSets]:
    """Sections "data" and "training" that all networks share, and the frames."""
    section = files(name, folder)
    config = parse_config({"data": section, "model": {}, "training": {"budget_seconds": seconds}})
    data = load_data(config.data)
    if all(torch.equal(frame.z, data.train[0].z) for frame in data.train):
        section["one_molecule"] = True
    chosen = choose_defaults(config, data)[0].training
    return section, {key: getattr(chosen, key) for key in CHOSEN} | {"budget_seconds": seconds}, data


def point(name: str, arguments: dict[str, Any] | None, data: dict, training: dict, seed: int) -> Point:
    """The run of one network; rates of peers are those of the registry."""
    kind = name if arguments is None else "nbody"
    entry = MODELS[kind]
    rates = {"optimizer": entry.optimizer, "lr": entry.lr[entry.optimizer], "seed": seed}
    return Point(name, entry.title, kind, arguments or {}, data, {**training, **rates})


def evaluation_times(points: Mapping[str, Point], data: DataSets, seconds: float) -> dict[str, Timing]:
    """E+F of the first validation frame, fresh weights, the networks in turn."""
    calls = {}
    for name, one in points.items():
        config = one.config(Path())
        potential = build(one, config, data).eval()
        ready = DataSets(data.train[:1], data.val[:1]).with_topology(
            required(potential.scheme), config.data.shares_hierarchy
        )
        batch = FrameLoader(ready.val).batch([0])
        calls[name] = lambda potential=potential, batch=batch: potential(batch)
    return interleave(calls, seconds)


def rows_of(records: list[dict[str, Any]], times: Mapping[str, Timing], sets: list[str]) -> list[list[Any]]:
    """A row for each network, the means over its seeds."""
    rows = []
    for name in dict.fromkeys(record["point"]["name"] for record in records):
        done = [record for record in records if record["point"]["name"] == name and record["status"] == "done"]
        if not done:
            rows.append([name, "failed", *[None] * (len(head(sets)) - 2)])
            continue
        errors = [{"val": record["val"], **record["test"]} for record in done]
        timing = times[name]
        rows.append([
            name, len(done), done[0]["parameters"], round(statistics.fmean(r["steps"] for r in done)),
            1e3 * statistics.fmean(r["cpu_seconds"] / r["steps"] for r in done), 1e3 * timing.median,
            timing.over(times[REFERENCE]),
            *(statistics.fmean(found[part][key] for found in errors) for part in sets for key in ERRORS.values()),
        ])  # fmt: skip
    return rows


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def head(sets: list[str]) -> list[str]:
    columns = ["network", "seeds", "parameters", "steps", "step ms", "E+F ms", f"x {REFERENCE}"]
    return [*columns, *(f"{part} {title}" for part in sets for title in ERRORS)]


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "large.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of datasets/make_large.py")
    parser.add_argument("--sets", nargs="+", default=["ac_ala3_nhme"], help="kinds of that script")
    parser.add_argument("--only", nargs="+", default=DEFAULT, metavar="NAME", help="networks and peers")
    parser.add_argument("--add", nargs="+", default=[], metavar="NAME={...}", help="networks of your own, YAML")
    parser.add_argument("--seconds", type=float, default=240.0, help="CPU time of training for each network")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--timing", type=float, default=10.0, help="CPU seconds for the times of E+F")
    args = parser.parse_args(argv)
    extra = dict(added(text) for text in args.add)
    networks = {name: model(name, extra) for name in dict.fromkeys([*args.only, *extra])}
    runner, results, pages, missing = Runner(args.out.parent / "large"), [], [], {}
    with start():
        for kind in args.sets:
            section, training, data = prepare(kind, args.data, args.seconds)
            points, records = {}, []
            for seed in args.seeds:
                for name, network in networks.items():
                    one = point(name, network, section, training, seed)
                    try:
                        records.append(runner(one))
                        points[name] = one
                    except MissingPeer as error:
                        missing[name] = str(error)
            reference = {REFERENCE: point(REFERENCE, model(REFERENCE, {}), section, training, 0)}
            times = evaluation_times(reference | points, data, args.timing)
            sets = ["val", *section["test"]]
            rows = rows_of(records, times, sets)
            title = f"{kind}: {len(data.train)} training frames, {args.seconds:g} CPU s, {training}"
            show(title, head(sets), rows)
            pages.append(f"{title}\n\n{markdown(head(sets), [[cell(value) for value in row] for row in rows])}")
            results.append({
                "set": kind, "training": training, "records": records,
                "times": {name: timing.as_dict() for name, timing in times.items()},
            })  # fmt: skip
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    write(args.out, {"results": results, "missing": missing})
    args.out.with_suffix(".md").write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
