"""Nothing in the package reads or writes pickles: a model file from a stranger can run no code."""

from __future__ import annotations

import ast

PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def _calls(tree: ast.Module):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            yield ast.unparse(node.func), keywords, node.lineno


def _imported(tree: ast.Module):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], node.lineno


def test_no_pickler_is_imported(sources):
    wrong = [f"{n}:{line} {m}" for n, tree in sources.items() for m, line in _imported(tree) if m in PICKLERS]
    assert not wrong, wrong


def test_files_are_loaded_without_pickle(sources):
    wrong = []
    for name, tree in sources.items():
        for function, keywords, line in _calls(tree):
            if function == "torch.load" and keywords.get("weights_only") != "True":
                wrong.append(f"{name}:{line} torch.load without weights_only=True")
            if keywords.get("allow_pickle") == "True":
                wrong.append(f"{name}:{line} {function} with allow_pickle=True")
            if function.endswith("load_from_checkpoint") and keywords.get("weights_only") != "True":
                wrong.append(f"{name}:{line} load_from_checkpoint without weights_only=True")
    assert not wrong, "\n".join(wrong)


def test_the_switch_that_turns_weights_only_off_is_not_touched(root):
    wrong = [
        str(path.relative_to(root))
        for path in (root / "nbody_pyg").rglob("*.py")
        if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in path.read_text(encoding="utf-8")
    ]
    assert not wrong, wrong
