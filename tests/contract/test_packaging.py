"""The files that describe the package agree with each other and with the code."""

from __future__ import annotations

import ast
import configparser
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nbody_pyg
from nbody_pyg.compare.registry import MODELS

# The name one imports -> the name one installs, where they differ
DISTRIBUTIONS = {
    "mace": "mace-torch",
    "torchmdnet": "torchmd-net",
    "warp": "warp-lang",
    "yaml": "PyYAML",
    "torch_scatter": "torch-scatter",
    "torch_geometric": "torch-geometric",
    "torchpme": "torch-pme",
}
# Sections and keys of setup.cfg -> where pyproject.toml has the same thing
TWINS = {
    "metadata": ("project",),
    "options": ("project",),
    "options.extras_require": ("project", "optional-dependencies"),
    "options.entry_points": ("project", "scripts"),
    "options.package_data": ("tool", "setuptools", "package-data"),
    "tool:pytest": ("tool", "pytest"),
    "coverage:run": ("tool", "coverage", "run"),
    "coverage:report": ("tool", "coverage", "report"),
    "mypy": ("tool", "mypy"),
    "ruff": ("tool", "ruff"),
}
# Removed from PyTorch Geometric, on no index, or not needed
FORBIDDEN = {"torch_cluster", "torch_sparse", "torch_spline_conv", "pyg_lib"}


@pytest.fixture(scope="module")
def pyproject(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def requirements(pyproject) -> dict[str, Requirement]:
    project = pyproject["project"]
    lines = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


@pytest.fixture(scope="module")
def constraints(root) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins), "constraints.txt holds exact pins only"
    return dict(pin.split("==") for pin in pins)


def test_setup_cfg_repeats_nothing(root, pyproject):
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    twice = []
    for section in setup.sections():
        table = pyproject
        for key in TWINS.get(section, ("tool", section)):
            table = table.get(key, {})
        if section in TWINS and not table:
            continue
        twice += [f"[{section}] {key}" for key in setup[section] if key in table or key.replace("_", "-") in table]
    assert not twice, f"these stand in setup.cfg and in pyproject.toml: {twice}"


def test_setup_cfg_has_only_what_pyproject_cannot_have(root):
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    readable = sorted(set(setup.sections()) & set(TWINS))
    assert not readable, f"these tools read pyproject.toml: {readable}"


def test_the_line_length_is_one(root, pyproject):
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    assert setup.getint("pycodestyle", "max-line-length") == pyproject["tool"]["ruff"]["line-length"]


def test_versions_agree(root):
    version = nbody_pyg.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)


def test_torch_is_the_first_constraint(constraints):
    assert next(iter(constraints)) == "torch", "set-up installs the first line before everything else"


def test_constraints_lie_within_the_ranges(requirements, constraints, pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    # Installed by who uses them, not by the set-up of this project
    unpinned = ("compare", "learn", "log", "qm9")
    optional = {canonicalize_name(Requirement(line).name) for name in unpinned for line in extras[name]}
    missing = sorted(set(requirements) - set(constraints) - optional)
    assert not missing, f"no exact version in constraints.txt for {missing}"
    outside = [
        f"{requirement} does not admit {constraints[name]}"
        for name, requirement in requirements.items()
        if name in constraints and not requirement.specifier.contains(constraints[name])
    ]
    assert not outside, outside


def _third_party(tree: ast.Module):
    """Top-level names imported from outside, with the line and whether it is at module level."""
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Try))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"nbody_pyg"}:
            yield name, node.lineno, node not in lazy


def test_imports_are_declared(sources, pyproject, requirements):
    required = {canonicalize_name(Requirement(line).name) for line in pyproject["project"]["dependencies"]}
    wrong = []
    for module, tree in sources.items():
        for name, line, at_import in _third_party(tree):
            distribution = canonicalize_name(DISTRIBUTIONS.get(name, name))
            if at_import and distribution not in required:
                wrong.append(f"{module}:{line} needs {name} to be imported, which is no dependency")
            elif distribution not in requirements and not _is_peer(module, distribution):
                wrong.append(f"{module}:{line} imports {name}, which stands in no extra")
    assert not wrong, "\n".join(wrong)


def _is_peer(module: str, distribution: str) -> bool:
    """Peers pin versions that contradict each other, so that no extra can hold them: the registry has their lines."""
    lines = " ".join(found.install for found in MODELS.values()).split()
    return module.startswith("nbody_pyg.compare.adapters.") and distribution in lines


def test_dependencies_are_used(sources, pyproject):
    required = {canonicalize_name(Requirement(line).name) for line in pyproject["project"]["dependencies"]}
    used = {
        canonicalize_name(DISTRIBUTIONS.get(name, name))
        for tree in sources.values()
        for name, _, _ in _third_party(tree)
    }
    assert not required - used, f"declared, but imported nowhere: {sorted(required - used)}"


def test_forbidden_packages_are_not_imported(sources):
    wrong = [
        f"{module}:{line} {name}"
        for module, tree in sources.items()
        for name, line, _ in _third_party(tree)
        if name in FORBIDDEN
    ]
    assert not wrong, wrong


def test_the_package_is_typed_and_has_no_junk_drawer(root, sources):
    assert (root / "nbody_pyg" / "py.typed").is_file()
    drawers = [name for name in sources if name.split(".")[-1] in {"utils", "helpers", "misc", "common"}]
    assert not drawers, f"a helper lives with its reason: {drawers}"


def test_future_annotations_everywhere(sources):
    missing = [
        name
        for name, tree in sources.items()
        if any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree))
        and not any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)
    ]
    assert not missing, f"from __future__ import annotations is missing in {missing}"
