"""The GPU's host path on NVIDIA's own Python bindings, without a GPU: `cuda_driver` stands in for libcuda."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver_process import check_on_a_driver


@pytest.mark.slow  # a process of its own that imports everything anew
def test_what_must_hold_on_a_driver_holds_on_one_with_the_emulator_behind_it(tmp_path):
    check_on_a_driver(Path(__file__).with_name("on_a_driver.py"), tmp_path)
