"""What older versions wrote about a potential, in today's words: one function for each format of the model file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nbody_pyg.hierarchy import Scheme
from nbody_pyg.models import NBodyNet

#: What :func:`~nbody_pyg.training.build.potential_config` gives.
Described = dict[str, Any]


def _from_1(described: Described) -> Described:
    """Potentials have a repulsion; those of before were trained without one."""
    return described if described.get("property") else {"repulsion": None} | described


def _from_2(described: Described) -> Described:
    """Windows have an exponent, which was 6.

    Raises: ValueError: a network on :class:`SmoothSurvivors` thinned by the steeper steps of before.
    """
    scheme = _network(described).get("scheme", {})
    if scheme.get("name") == "SmoothSurvivors" and "width" not in scheme:
        raise ValueError(
            "the file holds a network on SmoothSurvivors without a width: it was trained when the thinning had steeper "
            "steps, which this version does not have, and its energies would change; train it anew, or use the version "
            "that wrote it"
        )
    if scheme.get("name") == "NestedShells":
        return _with_network(described, scheme={"exponent": 6} | scheme)
    return described


def _from_3(described: Described) -> Described:
    """Atoms without pairs are visited once: another number of layers did nothing, and is an error now."""
    scheme = _network(described).get("scheme")
    if scheme is not None and Scheme.from_config(scheme).levels[0].pair_radius is None:
        return _with_network(described, num_layers=NBodyNet.DEFAULTS["num_layers"])
    return described


#: The function that brings each format to the next.
UPGRADES: Mapping[int, Callable[[Described], Described]] = {1: _from_1, 2: _from_2, 3: _from_3}
#: Format of the model files that are written now. 2: potentials have a repulsion, which a reader of format 1 would
#: leave out. 3: windows have an exponent. 4: the checksum covers the settings.
FORMAT_VERSION = 1 + max(UPGRADES)


def up_to_date(described: Described) -> Described:
    """A potential of any format in today's words; checkpoints have no format.

    Each function keeps what is there already, so that all of them may see what one of the later formats says.
    """
    for number in sorted(UPGRADES):
        described = UPGRADES[number](described)
    return described


def _network(described: Described) -> dict[str, Any]:
    """The configuration of the network; empty for a model that is none of the library."""
    model = described["model"]
    return model["config"] or {} if model["class"] == NBodyNet.__name__ else {}


def _with_network(described: Described, **changed: Any) -> Described:
    model = described["model"]
    return described | {"model": model | {"config": model["config"] | changed}}
