"""Compiled operations shared among threads: the same bits for any number of them, after a fork, and without OpenMP."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import pytest
import torch

from nbody_pyg import BondTree, NBodyNet, NestedShells, Potential
from nbody_pyg.kernels import build, set_backend, threads
from nbody_pyg.kernels.codegen import prelude
from nbody_pyg.kernels.threads import Argument, in_blocks
from nbody_pyg.nn.irreps import hidden_irreps
from nbody_pyg.nn.products import ChannelwiseProduct

pytestmark = pytest.mark.skipif(build.broken() is not None, reason="no C compiler")


@pytest.fixture(autouse=True)
def _as_before():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
    set_backend("auto")


def chain(atoms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A coil of carbon, hydrogen and oxygen, in an order that is not that of space."""
    t = torch.arange(atoms, dtype=torch.float64)
    pos = torch.stack([2.0 * torch.cos(0.7 * t), 2.0 * torch.sin(0.7 * t), 0.35 * t], dim=1)
    mixed = torch.randperm(atoms, generator=torch.Generator().manual_seed(0))
    z = torch.tensor([6, 1, 8]).repeat(atoms // 3 + 1)[:atoms]
    return z[mixed], pos[mixed]


def everything(potential: Potential, z: torch.Tensor, pos: torch.Tensor) -> list[torch.Tensor]:
    """Energy, forces, and the gradients of a loss with forces by all weights."""
    result = potential(z, pos, create_graph=True)
    loss = result["energy"].sum() + result["forces"].square().sum()
    weights = [p for p in potential.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, weights, materialize_grads=True)
    return [result["energy"].detach(), result["forces"].detach(), *found]


def potential(scheme, dtype=torch.float64, channels: int = 4) -> Potential:
    torch.manual_seed(0)
    return Potential(NBodyNet([1, 6, 8], scheme, channels=channels, lmax=1, num_basis=4), {1: 0.0, 6: 0.0, 8: 0.0}).to(
        dtype
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", [NestedShells(), BondTree()])
def test_results_have_the_same_bits_for_any_number_of_threads(scheme, dtype):
    model, (z, pos) = potential(scheme, dtype), chain(210)
    set_backend("c")
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(everything(model, z, pos))
    assert all(t.abs().max() > 0 for t in results[0][:2]) and sum(t.abs().max() > 0 for t in results[0]) > 10
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_several_threads_agree_with_plain_torch():
    model, (z, pos) = potential(NestedShells()), chain(210)
    torch.set_num_threads(3)
    results = []
    for name in ("torch", "c"):
        set_backend(name)
        results.append(everything(model, z, pos))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * float(a.abs().max() + 1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="fork warns where there are threads")
def test_a_forked_process_goes_on_alone():
    """OpenMP would wait for threads that only the parent has."""
    irreps = hidden_irreps(4, 1)
    product = ChannelwiseProduct(irreps, irreps, irreps).double()
    x = torch.randn(2000, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(2)
    set_backend("c")
    wanted = product(x, x)
    assert wanted.abs().max() > 0
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if torch.equal(product(x, x), wanted) and threads.num_threads() == 1 else 1)
        except BaseException:
            os._exit(2)
    end = time.monotonic() + 60
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(found[1]) == 0
    assert threads.num_threads() == 2 and torch.equal(product(x, x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_of_products_in_several_threads(dtype):
    """Of a product on its own, outside of an update."""
    irreps = hidden_irreps(4, 1)
    product = ChannelwiseProduct(irreps, irreps, irreps).to(dtype)
    generator, results = torch.Generator().manual_seed(0), []
    x, y = (torch.randn(700, 4, 4, dtype=dtype, generator=generator).requires_grad_() for _ in range(2))
    for name, count in (("torch", 1), ("c", 1), ("c", 3)):
        torch.set_num_threads(count)
        set_backend(name)
        first = torch.autograd.grad(product(x, y).square().sum(), (x, y), create_graph=True)
        results.append([*first, *torch.autograd.grad((first[0] * first[1]).sum(), (x, y))])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for plain, one, three in zip(*results, strict=True):
        assert plain.abs().max() > 1
        torch.testing.assert_close(one, plain, rtol=tolerance, atol=tolerance * float(plain.detach().abs().max()))
        assert torch.equal(one, three)


def test_arguments_must_not_hide_variables():
    with pytest.raises(ValueError, match="arguments of count must not be called block"):
        in_blocks("count", "E", [*ARGUMENTS, Argument("const real*", "block", "1")], 8)


SUMS = """
static void count_rows(int64_t E, const int64_t* index, const real* x, real* out, real* all) {
  for (int64_t e = 0; e < E; e++) { out[2 * index[e]] += x[e]; out[2 * index[e] + 1] += 1; if (all) all[0] += x[e]; } }
"""
ARGUMENTS = [
    Argument("const int64_t*", "index", "1"),
    Argument("const real*", "x", "1"),
    Argument("real*", "out", total="2", node="index[e]"),
    Argument("real*", "all", total="1"),
]


NODES = {
    "mixed": lambda edges: (torch.arange(edges) * 7) % 20 + 3,
    "in order": lambda edges: torch.arange(edges) * 20 // max(edges, 1) + 3,
    "one of many edges": lambda edges: torch.arange(edges).clamp(900) - 895,
}


@pytest.mark.parametrize("memory", ["enough", "none"])
@pytest.mark.parametrize("edges", [0, 3, 1000])
@pytest.mark.parametrize("nodes", NODES)
def test_blocks_add_up(nodes, edges, memory):
    """Also where there is no memory for sums of their own, and where a node has the edges of many blocks."""
    source = prelude("double") + SUMS + in_blocks("count", "E", ARGUMENTS, 8)
    if memory == "none":
        source = source.replace("malloc(", "no_memory(").replace(
            SUMS, "static void* no_memory(int64_t size) { return 0; }" + SUMS
        )
    library = build.load(source)
    index = NODES[nodes](edges)
    x = torch.arange(edges, dtype=torch.float64) + 1
    results = []
    for count in (1, 4):
        out, total = torch.zeros(200, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (index, x, out, total)]
        library.count(ctypes.c_int64(count), ctypes.c_int64(edges), *pointers)
        library.count(ctypes.c_int64(count), ctypes.c_int64(edges), *pointers[:3], None)
        wanted = torch.zeros(200, 2, dtype=torch.float64)
        wanted.index_add_(0, index, torch.stack([x, torch.ones_like(x)], dim=1))
        assert torch.equal(out, 2 * wanted) and total == x.sum()
        results.append(out)
    assert torch.equal(*results)


def test_a_compiler_without_openmp(monkeypatch, tmp_path):
    """Everything runs in one thread, with the same bits, and ``nbody info`` says why."""
    model, (z, pos) = potential(NestedShells((4.0,))), chain(120)
    torch.set_num_threads(2)
    set_backend("c")
    wanted = everything(model, z, pos)
    refuses = 'for word in "$@"; do [ "$word" = -fopenmp ] && echo "no OpenMP here" >&2 && exit 1; done'
    (tmp_path / "cc").write_text(f'#!/bin/sh\n{refuses}\nexec cc "$@"\n')
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setenv("NBODY_CACHE", str(tmp_path / "cache"))
    build.forget()
    try:
        assert "no OpenMP here" in build.no_threads() and build.broken() is None
        found = everything(potential(NestedShells((4.0,))), z, pos)
        monkeypatch.undo()
    finally:
        build.forget()
    assert build.no_threads() is None
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
