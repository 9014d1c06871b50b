"""Builds are found again, and never half of one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from numba import cuda, int64, types

from numbaflash.cuda import build as module
from numbaflash.cuda.build import build, disassemble
from numbaflash.cuda.sass import hot_loop, parse
from numbaflash.cuda.tools import find_tool


class Store:
    """Describes a kernel that stores a number."""

    threads, blocks, signature = 32, 1, types.void(int64[::1])

    def __init__(self, number):
        self.number = number

    def __repr__(self):
        return f"Store({self.number})"

    def kernel(self):
        number = self.number

        def store(out):
            out[cuda.threadIdx.x] = number

        return store


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBAFLASH_CACHE_DIR", str(tmp_path))
    build.cache_clear()
    yield tmp_path
    build.cache_clear()


@pytest.mark.usefixtures("own_cache")
def test_a_build_says_its_name_and_what_it_takes():
    built = build(Store(1), (8, 0))
    assert built.name == "store"
    assert ".visible .entry store(" in built.ptx
    assert 0 < built.usage.registers <= 64
    assert (built.usage.spill_bytes, built.usage.stack_bytes) == (0, 0)
    assert any(instruction.name == "STG" for instruction in parse(disassemble(built.cubin)))


@pytest.mark.usefixtures("own_cache")
def test_what_was_built_is_found_on_disk_by_the_next_process(monkeypatch):
    first = build(Store(1), (8, 0))
    build.cache_clear()
    monkeypatch.setattr(module, "_compile", lambda *_: pytest.fail("built again"))
    assert build(Store(1), (8, 0)) == first


def test_another_description_or_target_is_another_build(own_cache):
    assert len({build(Store(number), cc).cubin for number in (1, 2) for cc in ((8, 0), (9, 0))}) == 4
    assert len(list(own_cache.iterdir())) == 4


def test_a_damaged_build_is_built_anew(own_cache):
    first = build(Store(1), (8, 0))
    (stored,) = own_cache.iterdir()
    (stored / "kernel.cubin").write_bytes(b"\x7fELF")
    build.cache_clear()
    assert build(Store(1), (8, 0)) == first
    build.cache_clear()
    assert build(Store(1), (8, 0)) == first
    assert (stored / "kernel.cubin").read_bytes() == first.cubin


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBAFLASH_CACHE_DIR", str(tmp_path / "file"))
    build.cache_clear()
    assert build(Store(1), (8, 0)).cubin
    build.cache_clear()


def test_a_missing_tool_is_named_with_what_brings_it(monkeypatch):
    monkeypatch.setattr(module, "find_tool", lambda _: None)
    with pytest.raises(RuntimeError, match=r"cuobjdump is missing; pip install 'numbaflash\[cuda\]'"):
        disassemble(b"")


@pytest.fixture
def no_wheels(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    find_tool.cache_clear()
    yield
    find_tool.cache_clear()


@pytest.mark.usefixtures("no_wheels")
def test_tools_of_the_system_serve_where_there_are_no_wheels(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_tool("no-such-tool") is None
    tool = tmp_path / "bin" / "cuobjdump"
    tool.parent.mkdir()
    tool.write_text("")
    tool.chmod(0o755)
    assert find_tool("cuobjdump") == str(tool)


def test_a_build_depends_on_what_its_kernel_imports_and_on_nothing_else():
    kernels = Path(module.__file__).parent
    imported = set(module._imports(kernels / "flash_v2.py"))
    assert {kernels / "epilogue.py", kernels / "shapes.py"} <= imported
    assert kernels / "inspection.py" not in imported


@pytest.mark.usefixtures("own_cache")
def test_code_without_tensor_cores_has_no_hot_loop():
    with pytest.raises(ValueError, match="no loop of the listing uses the tensor cores"):
        hot_loop(parse(disassemble(build(Store(1), (8, 0)).cubin)))
