"""What every test shares: one thread, fixed seeds, rotations, a few molecules, and the data folder.

The package is not imported at the start, so that a run may switch on jaxtyping's import hook
(``--jaxtyping-packages=nbody_pyg,beartype.beartype``) before the first import.
"""

from __future__ import annotations

import os
import random
import sys
import zlib
from pathlib import Path

# Before torch and matplotlib are imported: they read these once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Networks of tests are compiled for longer than they run. NBODY_CFLAGS= (empty) compiles them as users have them
os.environ.setdefault("NBODY_CFLAGS", "-O1")

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# Without a GPU its kernels run in Triton's interpreter, which has to be switched on before anything imports Triton
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Derandomised: a failure is the same failure tomorrow. No deadline: the machine may be busy.
hypothesis.settings.register_profile(
    "nbody", max_examples=25, deadline=None, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "nbody"))


def pytest_addoption(parser) -> None:
    parser.addoption("--part", metavar="K/N", help="run only part K (0 to N - 1) of N of the tests, as .ci/run does")
    parser.addoption("--annotations", action="store_true", help="check the annotated shapes and types at every call")


def pytest_configure(config) -> None:
    if config.getoption("annotations"):
        import annotations  # here, because it needs beartype

        config.pluginmanager.register(annotations)


def pytest_collection_modifyitems(config, items) -> None:
    """Leave out the tests of other parts; a function stays whole, so that its fixtures are made once."""
    if (given := config.getoption("part")) is None:
        return
    part, parts = read_part(given)
    others = [item for item in items if part_of(item.nodeid, parts) != part]
    if others:
        config.hook.pytest_deselected(items=others)
        left_out = set(others)
        items[:] = [item for item in items if item not in left_out]


def read_part(text: str) -> tuple[int, int]:
    """``"K/N"`` as two numbers with 0 <= K < N."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise pytest.UsageError(f"--part must be K/N with 0 <= K < N, got {text!r}; try 0/10")
    return int(part), int(parts)


def part_of(nodeid: str, parts: int) -> int:
    """The part of a test function, the same on every machine."""
    return zlib.crc32(nodeid.partition("[")[0].encode()) % parts


# Atomic numbers and positions in angstrom. Every molecule has at least four atoms that lie in no
# plane and at least two elements: planar and two-atom inputs let broken covariance pass.
MOLECULES = {
    "methanol": (
        [6, 8, 1, 1, 1, 1],
        [
            [-0.0503, 0.6685, 0.0102],
            [-0.0497, -0.7585, -0.0203],
            [-1.0807, 0.9987, 0.0311],
            [0.4612, 1.0653, -0.8785],
            [0.4533, 1.0405, 0.9122],
            [0.8623, -1.0551, 0.0254],
        ],
    ),
    # The carbon carries H, F, O and N: the mirror image is another molecule
    "chiral": (
        [6, 9, 8, 7, 1, 1, 1, 1],
        [
            [0.0214, -0.0108, 0.3122],
            [1.2603, -0.1312, 0.9001],
            [-0.7714, -1.0923, 0.6487],
            [-0.5631, 1.2411, 0.6812],
            [0.1311, -0.0402, -0.7801],
            [-0.9822, -1.1104, 1.5831],
            [-0.0504, 2.0017, 0.2405],
            [-1.5207, 1.2933, 0.3379],
        ],
    ),
    "ethanol": (
        [6, 6, 8, 1, 1, 1, 1, 1, 1],
        [
            [0.0072, -0.5687, 0.0121],
            [-1.2854, 0.2499, -0.0083],
            [1.1304, 0.3147, -0.0315],
            [0.0392, -1.1972, 0.9018],
            [0.0455, -1.1916, -0.8822],
            [-1.3175, 0.8784, -0.8977],
            [-1.3276, 0.8723, 0.8858],
            [-2.1422, -0.4239, 0.0191],
            [1.9857, -0.1365, 0.0402],
        ],
    ),
}


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (for third parties that draw from numpy's global state)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plots_without_layout(request, monkeypatch):
    """Half of the time of a short training run is the layout of its plots. A test with the mark ``layout`` has it."""
    if request.node.get_closest_marker("layout") is None and "matplotlib.layout_engine" in sys.modules:
        engine = sys.modules["matplotlib.layout_engine"].ConstrainedLayoutEngine
        monkeypatch.setattr(engine, "execute", lambda self, figure: None)


@pytest.fixture(autouse=True)
def _default_dtype_is_left_alone():
    before = torch.get_default_dtype()
    yield
    after = torch.get_default_dtype()
    torch.set_default_dtype(before)
    assert after == before, f"the test left torch's default dtype at {after}"


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers of the test's own."""
    return torch.Generator().manual_seed(1803)


def _orthogonal(determinant: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix, uniform over those of the determinant, in float64."""
    q, r = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    q = q * torch.sign(torch.diagonal(r))
    return q * (torch.sign(torch.linalg.det(q)) * determinant)


@pytest.fixture(params=[1, -1], ids=["proper", "improper"])
def rotation(request, generator) -> torch.Tensor:
    """A random rotation, then a random rotation with inversion: ``[3, 3]``, float64."""
    return _orthogonal(request.param, generator)


@pytest.fixture
def random_rotation(generator):
    """A function ``(determinant=1) -> [3, 3]``: a new random orthogonal matrix at each call."""
    return lambda determinant=1: _orthogonal(determinant, generator)


class _Copies(dict):
    """Gives out copies, so that no test can change the molecules of the next one."""

    def __getitem__(self, name):
        return tuple(t.clone() for t in super().__getitem__(name))


@pytest.fixture(scope="session")
def molecules() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> atomic numbers ``[N]`` and positions ``[N, 3]`` in float64."""
    return _Copies(
        {name: (torch.tensor(z), torch.tensor(pos, dtype=torch.float64)) for name, (z, pos) in MOLECULES.items()}
    )


@pytest.fixture
def ethanol(molecules):
    """Ethanol as AtomicData."""
    from nbody_pyg.data import AtomicData

    z, pos = molecules["ethanol"]
    return AtomicData(z=z, pos=pos)


@pytest.fixture(params=sorted(MOLECULES))
def molecule(request, molecules) -> tuple[torch.Tensor, torch.Tensor]:
    """Each molecule in turn: atomic numbers ``[N]`` and a copy of the positions ``[N, 3]``, float64."""
    z, pos = molecules[request.param]
    return z.clone(), pos.clone()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of benchmark data: ``NBODY_DATA``, or ``../shared/data`` beside the project."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("NBODY_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no benchmark data: {folder} is no folder; set NBODY_DATA to where it lies")
    return folder
