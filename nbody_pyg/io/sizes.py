"""Check from their shapes whether weights can belong to a network, so that a small file cannot build a large
network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from e3nn import o3

from nbody_pyg.hierarchy import Scheme
from nbody_pyg.longrange import LongRangeConfig
from nbody_pyg.messages import check_choice, short
from nbody_pyg.models import NBodyNet, network_arguments
from nbody_pyg.nn.irreps import PARITIES, channel_groups, harmonic_parity, hidden_irreps, level_types

Shapes = Mapping[str, tuple[int, ...]]
#: Limits of the size of tables of coupling coefficients: for any file, and per weight.
_TABLES, _TABLES_EACH = 50_000_000, 30_000
#: Largest integer argument of a scheme.
_MAX_ARGUMENT = 1000


def check_sizes(config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise ValueError unless weights of these shapes can be those of the network of a configuration.

    Nothing is built, and it takes no longer than reading the names of the weights. The network itself checks whether
    the weights match exactly.

    Args:
        config: of an :class:`~nbody_pyg.NBodyNet`.
        shapes: shapes of its weights, by name.
    """
    settings: Any = SimpleNamespace(**(network_arguments() | dict(config)))
    short_form = getattr(settings, "irreps", None) is None
    counts = {"correlation": 1, "num_basis": 1, "num_layers": 1} | ({"channels": 1, "lmax": 0} if short_form else {})
    for name, least in counts.items():
        _integer(name, getattr(settings, name, None), least)
    species = settings.species
    if not isinstance(species, list) or not 0 < len(species) <= 119:
        raise ValueError(f"species must list atomic numbers between 0 and 118, got {short(species)}")
    for number in species:
        _integer("species", number, 0)
    check_choice("parity", settings.parity, PARITIES)
    interactions = 1 + max((int(n.split(".")[1]) for n in shapes if _is_numbered(n)), default=-1)
    scheme = _scheme(settings.scheme, interactions)
    if scheme.levels[0].pair_radius is not None and settings.num_layers > interactions + 1:
        raise ValueError(f"num_layers is {settings.num_layers}, but there are weights of {interactions} interactions")
    settings.scheme = scheme
    steps = NBodyNet._plan(settings)
    if len(steps) != interactions:
        raise ValueError(f"the scheme takes {len(steps)} interactions, but there are weights of {interactions}")
    levels = {step.level: scheme.levels[step.level].name for step in steps}
    if short_form:
        if settings.lmax > len(shapes):
            raise ValueError(f"lmax is {short(settings.lmax)}, but there are {len(shapes)} weights")
        types = dict.fromkeys(levels, hidden_irreps(settings.channels, settings.lmax, settings.parity))
    else:
        types = level_types(_short_types(settings.irreps, len(shapes)), levels, settings.parity)
        settings.lmax = max(ir.l for one in types.values() for _, ir in one)
    settings.least = min(mul for one in types.values() for group in channel_groups(one) for mul, _ in group)
    own = getattr(settings, "gate", None) or {}
    for number, step in enumerate(steps):
        if step.kind in own:  # the network compares the weights of a user's gate
            continue
        groups = channel_groups(types[step.level])
        for n, group in enumerate(groups):
            layer = f"layers.{n}." if len(groups) > 1 else ""
            _check_interaction(f"interactions.{number}.{layer}", step.kind, group, settings, shapes)
    _check_tables(settings, len(steps), shapes)
    _check_output(settings, shapes)


def _short_types(given: Any, most: int) -> Any:
    """Types, if they are no longer than those of a network with this number of weights.

    Raises: ValueError: they are longer.
    """
    named = given if isinstance(given, dict) else {"": given}
    for one in named.values():
        degrees = re.findall(r"(\d+)[eo]", one) if isinstance(one, str) and len(one) < 1000 else ["9" * 9]
        if any(len(l) > 6 or int(l) > most for l in degrees):
            raise ValueError(f"irreps must be types of no more degrees than there are weights, got {short(one)}")
    return given


