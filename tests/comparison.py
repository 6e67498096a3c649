"""What several tests compare in the same way."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_same_results(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Two results of a potential agree in names and numbers, and have forces that are not zero."""
    assert set(found) == set(wanted)
    assert wanted["forces"].abs().max() > 1e-3
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )
