"""Bugs put into the tensor-core product, one at a time: each is reported, by the right check and at the right line."""

from __future__ import annotations

from typing import Any

import numpy as np
from emulator import tensor_product
from emulator.bug_reports import caught, edited, stands
from emulator.harness import source_line

from numbaflash import emulator

SIZES = (128, 64, 128)
COPY = r"cp\.async\.cg"
INLINED = source_line(tensor_product.product, "def product")
"""Numba's line info puts device functions that it inlines at the first line of the kernel."""


def multiply(ptx: str, arrays: tuple[Any, Any, Any] | None = None) -> Any:
    a, b, c = arrays or tensor_product.operands(*SIZES)
    emulator.launch(ptx, (b.shape[0] // 64, a.shape[0] // 64), 128, a, b, c, shared=tensor_product.SHARED)
    return a, b, c


def test_the_right_product_is_not_reported() -> None:
    a, b, c = multiply(tensor_product.ptx())
    np.testing.assert_allclose(c, a.astype("f8") @ b.astype("f8").T, rtol=1e-4, atol=1e-4)


def test_missing_barrier_before_the_tiles_are_read() -> None:
    ptx = edited(tensor_product.ptx(), r"bar\.sync\s+0;", "", 0)
    error = caught(lambda: multiply(ptx))
    assert error.kind == "shared-race"
    stands(error, ptx, r"ldmatrix", source_line(tensor_product.product, "ldmatrix(stage + (warp"))
    assert error.place.thread is not None
    assert error.place.block == (0, 0, 0)


def test_missing_barrier_before_the_tiles_are_overwritten() -> None:
    ptx = edited(tensor_product.ptx(), r"bar\.sync\s+0;", "", 1)
    error = caught(lambda: multiply(ptx))
    assert error.kind == "shared-race"
    stands(error, ptx, COPY, INLINED, 4)


def test_missing_wait_for_the_copies() -> None:
    ptx = edited(tensor_product.ptx(), r"cp\.async\.wait_group 1;", "")
    error = caught(lambda: multiply(ptx))
    assert error.kind == "in-flight"
    stands(error, ptx, r"ldmatrix", source_line(tensor_product.product, "ldmatrix(stage + (warp"))


def test_waiting_for_one_group_too_few() -> None:
    ptx = tensor_product.ptx().replace("cp.async.wait_group 1;", "cp.async.wait_group 2;")
    error = caught(lambda: multiply(ptx))
    assert error.kind == "in-flight"
    stands(error, ptx, r"ldmatrix", source_line(tensor_product.product, "ldmatrix(stage + (warp"))


def test_shortened_array() -> None:
    a, b, c = tensor_product.operands(*SIZES)
    short = a[:-1].copy()
    ptx = tensor_product.ptx()
    error = caught(lambda: emulator.launch(ptx, (1, 2), 128, short, b, c, shared=tensor_product.SHARED))
    assert error.kind == "bounds"
    stands(error, ptx, COPY, INLINED, 2)
    assert error.place.block == (0, 1, 0)
    assert error.place.thread == (124, 0, 0)
    assert not c.any()


def test_misaligned_copy() -> None:
    a, b, c = tensor_product.operands(*SIZES)
    raw = np.zeros(a.nbytes + 16, "u1")
    shifted = raw[8 : 8 + a.nbytes].view("f2").reshape(a.shape)
    shifted[:] = a
    error = caught(lambda: multiply(tensor_product.ptx(), (shifted, b, c)))
    assert error.kind == "alignment"
    stands(error, tensor_product.ptx(), COPY, INLINED)
    assert error.place.thread == (0, 0, 0)


def test_too_little_shared_memory() -> None:
    a, b, c = tensor_product.operands(*SIZES)
    size = tensor_product.SHARED - 32
    error = caught(lambda: emulator.launch(tensor_product.ptx(), (1, 2), 128, a, b, c, shared=size))
    assert error.kind == "bounds"
    assert "the block has 20448 bytes of shared memory" in error.reason
    stands(error, tensor_product.ptx(), COPY, INLINED, 7)
    assert error.place.thread == (127, 0, 0)


def test_matrix_instruction_in_half_a_warp() -> None:
    ptx = tensor_product.ptx()
    error = caught(
        lambda: emulator.launch(ptx, (1, 2), 112, *tensor_product.operands(*SIZES), shared=tensor_product.SHARED)
    )
    assert error.kind == "collective"  # before anything is read: who is missing matters more than what it left out
    stands(error, ptx, r"ldmatrix", source_line(tensor_product.product, "ldmatrix(stage + (warp"))
    assert error.place.thread == (96, 0, 0)
