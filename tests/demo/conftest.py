from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from threadpoolctl import threadpool_limits

from numbaflash_service.demo import weights
from numbaflash_service.demo.model import Llama
from numbaflash_service.demo.tokenizer import Tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread() -> Iterator[None]:
    """As in the demo: BLAS threads that wait for each other take many times as long where the cores are shared."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(scope="session")
def checkpoint() -> weights.Checkpoint:
    return weights.load()


@pytest.fixture(scope="session")
def dense_weights() -> dict[str, npt.NDArray[Any]]:
    """The file's weights in float32, by `gguf` alone."""
    weights.download()
    reader = gguf.GGUFReader(weights.gguf_path())
    return {t.name: np.asarray(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}


@pytest.fixture(scope="session")
def tokenizer(checkpoint: weights.Checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint.fields)


@pytest.fixture(scope="session")
def model(checkpoint: weights.Checkpoint) -> Llama:
    return Llama(checkpoint)
