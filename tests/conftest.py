"""Hypothesis profiles: `pytest --hypothesis-profile=thorough` looks for longer than the suite has time for."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("thorough", max_examples=2000, stateful_step_count=100)
