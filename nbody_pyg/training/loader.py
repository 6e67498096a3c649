"""Mini-batches by slicing: the frames are collated once, and a batch is a few views."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch_geometric.data import Batch, Data

from nbody_pyg.data import is_topology_key


@dataclass(frozen=True)
class _Column:
    """All values of one key, flat along its concatenation dimension.

    ``start[f]:start[f+1]`` is the slice of frame f; ``increment[f]`` is added by frame f to the indices of later frames
    (None if PyG adds nothing).
    """

    values: Tensor
    start: Int[Tensor, " frames_plus_1"]
    dim: int
    increment: Tensor | None

    def to(self, device: torch.device | str) -> "_Column":
        step = None if self.increment is None else self.increment.to(device)
        return _Column(self.values.to(device), self.start.to(device), self.dim, step)


class EpochSampler:
    """Seeded order of the frames: a pure function of (seed, epoch), divided among the processes.

    Shuffled, for training, every process gets the same number of frames, because all take their steps together: the
    tail is filled from the front of the same permutation, as in torch's DistributedSampler. In order, for errors, every
    frame goes to one process; if there are fewer frames than processes, all go to every process (a mean over the
    processes does not change).
    """

    def __init__(self, num_frames: int, shuffle: bool, seed: int):
        self.num_frames, self.shuffle, self.seed, self.epoch = num_frames, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def share(self, rank: int, world: int) -> int:
        """Number of frames of a process."""
        if self.shuffle:
            return math.ceil(self.num_frames / world)
        return len(range(rank, self.num_frames, world)) if self.num_frames >= world else self.num_frames

    def order(self, rank: int, world: int) -> Int[Tensor, " share"]:
        if not self.shuffle:
            order = torch.arange(self.num_frames)
            return order[rank::world] if self.num_frames >= world else order
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_frames, generator=generator)
        whole = self.share(rank, world) * world  # some frames twice, so that all processes have the same number
        return order.repeat(math.ceil(whole / self.num_frames))[:whole][rank::world]

    def __repr__(self) -> str:
        return f"EpochSampler({self.num_frames} frames, shuffle={self.shuffle}, seed={self.seed})"


class EpochLoader(ABC):
    """What loaders of a run have in common: a share for each process, and epochs without end.

    ``rank`` and ``world`` are the share of this process, by default taken from torch.distributed.
    """

    def __init__(self, rank: int | None, world: int | None) -> None:
        self._rank, self._world = rank, world

    def _ranks(self) -> tuple[int, int]:
        if self._world is not None:
            return self._rank or 0, self._world
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    @abstractmethod
    def __len__(self) -> int:
        """Batches of this process in an epoch."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Continue with the order of this epoch."""

    @abstractmethod
    def _batches(self, start: int) -> Iterator[Batch]:
        """The batches of this process in this epoch from number ``start`` on."""

    def __iter__(self) -> Iterator[Batch]:
        return self._batches(0)

    def endless(self, step: int = 0) -> Iterator[Batch]:
        """Batches, epoch after epoch, from number ``step`` on."""
        while True:
            epoch, position = divmod(step, len(self))
            self.set_epoch(epoch)
            yield from self._batches(position)
            step += len(self) - position


