"""The GPU's host path on NVIDIA's own Python bindings, without a GPU: `cuda_driver` stands in for libcuda."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from numbaflash.user_cache import cache_directory

# The driver comes first, for Numba looks for one when it is imported. The bindings call it until the very end, when
# Python cannot answer any more: hence no regular exit.
RUN = """
import os, sys, pathlib, pytest
sys.path.insert(0, sys.argv[4])
import cuda_driver
installed = cuda_driver.install(*map(pathlib.Path, sys.argv[1:3]))

class Plugin:
    @pytest.fixture
    def driver(self):
        return installed

status = pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[3]], plugins=[Plugin()])
sys.stdout.flush()
os._exit(status)
"""


@pytest.mark.slow  # a process of its own that imports everything anew
def test_what_must_hold_on_a_driver_holds_on_one_with_the_emulator_behind_it(tmp_path):
    file = Path(__file__).with_name("on_a_driver.py")
    command = [sys.executable, "-c", RUN, str(tmp_path), str(cache_directory()), str(file), str(file.parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parents[2], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
