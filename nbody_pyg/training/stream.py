"""Mini-batches of frames in files that together do not fit into memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch_geometric.data import Batch, Data

from nbody_pyg.datasets.units import UnitFiles
from nbody_pyg.nn.repulsion import shortest_in_frames
from nbody_pyg.training.loader import EpochLoader, FrameLoader

#: Takes the frames of a file and gives them the keys that a model uses.
Prepare = Callable[[Sequence[Data]], Sequence[Data]]


#: Largest share, and largest number, of the frames with a pair of elements whose shortest distances are left out.
_LEFT_OUT, _MOST_LEFT_OUT = 1e-3, 19


def shortest_in_units(units: UnitFiles) -> dict[str, float]:
    """The shortest distance (angstrom) of each pair of elements within 3 angstrom in all training frames, by symbols.

    One in a thousand of the frames that have the pair, and at most 19, are left out: a broken molecule among thousands
    must not decide.

    Raises: ValueError: NaN, infinite values, or atoms at one place; the message names the file.
    """
    found = defaultdict[str, list[torch.Tensor]](list)
    for number, path in enumerate(units.files):
        try:
            of_file = shortest_in_frames(units.geometry(number))
        except ValueError as error:
            units.read(number, units.rows(number))  # names the frame, where it finds the fault too
            raise ValueError(f"{path.name}, training frames: {error}") from error
        for name, lengths in of_file.items():
            found[name].append(lengths)
    shortest = {}
    for name, parts in sorted(found.items()):
        lengths = torch.cat(parts)
        left_out = min(int(_LEFT_OUT * len(lengths)), _MOST_LEFT_OUT)
        shortest[name] = float(lengths.kthvalue(left_out + 1).values)
    return shortest


class StreamLoader(EpochLoader):
    r"""Iterates over the training frames of units in batches of about equal numbers of atoms.

    In every epoch the files are put into a random order and read ``window`` at a time; the frames of a window are
    shuffled among each other. So every frame is used once per epoch, and frames of ``window`` files and of one batch
    are in memory. The order is a function of seed and epoch alone. Frames are cut into batches by their atoms:
    with :math:`c_i` the number of atoms before frame i, its own :math:`n_i`, and N batches of n atoms per epoch,

    .. math:: b_i = \lfloor (c_i + n_i / 2) / n \rfloor, \qquad n = \tfrac{1}{N} \sum_i n_i, \qquad
              N = \max(1, \lfloor \textstyle\sum_i n_i / n^* \rfloor)

    so that each epoch has the same number of batches, none is empty, and no one is larger than n plus one frame.

    Args:
        units: the files.
        prepare: see :data:`Prepare`.
        batch_atoms: :math:`n^*`, atoms of a batch; raised to those of the largest frame.
        seed: of the order.
        window: files in memory at once; by default those of ``units``.
        rank, world: share of this process, every ``world``-th batch; by default taken from torch.distributed.

    Cost: memory of ``window`` files and of one batch.

    Raises: ValueError: no training frames; ``batch_atoms`` or ``window`` below one.
    """

    def __init__(
        self,
        units: UnitFiles,
        prepare: Prepare,
        batch_atoms: int,
        *,
        seed: int = 0,
        window: int | None = None,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        window = units.in_memory if window is None else window
        for name, value in (("batch_atoms", batch_atoms), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        units.require()
        self.units, self.seed, self.epoch, self.window = units, seed, 0, window
        super().__init__(rank, world)
        self._prepare = prepare
        self._rows = [units.rows(n) for n in range(len(units.files))]
        sizes = [units.num_atoms[n][rows] for n, rows in enumerate(self._rows)]
        largest, self.num_atoms = max(int(s.max(initial=0)) for s in sizes), sum(int(s.sum()) for s in sizes)
        self.num_batches = max(1, self.num_atoms // max(batch_atoms, largest))
        self._atoms = np.concatenate(units.num_atoms).astype(np.int64)
        self._starts = np.cumsum([0, *(len(atoms) for atoms in units.num_atoms)])
        if (ranks := self._ranks()[1]) > self.num_batches:
            raise ValueError(f"batch_atoms must leave a batch for each of {ranks} processes, got {batch_atoms}")

    @property
    def num_frames(self) -> int:
        return len(self.units)

    def __len__(self) -> int:
        """Batches of this process in an epoch; what is left of a division among processes is not used."""
        return self.num_batches // self._ranks()[1]

    def digest(self, count: int | None = None) -> str:
        """SHA-256 of the files; see :meth:`UnitFiles.digest`."""
        return self.units.digest()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def order(self) -> list[np.ndarray]:
        """The frames of this epoch, window by window: rows of (file, row in the file, number of the batch)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        files = rng.permutation(len(self._rows))
        windows = []
        for first in range(0, len(files), self.window):
            held = files[first : first + self.window]
            pairs = [np.stack([np.full(len(self._rows[n]), n), self._rows[n]], 1) for n in held]
            windows.append(rng.permutation(np.concatenate(pairs)))
        every = np.concatenate(windows)
        sizes = self._atoms[self._starts[every[:, 0]] + every[:, 1]]
        middle = np.cumsum(sizes) - sizes / 2
        batch = np.minimum(middle * self.num_batches / self.num_atoms, self.num_batches - 1).astype(np.int64)
        bounds = np.cumsum([len(w) for w in windows])[:-1]
        return np.split(np.column_stack([every, batch]), bounds)

    def _batches(self, start: int) -> Iterator[Batch]:
        """The batches of this process in this epoch from number ``start`` on; files that they do not need are not
        read."""
        rank, world = self._ranks()
        first, end = start * world, len(self) * world
        plans = [p[(p[:, 2] >= first) & (p[:, 2] < end) & (p[:, 2] % world == rank)] for p in self.order()]
        plans = [plan for plan in plans if len(plan)]
        left: list[Data] = []  # of a batch that may go on in the next window
        owner = np.zeros(0, dtype=np.int64)
        while plans:
            plan = plans.pop(0)
            frames, owner = [*left, *self._read(plan)], np.concatenate([owner, plan[:, 2]])
            loader, last = FrameLoader(frames), int(owner[-1])
            for number in np.unique(owner).tolist():
                if number != last or not plans:
                    yield loader.batch(np.flatnonzero(owner == number).tolist())
            left = [frames[i] for i in np.flatnonzero(owner == last).tolist()]
            owner = owner[owner == last]
            del frames, loader

    def _read(self, plan: np.ndarray) -> list[Data]:
        """The frames of a window, in the order of its plan."""
        out: list[Data | None] = [None] * len(plan)
        for number in np.unique(plan[:, 0]).tolist():
            places = np.flatnonzero(plan[:, 0] == number)
            for place, frame in zip(places, self._prepare(self.units.read(number, plan[places, 1])), strict=True):
                out[place] = frame
        return [frame for frame in out if frame is not None]

    def __repr__(self) -> str:
        return f"StreamLoader({self.units!r}, {self.num_batches} batches, {self.window} files in memory)"
