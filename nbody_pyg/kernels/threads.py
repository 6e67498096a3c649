"""C source that divides the work of a function among threads, and the number of threads.

Items (edges, parts) are divided into blocks, which are distributed over the threads. The number of blocks depends only
on the number of items. If several blocks add to the same result, each block has separate sums, which are added in the
order of the blocks. Where edges are in the order of the nodes to which they add, a block ends where the node changes, so
that it needs no separate sums. So results have the same bits for any number of threads, and without OpenMP. Separate
sums cost time: there are at most eight blocks up to 128 times the smallest block (65,536 edges), then up to 64.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

PRELUDE = """
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
int omp_get_thread_num(void);
#else
#define omp_get_thread_num() 0
#endif
static inline int64_t blocks_of(int64_t items, int64_t grain) {
  const int64_t few = items / grain, many = items / (16 * grain);
  return few < 1 ? 1 : few < 8 ? few : many < 8 ? 8 : many < 64 ? many : 64;
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


#: Names of variables in the functions below, which arguments must not have.
_LOCAL = frozenset(
    {"threads", "blocks", "block", "first", "end", "count", "in_order", "room", "held", "need", "failed", "next"}
)


def in_blocks(name: str, items: str, arguments: Sequence[Argument], grain: int) -> str:
    """The function ``name``, which calls ``NAME_rows`` for each block of at least ``grain`` items.

    Both take the number of items (by the name of ``items``) and then the arguments; the first of all is the number of
    threads. Blocks follow the nodes of the first argument that has them.

    Raises: ValueError: an argument has the name of a variable of the function.
    """
    if hidden := _LOCAL.intersection((items, *(a.name for a in arguments))):
        raise ValueError(f"arguments of {name} must not be called {', '.join(sorted(hidden))}; rename them")
    declared = ", ".join(f"{a.type} {a.name}" for a in arguments)
    body = (_with_sums if any(a.total for a in arguments) else _without_sums)(name, items, arguments)
    return f"""void {name}(int64_t threads, int64_t {items}, {declared}) {{
  const int64_t blocks = blocks_of({items}, {grain});
{body}}}
"""


def _call(name: str, count: str, arguments: Sequence[Argument], moved: Mapping[str, str]) -> str:
    """Call of ``NAME_rows``, with other text for some arguments."""
    return f"{name}_rows({', '.join([count, *(moved.get(a.name, a.name) for a in arguments)])});"


def _steps(arguments: Sequence[Argument]) -> dict[str, str]:
    """The arrays of a block that starts at item ``first``."""
    return {a.name: f"{a.name} + first * {a.step}" for a in arguments if a.step}


def _without_sums(name: str, items: str, arguments: Sequence[Argument]) -> str:
    """Body of a function all of whose results are arrays of items."""
    return f"""  if (threads < 2 || blocks < 2) {{ {_call(name, items, arguments, {})} return; }}
  #pragma omp parallel for schedule(static) num_threads(team(threads, blocks))
  for (int64_t block = 0; block < blocks; block++) {{
    const int64_t first = {items} * block / blocks, count = {items} * (block + 1) / blocks - first;
    {_call(name, "count", arguments, _steps(arguments))}
  }}
"""


def _with_sums(name: str, items: str, arguments: Sequence[Argument]) -> str:
    """Body of a function that adds to results which several blocks share."""
    sums = [a for a in arguments if a.total]
    whole = _call(name, items, arguments, {})
    own_sums = _call(name, "count", arguments, _steps(arguments) | {a.name: f"own_{a.name}" for a in sums})
    shared_sums = _call(name, "count", arguments, _steps(arguments))
    node = next((a.node for a in sums if a.node), "")
    before = node.replace("[e]", "[e - 1]")
    sizes, own, add = [], [], []
    for a in sums:
        number, offset, direct = f"({a.total})", "0", f"!{a.name}"
        if a.node:
            sizes.append(
                f"int64_t low_{a.name} = count ? INT64_MAX : 0, high_{a.name} = 0; for (int64_t e = first; e < end; e++) {{ "
                f"const int64_t n = {a.node}; if (n < low_{a.name}) low_{a.name} = n; if (n > high_{a.name}) high_{a.name} = n; }}"
            )
            number, offset = f"({a.total}) * (high_{a.name} - low_{a.name} + 1)", f"low_{a.name} * ({a.total})"
            direct += " || in_order" if a.node == node else ""
        sizes.append(f"const int64_t size_{a.name} = {direct} ? 0 : {number};")
        own.append(f"real* own_{a.name} = size_{a.name} ? next - {offset} : {a.name}; next += size_{a.name};")
        add.append(f"if (size_{a.name}) add_up({a.name} + {offset}, own_{a.name} + {offset}, size_{a.name});")
    in_order, cut, alone = "0", "", ""
    if node:
        in_order = f"1; for (int64_t e = 1; e < {items} && in_order; e++) in_order = {node} >= {before}"
        cut = " ".join(
            f"for (int64_t e = {end}; in_order && e > 0 && e < {items} && {node} == {before}; e++) {end} = e + 1;"
            for end in ("first", "end")
        )
        alone = "" if len(sums) > 1 else f"if (in_order && threads < 2) {{ {whole} return; }}"
    need = " + ".join(f"size_{a.name}" for a in sums)
    lines = "\n      ".join([*sizes, f"const int64_t need = {need};"])
    # If memory runs out, a block adds directly to the results, in the order of the blocks
    return f"""  if (blocks < 2) {{ {whole} return; }}
  int in_order = {in_order};
  {alone}
  #pragma omp parallel num_threads(team(threads, blocks))
  {{
    real* room = 0; int64_t held = 0;
    #pragma omp for ordered schedule(static, 1)
    for (int64_t block = 0; block < blocks; block++) {{
      int64_t first = {items} * block / blocks, end = {items} * (block + 1) / blocks;
      {cut}
      const int64_t count = end - first;
      {lines}
      if (need > held) {{ free(room); room = malloc(need * sizeof(real)); held = room ? need : 0; }}
      const int failed = need > held;
      real* next = room;
      {" ".join(own)}
      if (!failed) {{
        if (need) memset(room, 0, need * sizeof(real));
        {own_sums}
      }}
      #pragma omp ordered
      {{
        if (failed) {shared_sums}
        else {{ {" ".join(add)} }}
      }}
    }}
    free(room);
  }}
"""
