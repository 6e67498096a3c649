"""The file that i-PI loads by its path (``<pes_path>``); see nbody_pyg.engines.ipi."""

from __future__ import annotations

from nbody_pyg.engines.ipi import IPIDriver

__DRIVER_NAME__ = "nbody"
__DRIVER_CLASS__ = "IPIDriver"
__all__ = ["IPIDriver"]
