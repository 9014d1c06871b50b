"""The kernels that Numba's own documentation teaches with, and its math functions, as they are written there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numba import cuda, float32, int32

from numbaflash import emulator

TILE = 16


@cuda.jit
def tiled_product(a, b, c):  # type: ignore[no-untyped-def]
    """Matrix product through tiles in shared memory, for any size."""
    tile_a = cuda.shared.array((TILE, TILE), float32)
    tile_b = cuda.shared.array((TILE, TILE), float32)
    x, y = cuda.grid(2)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    total = float32(0.0)
    for i in range((a.shape[1] + TILE - 1) // TILE):
        tile_a[ty, tx] = 0
        tile_b[ty, tx] = 0
        if y < a.shape[0] and tx + i * TILE < a.shape[1]:
            tile_a[ty, tx] = a[y, tx + i * TILE]
        if x < b.shape[1] and ty + i * TILE < b.shape[0]:
            tile_b[ty, tx] = b[ty + i * TILE, x]
        cuda.syncthreads()
        for j in range(TILE):
            total += tile_a[ty, j] * tile_b[j, tx]
        cuda.syncthreads()
    if y < c.shape[0] and x < c.shape[1]:
        c[y, x] = total


def test_matrix_product_with_shared_memory() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((50, 37)).astype("f4"), rng.random((37, 45)).astype("f4")
    c = np.zeros((50, 45), "f4")
    emulator.launch(tiled_product, (3, 4), (TILE, TILE), a, b, c)
    np.testing.assert_allclose(c, a @ b, rtol=1e-5)


@cuda.jit
def halving_sum(data):  # type: ignore[no-untyped-def]
    """Reduction in shared memory, the distance doubling."""
    t = cuda.threadIdx.x
    buffer = cuda.shared.array(256, int32)
    buffer[t] = data[t]
    cuda.syncthreads()
    step = 1
    while step < cuda.blockDim.x:
        if t % (2 * step) == 0:
            buffer[t] += buffer[t + step]
        step *= 2
        cuda.syncthreads()
    if t == 0:
        data[t] = buffer[0]


def test_reduction_in_shared_memory() -> None:
    data = np.arange(256, dtype="i4")
    emulator.launch(halving_sum, 1, 256, data)
    assert data[0] == 255 * 128


@cuda.jit
def warp_sums(x, out):  # type: ignore[no-untyped-def]
    """Reduction by shuffles within warps and atomics between them."""
    i = cuda.grid(1)
    value = x[i] if i < x.size else float32(0)
    offset = 16
    while offset > 0:
        value += cuda.shfl_down_sync(0xFFFFFFFF, value, offset)
        offset //= 2
    if cuda.laneid == 0:
        cuda.atomic.add(out, 0, value)


@pytest.mark.parametrize("threads", [64, 96, 256])
def test_reduction_with_shuffles(threads: int) -> None:
    x = np.arange(1000, dtype="f4")
    out = np.zeros(1, "f4")
    emulator.launch(warp_sums, -(-1000 // threads), threads, x, out)
    assert out[0] == x.sum()


@cuda.jit
def histogram(x, low, high, bins):  # type: ignore[no-untyped-def]
    width = (high - low) / bins.shape[0]
    for i in range(cuda.grid(1), x.shape[0], cuda.gridsize(1)):
        place = int32((x[i] - low) / width)
        if 0 <= place < bins.shape[0]:
            cuda.atomic.add(bins, place, 1)


def test_histogram_with_atomics() -> None:
    x = np.random.default_rng(1).normal(size=3000).astype("f4")
    bins = np.zeros(10, "i4")
    emulator.launch(histogram, 4, 64, x, np.float32(-4), np.float32(4), bins)
    np.testing.assert_array_equal(bins, np.histogram(x, bins=10, range=(-4, 4))[0])


@cuda.jit
def inclusive_scan(x, out):  # type: ignore[no-untyped-def]
    """Scan by shuffles in warps, then over the warps' totals."""
    totals = cuda.shared.array(32, int32)
    t = cuda.threadIdx.x
    lane, warp = t % 32, t // 32
    value = x[t]
    step = 1
    while step < 32:
        other = cuda.shfl_up_sync(0xFFFFFFFF, value, step)
        if lane >= step:
            value += other
        step *= 2
    if lane == 31:
        totals[warp] = value
    cuda.syncthreads()
    if warp == 0:
        total = totals[lane] if lane < cuda.blockDim.x // 32 else 0
        step = 1
        while step < 32:
            other = cuda.shfl_up_sync(0xFFFFFFFF, total, step)
            if lane >= step:
                total += other
            step *= 2
        totals[lane] = total
    cuda.syncthreads()
    if warp > 0:
        value += totals[warp - 1]
    out[t] = value


def test_scan_with_shuffles() -> None:
    x = np.random.default_rng(2).integers(-100, 100, 512).astype("i4")
    out = np.zeros(512, "i4")
    emulator.launch(inclusive_scan, 1, 512, x, out)
    np.testing.assert_array_equal(out, np.cumsum(x))


