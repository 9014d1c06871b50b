"""Hypothesis profiles, and which tests stay together where several processes share them out.

`pytest --hypothesis-profile=thorough` looks for longer than the suite has time for.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("thorough", max_examples=2000, stateful_step_count=100)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a file in one process (`-n 2 --dist loadgroup`): they share servers, and builds of kernels.

    The demo's share the language model, and its download.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            together = item.path.parent if item.path.parent.name == "demo" else item.path
            item.add_marker(pytest.mark.xdist_group(together.name))