class FrameLoader(EpochLoader):
    r"""Iterates over mini-batches of graphs; each equals ``Batch.from_data_list`` of the same frames.

    PyG collates every key of every graph for every batch, which takes as long as a training step if graphs have a
    hierarchy. Here all frames are flattened once into one tensor per key. A *chunk* of many batches is then gathered in
    one vectorised step (with the increments of PyG's ``__inc__``), and a batch
    is a set of views into its chunk.

    Args:
        frames: graphs with the same keys; every value a tensor, a number or a string.
        batch_size: graphs per batch and process.
        shuffle: new order in every epoch, a pure function of ``seed`` and the epoch.
        drop_last: leave out an incomplete last batch.
        device: device of the flat tensors.
        rank, world: share of this process; by default taken from torch.distributed when iteration starts.
        chunk: batches gathered at once.
    Cost: O(size of the frames) memory once, plus one chunk.
    Raises: ValueError: no frames, frames with unequal keys, ``batch_size < 1``; TypeError: a value that is
        neither tensor, number nor string.
    """

    def __init__(
        self,
        frames: Sequence[Data],
        batch_size: int = 1,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        rank: int | None = None,
        world: int | None = None,
        chunk: int = 128,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(frames) == 0:
            raise ValueError("frames is empty: a loader needs at least one graph")
        self.batch_size, self.drop_last, self.chunk = batch_size, drop_last, chunk
        super().__init__(rank, world)
        self.sampler = EpochSampler(len(frames), shuffle, seed)
        # The batch class of PyG for these frames; making one by Batch(...) inspects signatures every time.
        self._batch_class = type(Batch(_base_cls=type(frames[0])))
        keys = _common_keys(frames)
        words = [key for key in keys if isinstance(frames[0][key], str)]
        self._words = {key: [frame[key] for frame in frames] for key in words}
        self._columns = {key: _column(frames, key).to(device) for key in keys if key not in self._words}
        self._num_nodes = torch.tensor([frame.num_nodes for frame in frames], device=device)
        # PyG writes num_nodes into a batch only if a frame has it explicitly.
        self._explicit_num_nodes = "num_nodes" in frames[0]._store
        self.device = torch.device(device)

    # -- size and order ------------------------------------------------------------------------------------
    @property
    def num_frames(self) -> int:
        return self.sampler.num_frames

    def __len__(self) -> int:
        rank, world = self._ranks()
        share = self.sampler.share(rank, world)
        return share // self.batch_size if self.drop_last else math.ceil(share / self.batch_size)

    def digest(self, count: int | None = None) -> str:
        """SHA-256 over the first ``count`` frames (by default all), without their hierarchies."""
        count = self.num_frames if count is None else count
        found = hashlib.sha256(self._num_nodes[:count].numpy(force=True).tobytes())
        for key, words in self._words.items():
            found.update(f"{key} {words[:count]}".encode())
        for key, column in self._columns.items():
            if is_topology_key(key):
                continue
            values = column.values.narrow(column.dim, 0, int(column.start[count])).contiguous().cpu()
            found.update(f"{key} {values.dtype} {list(values.shape)}".encode())
            found.update(column.start[: count + 1].numpy(force=True).tobytes())
            found.update(values.numpy().tobytes())
        return found.hexdigest()

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    # -- batches -------------------------------------------------------------------------------------------
    def _batches(self, start: int) -> Iterator[Batch]:
        order = self.sampler.order(*self._ranks())
        if self.drop_last:
            order = order[: len(order) // self.batch_size * self.batch_size]
        step = self.chunk * self.batch_size
        for first in range(start * self.batch_size, len(order), step):
            yield from self._gather(order[first : first + step])

    def batch(self, index: Sequence[int] | Int[Tensor, " graphs"]) -> Batch:
        """One batch of the frames ``index``, in that order."""
        index = torch.as_tensor(index, dtype=torch.long)
        return next(self._gather(index, batch_size=len(index)))

    def _gather(self, order: Tensor, batch_size: int | None = None) -> Iterator[Batch]:
        """Collate the frames ``order`` together and yield them in batches."""
        size = batch_size or self.batch_size
        order = order.to(self.device)
        graphs = torch.arange(len(order), device=self.device)
        first_graph = graphs // size * size  # of the batch that a graph belongs to
        bounds = torch.tensor([*range(0, len(order), size), len(order)], device=self.device)
        counts = self._num_nodes[order]
        start = _cumulate(counts)
        num_nodes = start[bounds].diff().tolist()
        ends = start[1:] - start[first_graph]
        parts: dict[str, Any] = {
            key: _split(column, order, first_graph, bounds) for key, column in self._columns.items()
        }
        for key, words in self._words.items():
            chosen = [words[frame] for frame in order.tolist()]
            parts[key] = [chosen[first : first + size] for first in range(0, len(chosen), size)]
        if self._explicit_num_nodes:
            parts["num_nodes"] = num_nodes
        parts["batch"] = torch.repeat_interleave(graphs - first_graph, counts).split(num_nodes)
        num_graphs = bounds.diff().tolist()
        zero = ends.new_zeros(1)
        for number, ptr in enumerate(ends.split(num_graphs)):
            batch = type.__call__(self._batch_class)
            # Straight into the storage: Data.__setattr__ costs more than the views themselves.
            store = batch._store._mapping
            for key, pieces in parts.items():
                store[key] = pieces[number]
            store["ptr"] = torch.cat((zero, ptr))
            batch.__dict__["_num_graphs"] = num_graphs[number]
            yield batch

    def __repr__(self) -> str:
        return (
            f"FrameLoader({self.num_frames} frames, {len(self)} batches of {self.batch_size}, "
            f"keys={list(self._columns)})"
        )


def _common_keys(frames: Sequence[Data]) -> list[str]:
    keys = [key for key in sorted(frames[0].keys()) if key not in ("batch", "ptr", "num_nodes")]
    expected = set(frames[0].keys())
    for number, frame in enumerate(frames):
        if odd := expected.symmetric_difference(frame.keys()):
            raise ValueError(
                f"every frame needs the same keys: frame {number} and frame 0 differ in {sorted(odd)}; "
                "drop the key or give it to all frames, and train on periodic or on open frames alone"
            )
    return keys


def _column(frames: Sequence[Data], key: str) -> _Column:
    """Flatten one key over all frames, as PyG's collate does, without the increments."""
    values, increments = [], []
    for frame in frames:
        value = frame[key]
        if isinstance(value, (bool, int, float)):
            value = torch.tensor(value)
        if not isinstance(value, Tensor):
            raise TypeError(f"FrameLoader batches tensors, numbers and strings; {key!r} holds {type(value).__name__}")
        values.append(value)
        increments.append(frame.__inc__(key, value))
    dim = frames[0].__cat_dim__(key, values[0])
    if dim is None or values[0].dim() == 0:
        values, dim = [value.unsqueeze(0) for value in values], 0
    dim = dim % values[0].dim()
    sizes = torch.tensor([value.shape[dim] for value in values])
    try:
        flat = torch.cat(values, dim=dim)
    except RuntimeError as error:
        raise ValueError(f"frames disagree about the shape of {key!r}: {error}") from error
    steps = torch.stack([torch.as_tensor(step) for step in increments])
    return _Column(flat, _cumulate(sizes), dim, steps if bool((steps != 0).any()) else None)


def _cumulate(counts: Tensor) -> Tensor:
    """[a, b, ...] -> [0, a, a+b, ...]"""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _split(column: _Column, order: Tensor, first_graph: Tensor, bounds: Tensor) -> tuple[Tensor, ...]:
    """Values of the frames ``order``, cut at the ``bounds`` of the batches; indices are local to a batch."""
    counts = (column.start[1:] - column.start[:-1])[order]
    start = _cumulate(counts)
    offset = column.start[order] - start[:-1]
    rows = torch.arange(int(start[-1]), device=order.device) + torch.repeat_interleave(offset, counts)
    values = column.values.index_select(column.dim, rows)
    if column.increment is not None:
        step = column.increment[order]
        before = step.cumsum(0) - step
        local = before - before[first_graph]
        shift = torch.repeat_interleave(local, counts, dim=0)
        # [entries] or [entries, ..., 1]: the entries of a graph lie along column.dim.
        if shift.dim() == 1:
            shift = shift.view([-1 if dim == column.dim else 1 for dim in range(values.dim())])
        else:
            shift = shift.squeeze(-1).movedim(0, column.dim)
        values = values + shift.to(values.dtype)
    pieces: tuple[Tensor, ...] = values.split(start[bounds].diff().tolist(), column.dim)
    return pieces
