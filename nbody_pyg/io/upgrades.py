"""Upgrade descriptions of potentials from older versions: one function for each format of the model file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from nbody_pyg.hierarchy import Scheme
from nbody_pyg.models import NUM_LAYERS, NBodyNet
from nbody_pyg.renamed import FORMER_ARGUMENTS, present_names

Value = TypeVar("Value")
#: Parts of layers whose names were others up to format 4.
_FORMER_MAPS = {"keep": "self_linear", "carry": "residual_linear"}
_FORMER_MAP = re.compile(rf"(interactions\.\d+\.(?:layers\.\d+\.)?)({'|'.join(_FORMER_MAPS)})\.")

#: What :func:`~nbody_pyg.io.description.potential_config` gives.
Described = dict[str, Any]


def _from_1(described: Described) -> Described:
    """Potentials have a repulsion; older ones were trained without one."""
    return described if described.get("property") else {"repulsion": None} | described


def _from_2(described: Described) -> Described:
    """Windows have an exponent, which was 6.

    Raises: ValueError: a network on :class:`SmoothSurvivors` with the earlier, steeper thinning.
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
    """Atoms without pairs have one layer: another number had no effect, and is an error now."""
    scheme = _network(described).get("scheme")
    if scheme is not None and Scheme.from_config(scheme).levels[0].pair_radius is None:
        return _with_network(described, num_layers=NUM_LAYERS)
    return described


def _from_4(described: Described) -> Described:
    """Arguments of the network have the names of the field (:data:`~nbody_pyg.renamed.FORMER_ARGUMENTS`)."""
    if not _network(described):
        return described
    model = described["model"]
    return described | {"model": model | {"config": present_names(model["config"], FORMER_ARGUMENTS, stacklevel=0)}}


def _from_5(described: Described) -> Described:
    """The radial functions of members of :class:`SmoothSurvivors` have a length, which was the reach of a part."""
    scheme = _network(described).get("scheme", {})
    if scheme.get("name") != "SmoothSurvivors" or "lengths" in scheme:
        return described
    reach = [spec.child_radius for spec in Scheme.from_config(scheme).levels[1:-1]]
    return _with_network(described, scheme=scheme | {"lengths": reach})


#: The function that upgrades each format to the next.
UPGRADES: Mapping[int, Callable[[Described], Described]] = {
    1: _from_1,
    2: _from_2,
    3: _from_3,
    4: _from_4,
    5: _from_5,
}
#: Format of the model files that are written now. 2: potentials have a repulsion, which a reader of format 1 would
#: leave out. 3: windows have an exponent. 4: the checksum covers the settings. 5: names of the field.
#: 6: lengths of the radial functions in survivors.
FORMAT_VERSION = 1 + max(UPGRADES)


def up_to_date(described: Described) -> Described:
    """The description of a potential of any format in the present format; checkpoints have no format.

    Each function keeps existing entries, so all of them can be applied to a later format.
    """
    for number in sorted(UPGRADES):
        described = UPGRADES[number](described)
    return described


def present_weights(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Weights of any format by the names of the present one."""
    return {_FORMER_MAP.sub(lambda m: f"{m[1]}{_FORMER_MAPS[m[2]]}.", name): w for name, w in weights.items()}


def present_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested form of a configuration of any version by the present names, without a warning."""
    model = present_names(config.get("model") or {}, FORMER_ARGUMENTS, stacklevel=0)
    return {**config, "model": model} if model else dict(config)


def _network(described: Described) -> dict[str, Any]:
    """The configuration of the network; empty for a model that is not from the library."""
    model = described["model"]
    return model["config"] or {} if model["class"] == NBodyNet.__name__ else {}


def _with_network(described: Described, **changed: Any) -> Described:
    model = described["model"]
    return described | {"model": model | {"config": model["config"] | changed}}
