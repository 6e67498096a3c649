"""Imports inside the package point downwards only, and form no cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

# A part may import from the parts above it in this list, never from those below
LAYERS = [
    "atomic_write",
    "interrupt",
    "lazy_imports",
    "messages",
    "renamed",
    "required",
    "units",
    "kernels",
    "data",
    "geometry",
    "system",
    "radial",
    "multipoles",
    "hierarchy",
    "nn",
    "longrange",
    "models",
    "explain",
    "network",
    "energy",
    "potential",
    "runtime",
    "native",
    "compiled",
    "cuda_graphs",
    "accelerate",
    "graphs",
    "properties",
    "io",
    "datasets",
    "deploy",
    "training",
    "compare",
    "active",
    "engines",
    "testing",
    "cli",
    "__main__",
]


def _layer(module: str) -> str:
    """The part of the package that a module belongs to; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def _type_checking_only(tree: ast.Module) -> set[ast.AST]:
    """Everything under ``if TYPE_CHECKING:``, which is never executed."""
    hidden = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            hidden.update(inner for statement in node.body for inner in ast.walk(statement))
    return hidden


def _imports(name: str, tree: ast.Module, names: set[str]) -> Iterator[tuple[str, int]]:
    """Modules of the package that a module imports, with the line; those inside functions count like any other."""
    is_package = any(other.startswith(name + ".") for other in names)
    hidden = _type_checking_only(tree)
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "nbody_pyg":
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = name.split(".") if is_package else name.split(".")[:-1]
                anchor = anchor[: len(anchor) - node.level + 1]
                base = ".".join(anchor + ([base] if base else []))
            if base.split(".")[0] != "nbody_pyg":
                continue
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full in names or (base == "nbody_pyg" and alias.name in LAYERS):
                    yield full, node.lineno
                elif (base, alias.name) != ("nbody_pyg", "__version__"):
                    yield base, node.lineno


def test_every_module_has_a_layer(sources):
    strangers = sorted({_layer(name) for name in sources} - set(LAYERS) - {""})
    assert not strangers, f"{strangers} stand in no layer: say where imports may point, in LAYERS of this file"


def test_imports_point_downwards(sources):
    wrong = []
    for name, tree in sources.items():
        if not (here := _layer(name)):
            continue
        for target, line in _imports(name, tree, set(sources)):
            there = _layer(target)
            if not there:
                wrong.append(f"{name}:{line} imports the package itself; import the module that has the name")
            elif there != here and LAYERS.index(there) > LAYERS.index(here):
                wrong.append(f"{name}:{line} imports {target}, which stands above it")
    assert not wrong, "\n".join(wrong)


def _cycle(sources: dict[str, ast.Module]) -> list[str]:
    """Modules that import each other in a circle; empty where there is none.

    The package itself is left out: it names the modules below only when asked for one of its names.
    """
    names = set(sources)
    graph = {
        name: {target for target, _ in _imports(name, tree, names) if target not in (name, "nbody_pyg")}
        for name, tree in sources.items()
        if name != "nbody_pyg"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_form_no_cycle(sources):
    assert not (cycle := _cycle(sources)), "a cycle of imports: " + " -> ".join(cycle)


@pytest.mark.parametrize("where", ["", "def f():\n    ", "class C:\n    def f(self):\n        ", "try:\n    "])
def test_a_cycle_is_found_wherever_the_import_stands(where):
    """An import inside a function closes a circle too: it only hides it from the interpreter."""
    last = "\nexcept ImportError:\n    pass" if where.startswith("try") else ""
    sources = {
        "nbody_pyg": ast.parse("from nbody_pyg.data import AtomicData"),
        "nbody_pyg.data": ast.parse("from nbody_pyg import geometry"),
        "nbody_pyg.geometry": ast.parse("from nbody_pyg.radial import window"),
        "nbody_pyg.radial": ast.parse(f"{where}from nbody_pyg.data import AtomicData{last}"),
    }
    assert set(_cycle(sources)) == {"nbody_pyg.data", "nbody_pyg.geometry", "nbody_pyg.radial"}
    harmless = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nbody_pyg.data import AtomicData"
    assert _cycle(sources | {"nbody_pyg.radial": ast.parse(harmless)}) == []


def test_only_the_potential_differentiates(sources):
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in sources.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in {"torch.autograd.grad", "autograd.grad", "torch.func.grad"}
        # The update takes derivatives that are not compiled from plain torch: a backward pass, not a force
        and name not in {"nbody_pyg.potential", "nbody_pyg.kernels.update"}
    ]
    assert not wrong, f"autograd.grad belongs to nbody_pyg.potential alone, found in {wrong}"


def test_one_module_differentiates(sources):
    """Kernels differentiate their own formulas; of the energy only nbody_pyg.potential takes derivatives."""
    found = {
        name
        for name, tree in sources.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("autograd.grad", "autograd.backward"))
    }
    assert found == {"nbody_pyg.potential", "nbody_pyg.kernels.update"}
