"""The wheel works where nothing but Python is installed, from outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
import numpy as np, numbaflash, numbaflash_service
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 40, 2, 16), np.float32) for _ in range(3))
whole = numbaflash.attention(q, k, v, causal=True)[0]
cache = numbaflash.RingKVCache(1, 2, 16, capacity=64, dtype="float32")
steps = np.concatenate([cache.step(0, q[0, i:i + 8], k[0, i:i + 8], v[0, i:i + 8]) for i in range(0, 40, 8)])
np.testing.assert_allclose(steps, whole, atol=1e-5)
print(numbaflash.__file__)
"""


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    run(folder / "venv/bin/python", "-m", "pip", "install", "--quiet", wheel)
    return folder


@pytest.mark.slow  # builds the wheel and installs it with its dependencies: half a minute
def test_the_wheel_computes_in_an_empty_environment(empty_environment):
    where = run(empty_environment / "venv/bin/python", "-c", USE, cwd=empty_environment)
    assert where.startswith(str(empty_environment))


@pytest.mark.slow  # shares the environment of the test above
def test_a_command_whose_extra_is_missing_says_what_brings_it(empty_environment):
    result = subprocess.run(
        [empty_environment / "venv/bin/numbaflash", "serve"],
        capture_output=True,
        text=True,
        cwd=empty_environment,
        check=False,
    )
    assert result.returncode == 1
    assert "pip install 'numbaflash[service]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
