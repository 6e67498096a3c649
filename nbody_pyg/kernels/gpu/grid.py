"""How the work is divided into programs; this affects speed, not results."""

from __future__ import annotations

#: Number of programs that fills a large GPU (132 multiprocessors, about eight warps each).
ENOUGH = 1024
#: Largest number of programs that share the edges of one node.
MOST_PARTS = 8
#: Channels of one program: one or two per lane of a warp. More would need more registers than a thread has.
LANES = 32


def channel_block(channels: int, element_size: int) -> int:
    """Channels of one program, a power of two: 64 in single precision, 32 in double or for few channels."""
    return LANES if element_size > 4 or channels <= LANES else 2 * LANES


def warps(block: int) -> int:
    """Warps of one program: one, so that sums over channels stay inside a warp."""
    return 1


def parts_of_a_node(nodes: int, programs_per_node: int, edges: int) -> int:
    """Number of programs that share the edges of each node, because small systems would leave most of the GPU idle.

    A power of two; every part writes its own sum, and the sums are added in a fixed order.
    """
    parts = 1
    while parts < MOST_PARTS and 2 * parts * nodes * programs_per_node <= ENOUGH and 4 * parts * nodes <= edges:
        parts *= 2
    return parts
