"""The extensions are compiled exactly where they should be, and the CUDA extension without spills."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.kernels import emulated, registers

setup = emulated.load(ROOT / "setup.py")


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A function that puts an nvcc of some release into a folder; the machine's own is out of sight."""
    monkeypatch.setattr(setup, "USUAL_PREFIX", str(tmp_path / "usual"))

    def put(folder: str, release: str = "13.0") -> str:
        path = tmp_path / folder / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        path.chmod(0o755)
        return str(path)

    return put


def test_the_installed_kernels_do_not_spill():
    module = ROOT / "ccl_fast" / registers.NAME
    if not module.exists():
        pytest.skip("the CUDA extension is not installed")
    if not registers.cuobjdump():
        pytest.skip("no cuobjdump, of CUDA or of Triton")
    found = registers.usage(module)
    assert any("assign" in entry.kernel for entry in found)
    assert [entry for entry in found if entry.stack or entry.local] == []


@pytest.mark.slow
def test_the_kernels_compile_without_spills():
    compiler, reason = emulated.nvcc()
    if not compiler:
        pytest.skip(reason)
    if not registers.cuobjdump():
        pytest.skip("no cuobjdump, of CUDA or of Triton")
    found = registers.usage(emulated.compiled_by_nvcc("_cuda", ""))  # all that nvcc knows
    assert {80, 90} <= {entry.architecture for entry in found}
    assert any("assign" in entry.kernel for entry in found)
    assert [entry for entry in found if entry.stack or entry.local] == []


@pytest.mark.slow
def test_the_selftest_compiles_for_a_gpu():
    compiler, reason = emulated.nvcc()
    if not compiler:
        pytest.skip(reason)
    assert emulated.compiled_by_nvcc("_selftest", "80 90").exists()


def test_nvcc_is_searched_in_order(fake_nvcc, tmp_path):
    folders = ["own", "path", "home/bin", "cuda_path/bin", "usual/bin"]
    own, path, home, cuda_path, usual = (fake_nvcc(folder) for folder in folders)
    environment = {
        "CUDACXX": own,
        "PATH": str(Path(path).parent),
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "cuda_path"),
    }
    for expected in (own, path, home, cuda_path, usual):
        nvcc, reason = setup.choose(environment, "CUDA")
        assert nvcc == expected
        assert "13.0" in reason
        if environment:
            environment.pop(next(iter(environment)))


@pytest.mark.parametrize("of", ["CPU", "CUDA"])
@pytest.mark.parametrize("wanted", ["ON", "", "1", "yes"])
def test_an_unknown_choice_is_an_error(wanted, of):
    with pytest.raises(SystemExit, match="must be auto, on or off"):
        setup.choose({f"CCL_FAST_{of}": wanted}, of)


def test_off_needs_no_reason(fake_nvcc):
    nvcc = fake_nvcc("own")
    assert setup.choose({"CCL_FAST_CUDA": "off", "CUDACXX": nvcc}, "CUDA") == (None, "CCL_FAST_CUDA is off")


@pytest.mark.parametrize("release", [None, "11.8", "unknown"])
def test_without_a_usable_nvcc_auto_goes_without_and_on_fails(fake_nvcc, release):
    environment = {"PATH": "", "CUDACXX": fake_nvcc("own", release)} if release else {"PATH": ""}
    why = {None: "there is no nvcc", "11.8": "is of CUDA 11.8", "unknown": "does not tell"}[release]
    nvcc, reason = setup.choose(environment, "CUDA")
    assert nvcc is None
    assert why in reason
    with pytest.raises(SystemExit, match=re.escape(reason)):
        setup.choose({**environment, "CCL_FAST_CUDA": "on"}, "CUDA")


def test_a_cudacxx_that_is_not_there_is_not_replaced(fake_nvcc):
    fake_nvcc("usual/bin")
    nvcc, reason = setup.choose({"CUDACXX": "/nowhere/nvcc"}, "CUDA")
    assert nvcc is None
    assert "/nowhere/nvcc" in reason


def test_a_cxx_compiler_is_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(setup.sys, "platform", "linux")
    assert setup.choose({"PATH": str(tmp_path)}, "CPU")[0] is None
    with pytest.raises(SystemExit, match=r"CCL_FAST_CPU is on, but there is no c\+\+ or g\+\+ or clang\+\+ on PATH"):
        setup.choose({"PATH": str(tmp_path), "CCL_FAST_CPU": "on"}, "CPU")
    for name in ("clang++", "own"):
        (tmp_path / name).touch(mode=0o755)
    assert setup.choose({"PATH": str(tmp_path)}, "CPU")[0] == str(tmp_path / "clang++")
    assert setup.choose({"PATH": str(tmp_path), "CXX": "own -O1"}, "CPU")[0] == str(tmp_path / "own")
    assert setup.choose({"PATH": str(tmp_path), "CXX": "other"}, "CPU")[0] is None
    monkeypatch.setattr(setup.sys, "platform", "win32")
    assert setup.choose({"PATH": str(tmp_path)}, "CPU")[0] is None


@pytest.mark.parametrize("of", ["CPU", "CUDA"])
@pytest.mark.parametrize(("wanted", "outcome"), [("off", "without the {} extension"), ("maybe", "must be auto")])
def test_setup_says_what_it_does(wanted, outcome, of):
    outcome, environment = outcome.format(of), {**os.environ, f"CCL_FAST_{of}": wanted}
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert outcome in done.stdout + done.stderr
    assert (done.returncode == 0) == (wanted == "off")


def test_the_source_distribution_can_be_built(tmp_path):
    # Its metadata go elsewhere, so that tests at the same time do not write the same files.
    egg = ["egg_info", "--egg-base", tmp_path]
    command = [sys.executable, "setup.py", "--quiet", *egg, "sdist", "--dist-dir", tmp_path]
    environment = {**os.environ, "CCL_FAST_CUDA": "on", "CUDACXX": "/nowhere/nvcc"}  # needs no compiler
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    assert files >= sources | {"setup.py", "CMakeLists.txt", "pyproject.toml"}
    assert not [name for name in files if name.endswith(".so")]
