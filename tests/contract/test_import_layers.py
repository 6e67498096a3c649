"""Imports inside the package point downwards only, and form no cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

# A part may import from the parts above it in this list, never from those below
LAYERS = [
    "durable",
    "messages",
    "units",
    "kernels",
    "data",
    "geometry",
    "radial",
    "multipoles",
    "hierarchy",
    "nn",
    "models",
    "explain",
    "potential",
    "recording",
    "accelerate",
    "graphs",
    "properties",
    "datasets",
    "training",
    "compare",
    "deploy",
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


def _in_functions(tree: ast.Module) -> set[ast.AST]:
    """Everything that is executed only when a function is called."""
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    return {inner for function in functions for inner in ast.walk(function)}


def _imports(name: str, tree: ast.Module, names: set[str], lazy: bool = True) -> Iterator[tuple[str, int]]:
    """Modules of the package that a module imports, with the line; ``lazy`` counts those inside functions."""
    is_package = any(other.startswith(name + ".") for other in names)
    hidden = _type_checking_only(tree) | (set() if lazy else _in_functions(tree))
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


def test_imports_form_no_cycle(sources):
    names = set(sources)
    graph = {
        # A package's __init__ gathers its modules, and they may import each other: leave it out
        name: {target for target, _ in _imports(name, tree, names, lazy=False) if target != name}
        for name, tree in sources.items()
        if not any(other.startswith(name + ".") for other in names)
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError("a cycle of imports: " + " -> ".join(error.args[1])) from None


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