@cuda.jit
def mandelbrot(image, low_x, high_x, low_y, high_y, iterations):  # type: ignore[no-untyped-def]
    x, y = cuda.grid(2)
    if x < image.shape[1] and y < image.shape[0]:
        c_re = low_x + x * (high_x - low_x) / image.shape[1]
        c_im = low_y + y * (high_y - low_y) / image.shape[0]
        z_re, z_im = 0.0, 0.0
        count = 0
        while count < iterations and z_re * z_re + z_im * z_im < 4.0:
            z_re, z_im = z_re * z_re - z_im * z_im + c_re, 2.0 * z_re * z_im + c_im
            count += 1
        image[y, x] = count


def test_mandelbrot_with_threads_that_stop_at_different_times() -> None:
    image = np.zeros((24, 32), "i4")
    emulator.launch(mandelbrot, (2, 2), (16, 16), image, -2.0, 1.0, -1.0, 1.0, 30)
    c = (-2 + 3 * np.arange(32) / 32) + 1j * (-1 + 2 * np.arange(24) / 24)[:, None]
    z, count = np.zeros_like(c), np.zeros(c.shape, "i4")
    with np.errstate(all="ignore"):
        for _ in range(30):
            inside = np.abs(z) < 2
            z = np.where(inside, z * z + c, z)
            count += inside
    assert (image == count).mean() > 0.98  # a fused multiply-add may decide a point at the edge otherwise


@cuda.jit
def laplace(u, out):  # type: ignore[no-untyped-def]
    i = cuda.grid(1)
    if 0 < i < u.size - 1:
        out[i] = u[i - 1] + u[i + 1] - 2 * u[i]


def test_finite_differences() -> None:
    u = np.random.default_rng(3).random(1001)
    out = np.zeros_like(u)
    emulator.launch(laplace, 8, 128, u, out)
    np.testing.assert_allclose(out[1:-1], u[:-2] + u[2:] - 2 * u[1:-1], atol=1e-15)


FUNCTIONS: list[tuple[str, Any, float, float]] = [
    ("sin", np.sin, -200, 200),
    ("cos", np.cos, -1e6, 1e6),
    ("tan", np.tan, -3, 3),
    ("exp", np.exp, -20, 20),
    ("log", np.log, 1e-6, 1e6),
    ("log2", np.log2, 1e-6, 1e6),
    ("log1p", np.log1p, -0.9, 10),
    ("expm1", np.expm1, -3, 3),
    ("sqrt", np.sqrt, 0, 1e6),
    ("tanh", np.tanh, -5, 5),
    ("erf", np.vectorize(math.erf), -3, 3),
    ("gamma", np.vectorize(math.gamma), 0.5, 10),
    ("asin", np.arcsin, -1, 1),
    ("atan", np.arctan, -50, 50),
    ("sinh", np.sinh, -5, 5),
    ("floor", np.floor, -100, 100),
    ("ceil", np.ceil, -100, 100),
]


def unary_kernel(name: str) -> Any:
    function = getattr(math, name)

    def kernel(x, out):  # type: ignore[no-untyped-def]
        i = cuda.grid(1)
        out[i] = function(x[i])

    return cuda.jit(kernel)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f4", 1e-6), ("f8", 1e-14)])
@pytest.mark.parametrize(("name", "oracle", "low", "high"), FUNCTIONS, ids=lambda x: x if isinstance(x, str) else "")
def test_math_functions(name: str, oracle: Any, low: float, high: float, dtype: str, tolerance: float) -> None:
    x = np.linspace(low, high, 256).astype(dtype)
    out = np.zeros_like(x)
    emulator.launch(unary_kernel(name), 2, 128, x, out)
    expected = oracle(x.astype("f8"))
    np.testing.assert_allclose(out, expected, rtol=tolerance * 4, atol=tolerance)


@cuda.jit(fastmath=True)
def fast(x, out):  # type: ignore[no-untyped-def]
    i = cuda.grid(1)
    out[i] = math.sin(x[i]) / math.exp(x[i]) + math.sqrt(x[i])


def test_fast_math() -> None:
    x = np.linspace(0.1, 3, 128).astype("f4")
    out = np.zeros_like(x)
    emulator.launch(fast, 1, 128, x, out)
    np.testing.assert_allclose(out, np.sin(x) / np.exp(x) + np.sqrt(x), rtol=1e-5)


@cuda.jit
def integer_mix(a, b, out):  # type: ignore[no-untyped-def]
    i = cuda.grid(1)
    out[i] = (a[i] // b[i]) * 3 + a[i] % b[i] + cuda.popc(a[i]) + cuda.clz(b[i]) + (a[i] >> 3) - cuda.brev(b[i])


def test_integer_functions() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 2**31, 128).astype("u4"), rng.integers(1, 1000, 128).astype("u4")
    out = np.zeros(128, "i8")
    emulator.launch(integer_mix, 1, 128, a, b, out)
    rows = zip(a.tolist(), b.tolist(), strict=True)
    expected = [
        x // y * 3 + x % y + x.bit_count() + 32 - y.bit_length() + (x >> 3) - int(f"{y:032b}"[::-1], 2) for x, y in rows
    ]
    np.testing.assert_array_equal(out.astype("u4"), np.array(expected).astype("u4"))
