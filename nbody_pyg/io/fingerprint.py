"""Hash of the convention of the Clebsch-Gordan coefficients, so that weights are not used with another one."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from e3nn import o3

LMAX = 3


@functools.cache
def cg_fingerprint() -> str:
    """SHA-256 over e3nn's Wigner 3j symbols up to degree 3, rounded to 1e-10.

    Signs of the symbols changed between versions of e3nn. Weights trained with one sign give plausible but
    wrong energies with the other, so the fingerprint is stored with them and compared on loading.
    """
    digest = hashlib.sha256()
    for l1 in range(LMAX + 1):
        for l2 in range(LMAX + 1):
            for l3 in range(abs(l1 - l2), min(l1 + l2, LMAX) + 1):
                values = o3.wigner_3j(l1, l2, l3, dtype=torch.float64).numpy()
                digest.update(f"{l1},{l2},{l3};".encode())
                digest.update(np.rint(values * 1e10).astype("<i8").tobytes())
    return digest.hexdigest()
