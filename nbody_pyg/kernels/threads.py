"""C source that divides the work of a function among threads, and the number of threads.

Items (edges, parts) are divided into blocks, which are distributed over the threads. The number of blocks depends only
on the number of items. If several blocks add to the same result, each block has separate sums, which are added in the
order of the blocks. So results have the same bits for any number of threads, and without OpenMP.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

PRELUDE = """
#include <stdlib.h>
#ifdef _OPENMP
int omp_get_thread_num(void);
#else
#define omp_get_thread_num() 0
#endif
static inline int64_t blocks_of(int64_t items, int64_t grain) {
  const int64_t few = items / grain, many = items / (16 * grain);
  return few < 1 ? 1 : few < 16 ? few : many < 16 ? 16 : many < 64 ? many : 64;
}
static inline int team(int64_t threads, int64_t blocks) { return (int)(threads < blocks ? threads : blocks); }
static inline void add_up(real* restrict y, const real* restrict x, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] += x[i]; }
"""

_alone = False  # whether this process was forked: the threads of the parent do not exist in it


def _forked() -> None:
    global _alone
    _alone = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def num_threads() -> int:
    """Threads of compiled functions: torch's number, ``torch.set_num_threads``; one in a process that was forked.

    OpenMP hangs in the child of a process in which it has started threads.
    """
    return 1 if _alone else torch.get_num_threads()


class Argument(NamedTuple):
    """One argument of a function.

    ============  ==========================================================================================
    field         meaning
    ============  ==========================================================================================
    type, name    in C
    step          numbers per item, for arrays of which each block has its part
    total         numbers per node (with ``node``) or in all, for arrays that all blocks add to
    node          the node that item e adds to, such as "target[e]"
    ============  ==========================================================================================
    """

    type: str
    name: str
    step: str = ""
    total: str = ""
    node: str = ""


def in_blocks(name: str, items: str, arguments: Sequence[Argument], grain: int) -> str:
    """The function ``name``, which calls ``NAME_rows`` for each block of at least ``grain`` items.

    Both take the number of items (by the name of ``items``) and then the arguments; the first of all is the number of
    threads.
    """
    sums = [a for a in arguments if a.total]
    declared = ", ".join(f"{a.type} {a.name}" for a in arguments)
    head = f"void {name}(int64_t threads, int64_t {items}, {declared}) {{\n  const int64_t blocks = blocks_of({items}, {grain});"
    whole = f"{name}_rows({', '.join([items, *(a.name for a in arguments)])});"

    def moved(a: Argument, own: bool) -> str:
        if a.total and own:
            return f"own_{a.name}" + (f" - low_{a.name} * ({a.total})" if a.node else "")
        return f"{a.name} + first * {a.step}" if a.step else a.name

    def block(own: bool) -> str:
        return f"{name}_rows({', '.join(['count', *(moved(a, own) for a in arguments)])});"

    cut = f"const int64_t first = {items} * b / blocks, count = {items} * (b + 1) / blocks - first;"
    loop = "num_threads(team(threads, blocks))\n  for (int64_t b = 0; b < blocks; b++) {"
    if not sums:
        return f"""{head}
  if (threads < 2 || blocks < 2) {{ {whole} return; }}
  #pragma omp parallel for schedule(static) {loop}
    {cut}
    {block(False)}
  }}
}}
"""
    make, add, free, failed = [], [], [], []
    for a in sums:
        low, size, own = f"low_{a.name}", f"size_{a.name}", f"own_{a.name}"
        if a.node:
            make.append(
                f"int64_t {low} = INT64_MAX, high_{a.name} = 0; for (int64_t e = first; e < first + count; e++) "
                f"{{ const int64_t n = {a.node}; if (n < {low}) {low} = n; if (n > high_{a.name}) high_{a.name} = n; }} "
                f"const int64_t {size} = (high_{a.name} - {low} + 1) * ({a.total});"
            )
        else:
            make.append(f"const int64_t {size} = {a.total};")
        make.append(f"real* {own} = {a.name} ? calloc({size}, sizeof(real)) : 0;")
        failed.append(f"({a.name} && !{own})")
        at = f"{a.name} + {low} * ({a.total})" if a.node else a.name
        add.append(f"if ({a.name}) add_up({at}, {own}, {size});")
        free.append(f"free({own});")
    lines = "\n    ".join(make)
    # If memory runs out, a block adds directly to the results, in the order of the blocks
    return f"""{head}
  if (blocks < 2) {{ {whole} return; }}
  #pragma omp parallel for ordered schedule(static, 1) {loop}
    {cut}
    {lines}
    const int failed = {" || ".join(failed)};
    if (!failed) {block(True)}
    #pragma omp ordered
    {{ if (failed) {block(False)} else {{ {" ".join(add)} }} }}
    {" ".join(free)}
  }}
}}
"""
