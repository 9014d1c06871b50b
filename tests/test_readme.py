"""What stands in the README runs as it stands there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numbaflash
from numbaflash_service.demo.service_process import ServiceProcess, wait_until_serving

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run(block: str, folder: Path, **names: Any) -> dict[str, Any]:
    """Run an example behind those before it; kernels with line info want their source in a file."""
    script = folder / "example.py"
    script.write_text(block)
    return runpy.run_path(str(script), {"np": np, "numbaflash": numbaflash, **names})


def test_the_readme_has_its_examples() -> None:
    assert len(BLOCKS) == 8


@pytest.mark.parametrize("block", [block for block in BLOCKS if "numbaflash_service" not in block])
def test_an_example_runs(block: str, tmp_path: Path) -> None:
    run(block, tmp_path)


def test_the_example_of_the_service_runs_against_a_server(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "numbaflash_service" in block)
    q, k = (np.ones((5, heads, 64), np.float16) for heads in (9, 3))
    with ServiceProcess() as server:
        wait_until_serving(server.target, timeout=300.0, meanwhile=server.check_alive)
        names = run(block.replace("127.0.0.1:50051", server.target), tmp_path, layer=0, q=q, k=k, v=k)
    assert names["out"].shape == q.shape
