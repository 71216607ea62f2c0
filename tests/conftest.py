import collections
import contextlib
import os
import shutil

import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is imported: without a GPU the Triton kernels themselves run, interpreted, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
# What torch asks for under deterministic algorithms; it looks once, at the first product by cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(items) -> None:
    """Of each test's cases so many are essential that every value of every parameter occurs; the others are slow.

    A test that marks cases itself is left as it is. A process has groups, or of what is essential whole files: what
    they set up is made once. Groups come first, so that at the end none has a long one to itself.
    """
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    cases = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            values = {(name, repr(value)) for name, value in item.callspec.params.items()}
            cases[item.nodeid.partition("[")[0]].append((item, values))
    for rest in cases.values():
        if any(item.get_closest_marker("slow") for item, _ in rest):
            continue
        unseen = set().union(*(values for _, values in rest))
        while unseen:
            chosen = max(rest, key=lambda case: len(case[1] & unseen))
            rest.remove(chosen)
            unseen -= chosen[1]
        for item, _ in rest:
            item.add_marker("slow")
    for item in items:
        if item.get_closest_marker("xdist_group") is None and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where Triton's kernels run in this session: compiled on a GPU, or interpreted on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def kmeans_device():
    """Where the CUDA extension runs in this session: compiled on a GPU, or emulated on the CPU.

    Without a C++ compiler for the emulation it runs nowhere, and only the other backends are tested. Undone after every
    module, for the others see the extension as it is installed.
    """
    from ccl_fast.kernels import extension  # not above: importing the package imports the Triton kernels

    with pytest.MonkeyPatch.context() as patch:
        real = torch.cuda.is_available() and extension.module is not None
        if not real and shutil.which("c++"):
            from tests.kernels import emulated

            patch.setattr(extension, "module", emulated.build())
        yield torch.device("cuda" if real else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def no_page():
    """Runs leave out report.html, whose pictures take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ccl_fast.commands.report.write_page", lambda path, *_: path.touch() or [])
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Without it tiny products mostly wait for a second thread, for seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torch_defaults():
    """A context in which torch's default dtype and device are others."""

    @contextlib.contextmanager
    def defaults(dtype: str, device: str):
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(device):
                yield
        finally:
            torch.set_default_dtype(torch.float32)

    return defaults


@pytest.fixture
def several_tiles(monkeypatch):
    """Tiles of the blocked log-sum-exp, and blocks of whole rows, so small that tiny batches have several."""
    monkeypatch.setattr("ccl_fast.ops.logsumexp.blocked.BLOCK", 4)
    monkeypatch.setattr("ccl_fast.ops.rowwise.blocks.CPU_ELEMENTS", 40)
    monkeypatch.setattr("ccl_fast.ops.rowwise.blocks.MIN_ROWS", 1)


@pytest.fixture(params=("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def compiler(request) -> str:
    """Of torch.compile. The first follows an operator as far as the second, whose C++ takes seconds to compile."""
    torch.compiler.reset()
    return request.param


@pytest.fixture(params=("reference", "blocked"))
def backend(request) -> str:
    """Of the log-sum-exp, where a module asks for no others."""
    return request.param
