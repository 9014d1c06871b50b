"""Nothing is imported that was not asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

OTHERS = {"torch", "transformers", "onnx", "grpc"}


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        ("numbaflash", set()),
        ("numbaflash.flash_attn", set()),
        ("numbaflash.flash_attn.bert_padding", set()),
        ("numbaflash.integrations", set()),
        ("numbaflash.integrations.torch", {"torch"}),
        ("numbaflash.integrations.onnx", {"onnx"}),
    ],
)
def test_a_door_brings_its_own_library_alone(module: str, needs: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({OTHERS!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == needs
