"""A process of its own for tests on NVIDIA's Python bindings, without a GPU: `cuda_driver` stands in for libcuda."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def check_on_a_driver(file: Path, directory: Path) -> None:
    """Run a file of tests, which may ask for the fixture `driver`, and see that all of them pass.

    Args:
        file: The tests.
        directory: Where something may be written.
    """
    tests = Path(__file__).parent
    command = [sys.executable, "-c", RUN, str(directory), str(cache_directory()), str(file), str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tests.parent, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
