"""Damaged copies of files, as disks, memory and cut transfers make them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def damaged_copies(content: bytes, flips: int, cuts: int, seed: int = 0) -> Iterator[bytes]:
    """Copies with one flipped bit, half of them within the first or the last 1,500 bytes, and copies that are cut."""
    draw, size, ends = random.Random(seed), len(content), min(1500, len(content))
    for number in range(flips):
        at = (draw.randrange(size), draw.randrange(ends), draw.randrange(size), -1 - draw.randrange(ends))[number % 4]
        copy = bytearray(content)
        copy[at] ^= 1 << draw.randrange(8)
        yield bytes(copy)
    for _ in range(cuts):
        yield content[: draw.randrange(size)]


def assert_error_or_right(path: Path, read: Callable[[Path], Any], flips: int, cuts: int) -> None:
    """Every damaged copy of a file is refused by a ValueError that names it, or gives what the file gives."""
    wanted, copy, said = read(path), path.with_name(f"damaged{path.suffix}"), []
    for content in damaged_copies(path.read_bytes(), flips, cuts):
        copy.write_bytes(content)
        try:
            found = read(copy)
        except ValueError as error:
            said.append(str(error))
        else:
            assert found == wanted, "a damaged copy gives other content"
    assert len(said) > (flips + cuts) / 2 and all(copy.name in text for text in said), set(said)
