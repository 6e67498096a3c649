"""The structure whose hierarchy all frames of a training set shared, for use after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Data

from nbody_pyg.deploy.model_file import read_metadata
from nbody_pyg.hierarchy import Scheme, Topology, share_topology


def reference_topology(metadata: Mapping[str, Any], scheme: Scheme, z: Sequence[int]) -> Topology | None:
    """The topology that the model was trained with, where it knows one for atoms ``z`` in this order.

    A model trained on one molecule takes its bonds from one frame; a bond that is stretched beyond the usual
    length must not change the hierarchy, and with it the energy.
    """
    found = metadata.get("reference")
    if found is None or list(found["z"]) != list(z):
        return None
    return scheme.topology(torch.tensor(found["z"]), torch.tensor(found["pos"], dtype=torch.float64))


def with_reference(frames: Sequence[Data], path: str | Path, scheme: Scheme | None) -> Sequence[Data]:
    """Frames with hierarchies: shared with the training frames where these are the same molecule."""
    if scheme is None:
        return frames
    metadata, out = read_metadata(path)["metadata"], []
    for frame in frames:
        periodic = frame.get("pbc") is not None and bool(frame.pbc.any())
        tree = None if periodic else reference_topology(metadata, scheme, frame.z.tolist())
        out.append(scheme(frame) if tree is None else share_topology([frame], scheme, tree)[0])
    return out