def _check_interaction(prefix: str, kind: str, irreps: o3.Irreps, settings: SimpleNamespace, shapes: Shapes) -> None:
    natural = [ir for _, ir in irreps if ir.p == harmonic_parity(ir.l, settings.parity)]
    c, lmax, order = irreps[0].mul, len(natural) - 1, settings.correlation
    # A gate may stand behind a linear map
    inner = "" if kind == "down" else "gate."
    inner = next((i for i in (inner, inner + "gate.") if prefix + i + "radial_weight" in shapes), inner)
    radial = shapes.get(f"{prefix}{inner}radial_weight")
    density = shapes.get(f"{prefix}density.weights.{lmax}")
    if radial is None and density is None:
        raise ValueError(f"lmax is {lmax}, but {prefix}density has no weights of this degree")
    if radial is not None and (
        len(radial) != 2 or radial[0] != settings.num_basis or radial[1] < settings.least * (lmax + 1)
    ):
        raise ValueError(f"num_basis is {settings.num_basis}, but the radial weights have shape {list(radial)}")
    if density is not None and density != (len(settings.species) * settings.num_basis, c):
        raise ValueError(
            f"{len(settings.species)} species with num_basis {settings.num_basis} and {c} channels do not belong to "
            f"weights of shape {list(density)}"
        )
    mix = f"{inner}mix.weights."
    if radial is not None and shapes.get(f"{prefix}{mix}{lmax}", (0, 0))[-1] != c:
        raise ValueError(f"lmax is {lmax} and channels {c}, but {prefix}{mix}{lmax} has another shape or is missing")
    if kind == "down":
        return
    if shapes.get(f"{prefix}products.linear.weights.0") != (c, c):
        raise ValueError(f"channels is {c}, but {prefix}products.linear.weights.0 has another shape or is missing")
    products = sum(n.startswith(f"{prefix}products.products.") and n.endswith(".mix.weights.0") for n in shapes)
    if products != order - 1:
        raise ValueError(f"correlation is {order}, but {prefix[:-1]} has weights of {products} products")


def _check_tables(settings: SimpleNamespace, steps: int, shapes: Shapes) -> None:
    """Reject tables of coupling coefficients that are too large for the number of weights."""
    both = settings.parity == "both"
    rows, degrees = (settings.lmax + 1) ** 2 * (1 + both), range(settings.lmax + 1)
    # Rows of all products of two degrees
    paths = sum(2 * l + 1 for a in degrees for b in degrees for l in range(abs(a - b), min(a + b, settings.lmax) + 1))
    tables = float(steps) * (settings.correlation + 1) * paths * (4 if both else 0.5) * rows**2
    weights = sum(_size(shape) for shape in shapes.values())
    if tables > max(_TABLES, _TABLES_EACH * weights):
        raise ValueError(
            f"lmax {settings.lmax} and correlation {settings.correlation} take tables of {tables:.1e} numbers, "
            f"which is out of proportion to {weights} weights"
        )


def _check_output(settings: SimpleNamespace, shapes: Shapes) -> None:
    readouts = [shape for name, shape in shapes.items() if name.startswith("readouts.") and ".linear.weights." in name]
    wide = sum(shape[-1] for shape in readouts if shape)
    if not isinstance(settings.irreps_out, str) or len(settings.irreps_out) > 1000:
        raise ValueError(f"irreps_out must be a type in e3nn's words, got {short(settings.irreps_out)}")
    if o3.Irreps(settings.irreps_out).num_irreps > wide:
        raise ValueError(f"irreps_out is {settings.irreps_out}, but the readouts have {wide} columns")
    if settings.long_range is not None:
        latent = LongRangeConfig.parse(settings.long_range)
        if shapes.get("long_range.strength") != (latent.channels,):
            raise ValueError(f"long_range has {latent.channels} channels, but its weights are of another number")


def _scheme(config: Any, interactions: int) -> Scheme:
    if not isinstance(config, dict):
        raise ValueError(f"scheme must hold a name and arguments, got {short(config)}")
    for name, value in config.items():
        # Labels and parts name atoms; other lists have an entry for each level
        if isinstance(value, list) and name not in ("labels", "parts") and len(value) > interactions + 2:
            raise ValueError(f"scheme.{name} has {len(value)} entries, but there are {interactions} interactions")
        if isinstance(value, int) and abs(value) > _MAX_ARGUMENT:
            raise ValueError(f"scheme.{name} must be at most {_MAX_ARGUMENT}, got {short(value)}")
    return Scheme.from_config(config)


def _is_numbered(name: str) -> bool:
    first, *rest = name.split(".")
    return first == "interactions" and len(rest) > 1 and rest[0].isdecimal() and len(rest[0]) < 6


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {short(value)}")


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
