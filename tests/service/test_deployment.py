"""What is shipped to deploy the service names settings that exist, and never runs as root."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from numbaflash_service.config import ServeConfig

DEPLOY = Path(__file__).parents[2] / "service" / "deploy"


@pytest.mark.parametrize("name", ["Dockerfile", "numbaflash.service"])
def test_every_setting_that_it_names_exists(name: str) -> None:
    text = (DEPLOY / name).read_text()
    variables = {variable.lower() for variable in re.findall(r"NUMBAFLASH_([A-Z_]+)", text)}
    flags = {flag.replace("-", "_") for flag in re.findall(r"(?<!\S)--([a-z-]+)(?= [/0-9])", text)}
    assert variables
    assert (variables - {"config"}) <= set(ServeConfig.model_fields)
    assert {flag for flag in flags if flag.startswith(("tls", "auth", "metrics"))} <= set(ServeConfig.model_fields)


def test_the_image_runs_as_a_user_of_its_own_and_is_asked_how_it_is() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    words = [line.split()[0] for line in lines if line and line[0].isupper()]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert "USER root" not in lines
    assert "HEALTHCHECK" in words


def test_the_unit_waits_longer_for_the_stop_than_the_server_takes() -> None:
    text = (DEPLOY / "numbaflash.service").read_text()
    assert "DynamicUser=yes" in text
    assert int(re.search(r"TimeoutStopSec=(\d+)", text)[1]) > ServeConfig.model_fields["grace"].default
