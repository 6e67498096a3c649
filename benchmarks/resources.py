"""Compile the GPU kernels for a chip that need not be here, and read what they take of it.

Triton brings the assembler and the disassembler of the vendor, so registers, spilled bytes and instructions of every
kernel are known without a GPU. Registers decide how many warps are resident (65,536 for each multiprocessor, here one
warp per program); spills other than 0 mean that registers
went to local memory (but in the edge features, where the sine of a large angle uses some of it).
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import show

from nbody_pyg.kernels.gpu.density import DensityProgram
from nbody_pyg.kernels.gpu.density import program as density_program
from nbody_pyg.kernels.gpu.edge_source import apart
from nbody_pyg.kernels.gpu.grid import channel_block, warps
from nbody_pyg.nn.edges import EdgeEmbedding
from nbody_pyg.nn.gates import OneBodyGate
from nbody_pyg.nn.irreps import hidden_irreps
from nbody_pyg.nn.products import ChannelwiseProduct
from nbody_pyg.radial import BesselBasis

#: What cuobjdump calls the kinds of instruction that decide: fused multiply-adds, loads and stores, shuffles.
_KINDS = {"fma": r"[FD](FMA|MUL|ADD)", "load": "LDG|LD\\.E", "store": "STG|ST\\.E", "shuffle": "SHFL"}
_POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64"}
_INTEGERS = ("ptr", "edge", "source", "target", "species")
_NUMBERS = ("nodes", "split", "edges", "length")
#: Compute capability 9.0: the H100 and H200.
CAPABILITY = 90


def signature(names: list[str], constants: dict[str, Any], dtype: torch.dtype) -> dict:
    """Type of every argument of a generated kernel, by its name."""
    kinds = {}
    for name in names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in _NUMBERS:
            kinds[name] = "i32"
        else:
            kinds[name] = "*i32" if name in _INTEGERS else _POINTERS[dtype]
    return kinds


def tool(name: str) -> str | None:
    """A program of the vendor that comes with Triton."""
    import triton.backends.nvidia as home

    path = Path(home.__file__).parent / "bin" / name
    return str(path) if path.exists() else None


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: torch.dtype, num_warps: int) -> dict:
    """Compile one kernel; registers, local and shared bytes, instructions, seconds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = signature(kernel.arg_names, constants, dtype)
    # Pointers of torch are aligned to 16 bytes, as Triton finds out at a launch
    pointers = [n for n, name in enumerate(kernel.arg_names) if kinds[name].startswith("*")]
    aligned = {(n,): [["tt.divisibility", 16]] for n in pointers}
    source = ASTSource(kernel, kinds, constexprs=constants, attrs=aligned)
    start = time.perf_counter()
    built = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": num_warps})
    return {"seconds": time.perf_counter() - start, **read(built.asm["cubin"])}


def read(cubin: bytes) -> dict[str, int]:
    """Resources and instruction counts of one compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run([tool("cuobjdump"), "-res-usage", str(file)])
        code = _run([tool("cuobjdump"), "-sass", str(file)])
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code, re.MULTILINE)
    counts = {key: sum(bool(re.match(kind, line)) for line in lines) for key, kind in _KINDS.items()}
    spills = sum(line.startswith(("LDL", "STL")) for line in lines)
    return {"registers": found["REG"], "stack": found["STACK"], "shared": found["SHARED"], "spills": spills,
            "instructions": len(lines), **counts}  # fmt: skip


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels_of(lmax: int, channels: int, dtype: torch.dtype) -> list[tuple[str, Any, dict[str, Any], int]]:
    """(name, kernel, constants, warps) of everything that a network of this size launches."""
    irreps = hidden_irreps(channels, lmax)
    size = torch.empty(0, dtype=dtype).element_size()
    block = channel_block(channels, size)
    lanes = {"C": channels, "CB": block}
    edge = OneBodyGate(irreps, irreps, lmax, 8).gpu
    node = ChannelwiseProduct(irreps, irreps, irreps).gpu.program
    features = EdgeEmbedding(lmax, BesselBasis(8, 5.0)).gpu.program
    groups = range(edge.groups if apart(edge.groups) else 1)
    parts = itertools.product(("targets", "sources", "edges", "weights"), ("", "_double"), groups)
    found = [
        (f"one_body_{part}{kind}", edge.program, {**lanes, "HAS_U": 0, "GROUP": n}, warps(block))
        for part, kind, n in parts
    ]
    found += [(f"product_{part}", node, lanes, warps(block)) for part in ("forward", "backward", "double")]
    found += [(f"features_{part}", features, {"BLOCK": 128}, 4) for part in ("forward", "backward", "double")]
    sizes = DensityProgram((lmax + 1) ** 2, 8, 4).sizes()
    found.append(("density_sum", density_program, {**sizes, "QB": 32, "TWO": 1}, 1))
    found.append(("density_edges", density_program, {**sizes, "KP": 8, "EB": 8}, 4))
    return [(name, program.kernel(name), constants, count) for name, program, constants, count in found]


def resource_table(lmax: list[int], channels: list[int], dtype: torch.dtype = torch.float32) -> list[dict]:
    """Compile everything, print what it takes."""
    if tool("cuobjdump") is None:
        raise RuntimeError("Triton's package has no cuobjdump here; use a wheel for Linux on x86-64")
    records = []
    for degree in lmax:
        for count in channels:
            for name, kernel, constants, num_warps in kernels_of(degree, count, dtype):
                used = compile_kernel(kernel, constants, dtype, num_warps)
                records.append(
                    {"lmax": degree, "channels": count, "kernel": name, "group": constants.get("GROUP"), **used}
                )
                print(f"lmax {degree}, {count} channels, {name}: {used}", flush=True)
    head = list(records[0])
    show("resources of each kernel", head, [[record[key] for key in head] for record in records])
    return records
