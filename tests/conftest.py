"""Hypothesis profiles, and which tests stay together where several processes share them out.

`pytest --hypothesis-profile=thorough` looks for longer than the suite has time for. Where the environment says CI, the
examples are the same in every run: whether a change lands is not to depend on what was drawn for it. Everywhere else
they are new ones each time.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A machine that others use as well stands still for a second now and then: no example need be quick.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI")))
settings.register_profile("patient", _PATIENT)
settings.register_profile("thorough", _PATIENT, max_examples=2000, stateful_step_count=100)
settings.load_profile("patient")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps the tests of a file in one process (`pytest -n 2`): they share servers and builds of kernels."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if "tests/demo/" in file:  # these share the language model, and its download
                return "demo"
            # Builds, which share nothing: one by one, and since large files go first, they fill the gaps at the end.
            return nodeid if file.endswith("test_budgets.py") else file

    return ByFile(config, log)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The counts of each launch on an emulated device."""
    from numbaflash.cuda import device

    reports: list[Any] = []
    launch = device._EmulatedKernel.launch

    def watch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launch(kernel, *args, **kwargs)
        reports.append(kernel._device.last_report)

    monkeypatch.setattr(device._EmulatedKernel, "launch", watch)
    return reports
