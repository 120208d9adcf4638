"""What the tests share: an offload context on a real file, a way to force bytes to the drive, bit-exact comparison."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import inspect
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

# Before PyTorch is loaded: children that are forked from a process that computes in several threads wait for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import inside
import pytest
import torch
from doses import ask_for_all, enough_of
from drives import Drive, ext4_drive, tmpfs_drive
from engine_tools import eventually
from fault_tools import Lab
from folders import HELPERS
from forks import Forks
from run_tools import browser
from torch.utils.checkpoint import checkpoint

import ssdtrain
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.devices.vector_math import settle_vector_math
from ssdtrain.policy import ActivationPolicy

# The least staging there is: slabs of one page, so that even records of a few bytes leave memory soon.
STAGING_NBYTES = 64 * 1024
SLAB_NBYTES = 4096
EAGER = {"min_nbytes": 0, "mode": "all", "staging_nbytes": STAGING_NBYTES, "decline_below_nbytes": 0}

# Tests of tests/standin need the library that plays the GPU: `make test-standin`.
collect_ignore = [] if "standin_gpu" in sys.modules else ["standin"]

LONGEST = ["jobs", "stress", "tools", "test_kvikio.py"]  # folders and files

MakeOffload = Callable[..., ssdtrain.ActivationOffload]
Send = Callable[[], None]
Run = Callable[[Send], Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--devices", default="", help="cpu, simulated and cuda, with commas; default: all there are")
    parser.addoption("--long", action="store_true", help="whole products and full doses; see tests/helpers/doses.py")


def pytest_configure(config: pytest.Config) -> None:
    settle_vector_math()  # most tests train without ssdtrain first, and compare
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # or children that are to be interrupted go on
    if config.getoption("--long"):
        ask_for_all()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of the cache run on every kind of device but for those with a mark: `cpu_only`, `accelerator_only`, or
    `simulated_only`, which hold streams or fork."""
    if "device_kind" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker
        kinds = ["cpu"] if marked("cpu_only") is not None else device_kinds(metafunc.config)
        if marked("accelerator_only") is not None:
            kinds = [kind for kind in kinds if kind != "cpu"]
        if marked("simulated_only") is not None:
            kinds = [kind for kind in kinds if kind == "simulated"]
        metafunc.parametrize("device_kind", kinds, indirect=True, scope="function")


