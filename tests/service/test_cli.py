"""The command line: what it prints, its exit status, and what it says where an extra is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from numbaflash_service import Client
from numbaflash_service.cli import app
from numbaflash_service.config import ServeConfig


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("command", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_every_field_of_the_configuration_is_an_option_of_serve() -> None:
    serve = typer.main.get_command(app).commands["serve"]
    options = {parameter.name for parameter in serve.params}
    assert set(ServeConfig.model_fields) <= options


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--kv-memory", "lots"], "kv_memory"),
        (["serve", "--listen", "nowhere"], "listen: got 'nowhere'; takes HOST:PORT or unix:PATH"),
        (["serve", "--config", "no.toml"], "no.toml does not exist"),
        (["serve", "--max-sessions", "many"], "Invalid value for '--max-sessions'"),
        (["serve", "--nonsense"], "No such option"),
        (["nonsense"], "No such command"),
    ],
)
def test_bad_usage_is_status_2_and_says_what_is_wrong(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())


def test_sessions_lists_what_a_server_holds(server: Any, client: Client, qkv: Any) -> None:
    session = client.create_session(2, 2, 16, capacity=64, sink_tokens=4)
    session.step(0, **qkv(9))
    table = run("sessions", "--target", server.target)
    assert table.exit_code == 0
    assert f"{session.id[:8]}…" in table.output
    assert max(map(len, table.output.splitlines())) <= 80
    assert table.output.count("…") == 1, "nothing but the id is cut off"
    listed = json.loads(run("sessions", "--target", server.target, "--json").output)
    assert [entry["session_id"] for entry in listed["sessions"]] == [session.id]
    assert (listed["sessions"][0]["min_length"], listed["sessions"][0]["max_length"]) == (0, 9)
    assert listed["usage"]["kv_reserved_bytes"] == session.max_nbytes


def test_a_server_that_is_not_there_is_status_1_in_one_line() -> None:
    result = run("sessions", "--target", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.output.startswith("numbaflash: 127.0.0.1:1: UNAVAILABLE")
    assert len(result.output.splitlines()) == 1


def test_a_missing_extra_is_named_in_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['grpc', 'pydantic_settings']));"
        "from numbaflash_service.cli import main; main()"
    )
    for command in (["serve"], ["sessions"]):
        ended = subprocess.run(
            [sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=tmp_path, timeout=60
        )
        assert ended.returncode == 1
        assert "pip install 'numbaflash[service]'" in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
