"""The emulated device: memory, copies, launches and events behind the interface that a GPU has as well."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from emulator.harness import entry
from hypothesis import given, settings
from hypothesis import strategies as st

from numbaflash.cuda.device import EmulatedDevice
from numbaflash.emulator import Checks, EmulatorError

SCALE = entry(
    "mov.u32 %t, %tid.x; ld.param.u64 %x, [p0]; ld.param.u64 %y, [p1]; mad.wide.u32 %x, %t, 4, %x;"
    "mad.wide.u32 %y, %t, 4, %y; ld.global.f32 %f, [%x]; add.f32 %f, %f, %f; st.global.f32 [%y], %f;",
    2,
    ".reg .b32 %t; .reg .b64 %x, %y; .reg .f32 %f;",
)


@pytest.fixture
def device() -> EmulatedDevice:
    return EmulatedDevice()


def test_launch_works_on_raw_addresses(device: EmulatedDevice) -> None:
    x, out = np.arange(64, dtype="f4"), np.empty(64, "f4")
    source, target = device.allocate(x.nbytes), device.allocate(x.nbytes)
    device.copy_in(source.address, x)
    kernel = device.load(SCALE)
    start = device.default_stream.record()
    kernel.launch(1, 64, np.int64(source.address), np.int64(target.address))
    end = device.default_stream.record()
    device.copy_out(out, target.address)
    np.testing.assert_array_equal(out, 2 * x)
    assert end.seconds_since(start) > 0
    assert device.last_report is not None
    assert device.last_report.global_bytes == 512
    device.copy(target.address, source.address, 32)
    device.fill(target.address + 32, 32)
    device.copy_out(out, target.address)
    np.testing.assert_array_equal(out[:16], [*range(8), *[0] * 8])


def test_memory_is_poison_until_it_is_written(device: EmulatedDevice) -> None:
    out = np.zeros(16, "f4")
    buffer = device.allocate(64)
    device.copy_out(out, buffer.address)
    assert np.isnan(out).all()


def test_freed_memory_is_out_of_bounds(device: EmulatedDevice) -> None:
    source, target = device.allocate(256), device.allocate(256)
    device.fill(source.address, 256)
    kernel = device.load(SCALE)
    address = source.address
    source.close()
    source.close()
    with pytest.raises(EmulatorError, match="out of bounds"):
        kernel.launch(1, 64, address, target.address)
    with pytest.raises(EmulatorError, match="not allocated"):
        device.copy_out(np.zeros(4), address)
    address = target.address
    del target
    gc.collect()
    with pytest.raises(EmulatorError, match="not allocated"):
        device.fill(address, 1)


def test_a_neighbour_is_out_of_reach(device: EmulatedDevice) -> None:
    first, second = device.allocate(100), device.allocate(256)
    with pytest.raises(EmulatorError, match="not allocated"):
        device.fill(first.address, second.address - first.address + 1)
    with pytest.raises(EmulatorError, match="out of bounds"):
        device.load(SCALE).launch(1, 26, first.address, second.address)


def test_limits_of_the_device() -> None:
    device = EmulatedDevice((9, 0), multiprocessors=4, memory_limit=1 << 20, checks=Checks(global_races=False))
    assert device.compute_capability == (9, 0)
    with pytest.raises(MemoryError):
        device.allocate(1 << 20)
    kept = device.allocate(1 << 18)
    assert kept.address % 256 == 0
    with pytest.raises(ValueError, match="loaded for 49152 bytes"):
        device.load(SCALE).launch(1, 32, 0, 0, shared=50000)
    with pytest.raises(ValueError, match="C-contiguous"):
        device.copy_in(kept.address, np.zeros((4, 4))[:, ::2])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=60))
def test_allocations_never_overlap_and_keep_their_bytes(steps: list[tuple[bool, int]]) -> None:
    device = EmulatedDevice()
    live = []
    for number, (free, size) in enumerate(steps):
        if free and live:
            live.pop(size % len(live))[0].close()
            continue
        buffer = device.allocate(size)
        device.fill(buffer.address, size, number % 256)
        live.append((buffer, number % 256))
    for buffer, value in live:
        found = np.empty(buffer.nbytes, "u1")
        device.copy_out(found, buffer.address)
        assert (found == value).all()
        assert buffer.address % 256 == 0
