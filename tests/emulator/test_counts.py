"""What a launch reports: bank conflicts, sectors, bytes and instructions, against what the access pattern must give."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import tensor_product
from emulator.harness import entry
from numba import cuda, float32, float64

from numbaflash import emulator


@cuda.jit(lineinfo=True)
def strided_shared(out, stride):  # type: ignore[no-untyped-def]
    buffer = cuda.shared.array(1024, float32)
    t = cuda.threadIdx.x
    buffer[(t * stride) % 1024] = t
    cuda.syncthreads()
    out[t] = buffer[(t * stride) % 1024]


@pytest.mark.parametrize(("stride", "ways"), [(1, 1), (2, 2), (3, 1), (4, 4), (8, 8), (17, 1), (32, 32)])
def test_bank_conflicts_follow_the_stride(stride: int, ways: int) -> None:
    report = emulator.launch(strided_shared, 1, 32, np.zeros(32, "f4"), stride)
    for access in report.shared:
        assert (access.wavefronts, access.ideal, access.conflicts) == (ways, 1, ways - 1)
        assert access.nbytes == 128
        assert access.source is not None
        assert access.source.startswith(__file__)
    assert [access.op for access in report.shared] == ["store", "load"]
    assert report.bank_conflicts == 2 * (ways - 1)
    assert report.shared_bytes == 256


@cuda.jit
def broadcast(out):  # type: ignore[no-untyped-def]
    buffer = cuda.shared.array(32, float32)
    t = cuda.threadIdx.x
    buffer[t] = t
    cuda.syncthreads()
    out[t] = buffer[5]


def test_lanes_that_want_the_same_word_do_not_conflict() -> None:
    report = emulator.launch(broadcast, 1, 32, np.zeros(32, "f4"))
    assert report.bank_conflicts == 0


@cuda.jit
def doubles(out):  # type: ignore[no-untyped-def]
    buffer = cuda.shared.array(32, float64)
    t = cuda.threadIdx.x
    buffer[t] = t
    cuda.syncthreads()
    out[t] = buffer[31 - t]


def test_eight_byte_accesses_take_two_wavefronts_without_conflict() -> None:
    report = emulator.launch(doubles, 1, 32, np.zeros(32))
    assert [(x.wavefronts, x.ideal) for x in report.shared] == [(2, 2), (2, 2)]


@cuda.jit
def strided_global(x, out, stride):  # type: ignore[no-untyped-def]
    i = cuda.grid(1)
    out[i] = x[i * stride]


@pytest.mark.parametrize(("stride", "sectors", "efficiency"), [(1, 4, 1.0), (2, 8, 0.5), (8, 32, 0.125), (0, 1, 0.125)])
def test_sectors_follow_the_stride(stride: int, sectors: int, efficiency: float) -> None:
    report = emulator.launch(strided_global, 2, 64, np.zeros(1024, "f4"), np.zeros(128, "f4"), stride)
    load, store = report.global_
    if stride:
        assert (load.requests, load.sectors, load.nbytes) == (4, 4 * sectors, 512)
    assert load.efficiency == efficiency
    assert (store.requests, store.sectors, store.efficiency) == (4, 16, 1.0)
    assert report.global_bytes == 1024


def test_padded_tiles_have_no_conflicts_and_whole_sectors() -> None:
    a, b, c = tensor_product.operands(64, 64, 64)
    report = emulator.launch(tensor_product.ptx(), 1, 128, a, b, c, shared=tensor_product.SHARED)
    matrix = [x for x in report.shared if x.op == "ldmatrix"]
    assert matrix
    assert all(x.conflicts == 0 for x in matrix)
    copies = [x for x in report.global_ if x.op == "copy"]
    assert sum(x.nbytes for x in copies) == a.nbytes + b.nbytes
    assert all(x.efficiency == 1.0 for x in copies)
    assert report.local_bytes == 0


def test_instructions_are_counted_per_warp_and_pipe() -> None:
    a, b, c = tensor_product.operands(64, 64, 64)
    report = emulator.launch(tensor_product.ptx(), 1, 128, a, b, c, shared=tensor_product.SHARED)
    # 4 warps of 16 x 64 outputs: 8 column tiles, 4 steps of 16 in k
    assert report.instructions["tensor"] == 4 * 8 * 4
    matrix_loads = 4 * 4 * (1 + 4)
    copies = 4 * 2 * 4
    stores = 4 * 32
    commits_and_waits = 4 * (1 + 2 * 2)
    assert report.instructions["lsu"] == matrix_loads + copies + stores + commits_and_waits


@pytest.mark.parametrize(("limit", "stores"), [(32, 2), (16, 3), (0, 2)])
def test_diverged_warps_issue_both_sides(limit: int, stores: int) -> None:
    text = entry(
        f"mov.u32 %t, %tid.x; ld.param.u64 %x, [p0]; mad.wide.u32 %x, %t, 4, %x; setp.lt.u32 %p, %t, {limit};"
        "@%p bra low; st.global.u32 [%x], 1; ret; low: st.global.u32 [%x], 2; ret;",
        1,
        ".reg .b32 %t; .reg .b64 %x; .reg .pred %p;",
    )
    assert emulator.launch(text, 1, 64, np.zeros(64, "u4")).instructions["lsu"] == stores
