"""Which frames of a file come from electronic steps that did not converge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np
from ase import Atoms

#: Entries of ``info`` that say whether the electronic structure of a frame converged; ``False`` or 0: it did not.
KEYS = ("converged", "scf_converged", "converged_electronic")
_ITERATION = re.compile(r"Iteration +\d+\( *(\d+)\)")


def is_converged(atoms: Atoms) -> bool:
    """Whether nothing says that the electronic structure of a system did not converge."""
    found = [atoms.info[key] for key in KEYS if isinstance(atoms.info.get(key), (bool, int, np.bool_, np.integer))]
    return all(map(bool, found))


def mark_unconverged(systems: Iterable[Atoms], flags: Iterable[bool] | None, file_format: str) -> Iterator[Atoms]:
    """The systems of a file; ``info["converged"]`` of those that did not converge is False.

    Args:
        flags: of these systems, whether each converged; None where the file does not tell.
    """
    known = iter(flags) if flags is not None else None
    for atoms in systems:
        results = atoms.calc.results if atoms.calc is not None else {}
        # ASE gives no energy of ORCA's runs that did not converge
        failed = file_format == "orca-output" and np.isnan(results.get("energy", 0.0))
        if failed or (known is not None and not next(known, True)):
            atoms.info["converged"] = False
        yield atoms


def converged_steps(file: Any, file_format: str) -> list[bool] | None:
    """Of each ionic step of a VASP run, whether its electronic steps converged; None for other formats.

    Args:
        file: open binary file.
        file_format: ASE's name of the format.
    """
    return {"vasp-xml": _of_xml, "vasp-out": _of_outcar}.get(file_format, lambda file: None)(file)


def _of_xml(file: Any) -> list[bool]:
    """Converged: fewer electronic steps than the largest number, NELM."""
    steps, largest, counts = 0, 0, []
    try:
        for _, element in ElementTree.iterparse(file):
            if element.tag == "i" and element.get("name") == "NELM":
                largest = int(element.text or 0)
            elif element.tag == "scstep":
                steps += 1
            elif element.tag == "calculation":
                counts.append(steps)
                steps = 0
                element.clear()
    except ElementTree.ParseError:
        pass  # a run that was stopped; ASE reads what is there
    return [not largest or count < largest for count in counts]


def _of_outcar(file: Any) -> list[bool]:
    """Converged: VASP says so, or fewer electronic steps than NELM."""
    steps, largest, reached, flags = 0, 0, False, []
    for raw in file:
        line = raw.decode(errors="replace")
        if not largest and "NELM " in line and (found := re.search(r"NELM += +(\d+)", line)):
            largest = int(found[1])
        elif found := _ITERATION.search(line):
            steps, reached = int(found[1]), False
        elif "aborting loop because EDIFF is reached" in line:
            reached = True
        elif "FREE ENERGIE OF THE ION-ELECTRON SYSTEM" in line:
            flags.append(reached or not largest or steps < largest)
    return flags
