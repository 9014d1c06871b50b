from __future__ import annotations

import pytest
from numbaflash_service.demo import weights
from numbaflash_service.demo.model import Llama
from numbaflash_service.demo.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def checkpoint() -> weights.Checkpoint:
    return weights.load()


@pytest.fixture(scope="session")
def tokenizer(checkpoint: weights.Checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint.fields)


@pytest.fixture(scope="session")
def model(checkpoint: weights.Checkpoint) -> Llama:
    return Llama(checkpoint)
