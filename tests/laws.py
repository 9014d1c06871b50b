"""Properties that hold on every backend; the emulator takes some 20 ms for a step, and so gets fewer examples."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

BACKENDS = ["cpu", "emulated"]


def law(examples, *strategies):
    """Make a property of a function of a backend and of what the strategies draw; some are functions of the backend."""

    def decorate(body):
        @pytest.mark.parametrize("backend", BACKENDS)
        def test(backend):
            count = examples if backend == "cpu" else examples // 8
            drawn = [strategy(backend) if callable(strategy) else strategy for strategy in strategies]
            settings(max_examples=count)(given(*drawn)(body))(backend)

        return test

    return decorate
