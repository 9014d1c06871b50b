"""Weight matrices as the GGUF file has them: small integers, with a scale and a minimum for every 32 of them.

Decoding a token reads every weight once, so its time is the time to read them. One thread takes 24 ms for the model's
135 million at 1.25 bytes, where OpenBLAS in float32 takes 43. One thread is wanted: a product shared by threads waits,
120 times a token, for the slowest of them, and the service wants a core as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

BLOCK = 32  # weights of one row that share a scale and a minimum, in GGUF's Q4_1 and Q8_0


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (outputs, inputs) of weights scale * code + minimum.

    Attributes:
        codes: int8 (outputs, inputs).
        scale: float32 (outputs, inputs / 32).
        minimum: float32 (outputs, inputs / 32).
    """

    codes: npt.NDArray[np.int8]
    scale: Array
    minimum: Array

    @classmethod
    def stack(cls, *matrices: QuantizedMatrix) -> QuantizedMatrix:
        """One matrix of all their outputs, for matrices that read the same inputs."""
        parts = zip(*((m.codes, m.scale, m.minimum) for m in matrices), strict=True)
        return cls(*(np.concatenate(part) for part in parts))

    def rows(self, index: Any = slice(None)) -> Array:
        """Float32 weights of the rows at `index`."""
        codes = np.ascontiguousarray(self.codes[index])
        out = np.empty(codes.shape, np.float32)
        _dequantize(codes, self.scale[index], self.minimum[index], out)
        return out

    def product(self, x: Array) -> Array:
        """Inputs (T, inputs) to outputs (T, outputs), in float32."""
        if len(x) > 1:
            many: Array = x @ self.rows().T
            return many
        one = np.empty((1, len(self.codes)), np.float32)
        _multiply(self.codes, self.scale, self.minimum, x[0], one[0])
        return one


@numba.njit(cache=True, fastmath=True)
def _dequantize(codes: Any, scale: Any, minimum: Any, out: Any) -> None:
    for row in range(codes.shape[0]):
        for block in range(codes.shape[1] // BLOCK):
            for i in range(BLOCK * block, BLOCK * (block + 1)):
                out[row, i] = np.float32(codes[row, i]) * scale[row, block] + minimum[row, block]


@numba.njit(cache=True, fastmath=True)
def _multiply(codes: Any, scale: Any, minimum: Any, x: Any, out: Any) -> None:
    blocks = x.shape[0] // BLOCK
    block_sums = x.reshape(blocks, BLOCK).sum(axis=1)  # what each minimum is multiplied by
    lanes = np.empty(BLOCK, np.float32)  # one sum per place in a block: vectors, added up once a row
    for row in range(codes.shape[0]):
        lanes[:] = 0
        total = np.float32(0)
        for block in range(blocks):
            total += minimum[row, block] * block_sums[block]
            for i in range(BLOCK):
                place = BLOCK * block + i
                lanes[i] += np.float32(codes[row, place]) * (x[place] * scale[row, block])
        for i in range(BLOCK):
            total += lanes[i]
        out[row] = total
