"""Vectors of the compiled code: as wide as the registers of the machine, with the same results."""

from __future__ import annotations

import gc
import platform
import shutil
import subprocess
import sys

import pytest

from nbody_pyg import BondTree, NBodyNet, NestedShells
from nbody_pyg.kernels import codegen
from nbody_pyg.kernels.codegen import EdgeProduct, Term
from nbody_pyg.kernels.library import Library
from nbody_pyg.kernels.panels import panels_source

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="options of gcc for x86-64"),
]
#: Options of gcc that take wider registers away.
MACHINES = {"this machine": [], "AVX2": ["-mno-avx512f"], "SSE": ["-mno-avx"]}
TERMS = [Term(0, 0, 0, 0, 1.0), Term(1, 1, 0, 1, 0.5), Term(1, 0, 1, 1, -2.0), Term(2, 1, 1, 1, 0.25)]
#: A network in both backends; its channels are no multiple of any vector.
COMPARE = """
import torch
from nbody_pyg import NBodyNet, NestedShells, Potential
from nbody_pyg.kernels import backend, use_backend
torch.manual_seed(0)
z, pos = torch.tensor([8, 1, 6, 1, 1, 1]), 2.0 * torch.rand(6, 3).double()
net = NBodyNet([1, 6, 8], NestedShells((3.0, 4.0)), channels=23, lmax=1, correlation=2)
for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-3)):
    potential, found = Potential(net).to(dtype), []
    for name in ("torch", "c"):
        with use_backend(name):
            assert backend(torch.zeros(1, dtype=dtype)) == name
            result = potential(z, pos.to(dtype), create_graph=True)
            weights = [w for w in potential.parameters() if w.requires_grad]
            loss = result["forces"].square().sum()
            slopes = torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)
            found.append([result["energy"], result["forces"], *slopes])
    assert float(found[0][1].detach().abs().max()) > 1e-3
    for plain, compiled in zip(*found, strict=True):
        scale = float(plain.detach().abs().max()) + 1e-6
        torch.testing.assert_close(compiled / scale, plain / scale, rtol=tolerance, atol=tolerance)
"""


def _compiled(source: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    """gcc, for which a vector that fits into no register is an error."""
    flags = ["-O1", "-march=native", *options, "-Wvector-operation-performance", "-Werror=vector-operation-performance"]
    command = ["gcc", *flags, "-shared", "-fPIC", "-x", "c", "-", "-o", "/dev/null"]
    return subprocess.run(command, input=source, text=True, capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", ["float", "double"])
def test_no_vector_is_wider_than_the_registers(machine, dtype):
    product = codegen.product_source(TERMS, 2, 2, 3)
    edges = codegen.one_body_source(EdgeProduct(TERMS, 2, 2, 3, 2, 4))
    assert "TAIL_LOOP" in product and "TAIL_LOOP" in edges
    for source in (panels_source(), product, edges):
        found = _compiled(codegen.prelude(dtype, source) + source, MACHINES[machine])
        assert found.returncode == 0, found.stderr


def test_the_check_rejects_wide_vectors():
    source = codegen.prelude("float").replace("BYTES 16", "BYTES 32") + panels_source()
    found = _compiled(source, MACHINES["SSE"])
    assert found.returncode != 0 and "vector operation will be expanded" in found.stderr


#: Errors of gcc from version 14 and of clang from version 16; our own builds silence warnings, so nothing told of them.
ERRORS = ["int-conversion", "incompatible-pointer-types", "implicit-function-declaration", "implicit-int"]


def _accepted(source: str) -> str:
    """What gcc says to a source that newer compilers would refuse; empty if nothing."""
    command = ["gcc", "-fsyntax-only", "-march=native", "-fopenmp", *(f"-Werror={name}" for name in ERRORS)]
    found = subprocess.run([*command, "-x", "c", "-"], input=source, text=True, capture_output=True, check=False)
    return found.stderr if found.returncode else ""


def test_newer_compilers_accept_every_source():
    _alive = [  # while their sources are looked for
        NBodyNet([1, 6, 8], NestedShells((3.0, 4.0)), channels=5, lmax=1, correlation=2),
        NBodyNet([1, 6], BondTree(), channels=16, lmax=1, preset="strict"),
    ]
    sources = {found.source for found in gc.get_objects() if type(found) is Library}
    assert len(sources) > 10
    for source in sources:
        assert not _accepted(codegen.prelude("double", source) + source)
    wrong = "static void takes(const real* x) {} void passes(int64_t n) { takes(n); }"
    assert "int-conversion" in _accepted(codegen.prelude("double") + wrong)


@pytest.mark.slow
def test_narrow_registers_give_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("NBODY_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", " ".join(["gcc", *MACHINES["SSE"]]))
    found = subprocess.run([sys.executable, "-c", COMPARE], text=True, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr
