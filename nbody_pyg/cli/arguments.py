"""Parse and check values of the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

#: Exit status of wrong arguments, the same as argparse's.
WRONG = 2


class WrongArgument(ValueError):
    """An argument that this machine or this command does not support; the exit status is ``WRONG``."""


def whole(text: str) -> int:
    """A whole number; 1e4 is allowed."""
    try:
        value = float(text)
        if value.is_integer():
            return int(text) if text.strip().lstrip("+-").isdecimal() else int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")


def label_keys(text: str) -> dict[str, str]:
    """Keys of labels in the form of ``data.keys``: {energy: dft_energy}."""
    from nbody_pyg.datasets.keys import named_keys
    from nbody_pyg.training.config import parse_yaml

    try:
        value = parse_yaml(text, "--keys")
        if not isinstance(value, dict):
            raise ValueError(f"must hold labels and their keys such as '{{energy: dft_energy}}', got {text!r}")
        return named_keys(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _bounded(read: Callable[[str], Any], zero: bool) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        """The number, if it is positive, or zero where that is allowed."""
        if (value := read(text)) < 0 or (value == 0 and not zero):
            raise argparse.ArgumentTypeError(f"must be {'zero or ' if zero else ''}positive, got {text}")
        return value

    return check


positive, not_negative = _bounded(whole, False), _bounded(whole, True)
positive_number, number_not_negative = _bounded(_number, False), _bounded(_number, True)


def require_device(name: Any) -> None:
    """Check that a device exists before anything is read.

    Raises: WrongArgument: it does not; the message lists those that do.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    choices = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{n}" for n in range(gpus))]
    if torch.backends.mps.is_available():
        choices.append("mps")
    if str(name) not in choices:
        reason = "" if gpus or not str(name).startswith(("cuda", "gpu")) else "; torch finds no GPU here"
        raise WrongArgument(f"device must be one of {', '.join(choices)} on this machine, got {str(name)!r}{reason}")