def device_kinds(config: pytest.Config) -> list[str]:
    asked = config.getoption("--devices")
    if asked:
        return asked.split(",")
    has_extension = importlib.util.find_spec("ssdtrain._C") is not None
    return ["cpu", *(["simulated"] if has_extension else []), *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file whose fixtures live as long as it, such as a job of several processes, run in one worker.

    Others go to whoever is free. A scheduler of our own, as what a group is called is lost with pytest 9.2.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if has_shared_fixture(config.rootpath / file) else nodeid

    return Scheduling(config, log)


@cache
def has_shared_fixture(file: Path) -> bool:
    return 'scope="module"' in file.read_text()


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The Python engine moves host memory only, and a host tier is for what is not in host memory.

    Without a GPU `needs_cuda` tests are skipped; FAIL_WITHOUT_CUDA=1 lets them run, and fail. Without a Chromium,
    `needs_browser` tests are.
    """
    items[:] = sorted([item for item in items if not _has_no_point(item)], key=_turn)
    if not config.getoption("--long"):
        kept = enough_of(items)
        config.hook.pytest_deselected(items=list(set(items) - set(kept)))
        items[:] = kept
    for item in items:
        needed = item.get_closest_marker("needs_package")
        if needed is not None and importlib.util.find_spec(needed.args[0]) is None:
            item.add_marker(pytest.mark.skip(reason=f"{needed.args[0]} is not installed"))
    if browser() is None:
        for item in items:
            if item.get_closest_marker("needs_browser") is not None:
                item.add_marker(pytest.mark.skip(reason="no Chromium; apt-get install chromium, or SSDTRAIN_CHROMIUM"))
    if torch.cuda.is_available() or os.environ.get("FAIL_WITHOUT_CUDA", "0") not in ("", "0"):
        return
    for item in items:
        if item.get_closest_marker("needs_cuda") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """From here on a collection looks at what tests made, not at all that PyTorch and the tests are made of."""
    gc.collect()
    gc.freeze()


def _turn(item: pytest.Item) -> int:
    """Workers begin with the longest, so that none is left with one of them at the end."""
    places = [LONGEST.index(name) for name in (item.path.parent.name, item.path.name) if name in LONGEST]
    return min(places, default=len(LONGEST))


def _has_no_point(item: pytest.Item) -> bool:
    """Whether an engine and a kind of device have nothing to do with each other."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    is_cpu = parameters.get("device_kind", "cpu") == "cpu"
    return bool(parameters.get("engine") == ("host" if is_cpu else "python"))


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """PyTorch's own kernels. `torch.backends.mkldnn.flags` does the same and warns of other settings meanwhile."""
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """PyTorch's own kernels on CUDA too: cuDNN's recurrent layers save a reserve, and weights in one flat copy."""
    was_enabled = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(was_enabled)


@contextlib.contextmanager
def strict_kernels() -> Iterator[None]:
    """Kernels of CUDA that give the same bits each time: backward of attention does not without."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    were_strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(were_strict)


@pytest.fixture
def device_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def device(device_kind: str) -> Iterator[SimulatedDevice | None]:
    """The test computes on this kind of device; the object is there only for a simulated one."""
    if device_kind == "simulated":
        with without_onednn(), SimulatedDevice(seed=1) as simulated:  # its LSTM crashes in another thread
            yield simulated
        simulated.close()
    elif device_kind == "cuda":
        with strict_kernels(), torch.device(device_kind):
            yield None
    else:
        with torch.device(device_kind):
            yield None


@pytest.fixture
def make_offload(tmp_path: Path, device: SimulatedDevice | None) -> Iterator[MakeOffload]:
    """Makes contexts that send everything (`EAGER`) unless told otherwise; at the end each must have let go of all."""
    made: list[ssdtrain.ActivationOffload] = []

    def make(model: torch.nn.Module | None = None, **policy: Any) -> ssdtrain.ActivationOffload:
        chosen = ActivationPolicy(**(EAGER | policy))
        made.append(ssdtrain.ActivationOffload([str(tmp_path)], chosen, model, device))
        return made[-1]

    yield make
    if device is not None:
        device.release()  # a test that failed holds streams that what follows would wait for
    if any(offload.stats.num_live_records for offload in made):
        gc.collect()  # of exceptions and their frames; slow, hence only then
        # A thread of autograd's lets go of a node's tensors some time after it told of the node's error.
        eventually(lambda: not any(offload.stats.num_live_records for offload in made))
    accounts = [(offload.stats.num_live_records, *gauges(offload)) for offload in made]
    for offload in made:
        offload.close()
    assert accounts == [(0, 0, 0, 0)] * len(made), (
        "records, or bytes held, prefetched or on disk, outlived their graphs"
    )
    assert list(tmp_path.iterdir()) == [], "files were left behind"


@pytest.fixture
def offload(make_offload: MakeOffload) -> ssdtrain.ActivationOffload:
    """A context that sends everything."""
    return make_offload()


def gauges(offload: ssdtrain.ActivationOffload) -> tuple[int, int, int]:
    """Bytes of saved tensors held in memory, prefetched, and on disk, by the books."""
    store, counters = inside.store(offload), inside.counters(offload)
    at = inside.transport_of(store)
    if at is not None:
        at.engine.drain()
        offload.stats  # noqa: B018  takes note of what the engine did
    return counters.held_nbytes, counters.prefetched_nbytes, at.space.in_use_nbytes if at is not None else 0


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Whatever `torch.compile` has compiled in this process is forgotten before and after."""
    torch._dynamo.reset()
    traces = logging.getLogger("torch.__trace")
    level = traces.level
    traces.setLevel(logging.CRITICAL)  # pytest would have the compiler write down all it does
    yield
    traces.setLevel(level)
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Runs functions in children that have `preload.c` loaded."""
    folder = tmp_path_factory.mktemp("lab")
    lab = Lab(_compile("preload.c", folder / "preload.so"), folder)
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs scripts in children that do not have to import PyTorch."""
    modules = ["torch.distributed.fsdp", "ssdtrain.api.functions", "ssdtrain.tools.demo.model"]
    path = os.pathsep.join(path for path in sys.path if path)
    forks = Forks(tmp_path_factory.mktemp("forks"), modules, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def libcuda_stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that plays the CUDA driver."""
    return _compile("libcuda_stub.c", tmp_path_factory.mktemp("cuda") / "libcuda.so.1")


@pytest.fixture(scope="session")
def kvikio_environment(tmp_path_factory: pytest.TempPathFactory, libcuda_stub: Path) -> Mapping[str, str]:
    """The environment of a process in which kvikio runs without a GPU, and in which faults can be played."""
    if sys.version_info < (3, 11):
        pytest.skip("kvikio has no wheels for Python before 3.11")
    if importlib.util.find_spec("kvikio") is None:
        pytest.skip("kvikio is not installed; `make test` installs what its tests need")
    folder = tmp_path_factory.mktemp("kvikio")
    preload = _compile("preload.c", folder / "preload.so")
    own = {"LD_LIBRARY_PATH": str(libcuda_stub.parent), "LD_PRELOAD": str(preload), "SSDTRAIN_TEST_ENGINES": "kvikio"}
    return os.environ | own | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _compile(source: str, target: Path) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip(f"no C compiler for {source}")
    command = [compiler, "-shared", "-fPIC", "-O1", "-pthread", "-o", target, HELPERS / source, "-ldl"]
    subprocess.run(command, check=True)
    return target


@pytest.fixture
def small_ext4(tmp_path: Path) -> Iterator[Drive]:
    """An ext4 of 24 MiB."""
    with ext4_drive(tmp_path / "ext4", 24 << 20) as drive:
        yield drive


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Drive]:
    """A tmpfs of 6 MiB."""
    with tmpfs_drive(tmp_path / "tmpfs", 6 << 20) as drive:
        yield drive


def unhooked() -> dict[str, Any]:
    """Options of PyTorch's own selective checkpoints, which since 2.14 warn inside hooks unless told what to do."""
    return {"respect_saved_tensors_hooks": False} if "respect_saved_tensors_hooks" in _OF_CHECKPOINT else {}


_OF_CHECKPOINT = inspect.signature(checkpoint).parameters


def send() -> None:
    """Forces everything saved so far onto the drive; to be called inside an `EAGER` context.

    Three results of half a slab each complete whatever small records wait for company. One as large as all of staging
    only starts when nothing else is in flight. The last makes the sequence number move on. All are dropped. A simulated
    accelerator has to come this far first: what it has yet to compute with is still in its memory.
    """
    torch.ones(()).item()
    half = SLAB_NBYTES // 8 - 2  # float32 elements: just below the size that goes alone
    sizes = [half, half, half, STAGING_NBYTES // 4, half]
    graphs = [torch.zeros(size, requires_grad=True).exp() for size in sizes]
    del graphs


def same_bits(left: Any, right: Any) -> bool:
    """Whether two results are equal to the bit: NaN equals the same NaN, and 0.0 is not -0.0."""
    if isinstance(left, torch.Tensor):
        if type(left) is not type(right) or (left.dtype, left.layout) != (right.dtype, right.layout):
            return False
        if not left.is_nested and left.shape != right.shape:  # jagged sizes are symbols, another one for each tensor
            return False
        return all(torch.equal(a, b) for a, b in zip(_bytes_of(left), _bytes_of(right), strict=True))
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same_bits(left[key], right[key]) for key in left)
    if isinstance(left, Sequence) and not isinstance(left, str):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return bool(left == right)


def _bytes_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    tensor = tensor.detach()
    if tensor.is_nested:
        return [part for child in tensor.unbind() for part in _bytes_of(child)]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return _bytes_of(tensor.indices()) + _bytes_of(tensor.values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [p for t in (tensor.crow_indices(), tensor.col_indices(), tensor.values()) for p in _bytes_of(t)]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [p for t in (tensor.ccol_indices(), tensor.row_indices(), tensor.values()) for p in _bytes_of(t)]
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return [plain.reshape(-1).view(torch.uint8)]


def assert_same(run: Run, offload: ssdtrain.ActivationOffload, *, is_offloaded: bool | None = True) -> Any:
    """Runs `run` without and with ssdtrain: results must be equal to the bit. Returns what they were.

    `run` gets a function to call between forward and backward, which puts what was saved so far on the drive.
    `is_offloaded`: whether bytes must, or must not, come back from there; None when it does not matter.
    """
    torch.manual_seed(0)
    expected = run(lambda: None)
    before = offload.stats.read_nbytes
    torch.manual_seed(0)
    with offload:
        actual = run(send)
    assert same_bits(expected, actual), f"without ssdtrain: {expected}\nwith: {actual}"
    gauges(offload)  # with an accelerator a read counts when its copy is over
    assert is_offloaded is None or is_offloaded == (offload.stats.read_nbytes > before), str(offload.stats)
    return expected


def assert_same_error(run: Run, offload: ssdtrain.ActivationOffload, match: str) -> None:
    """Runs `run` without and with ssdtrain: both must raise a RuntimeError whose message matches."""
    for context, put in ((contextlib.nullcontext(), lambda: None), (offload, send)):
        torch.manual_seed(0)
        with context, pytest.raises(RuntimeError, match=match):
            run(put)


def mlp(*, layers: int = 4, width: int = 32) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(*[m for _ in range(layers) for m in (torch.nn.Linear(width, width), torch.nn.GELU())])


def grads_of(module: torch.nn.Module) -> list[torch.Tensor | None]:
    return [p.grad for p in module.parameters()]


def train_once(model: torch.nn.Module, send: Send) -> list[torch.Tensor | None]:
    loss = model(torch.randn(4, 32)).square().sum()
    send()
    loss.backward()
    return grads_of(model)
