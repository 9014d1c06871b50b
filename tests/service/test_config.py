"""Configuration: flags before environment before file before defaults, and every value checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from numbaflash_service.config import ServeConfig, load


def test_flags_go_before_environment_before_file_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "numbaflash.toml"
    file.write_text('kv_memory = "1GiB"\nmax_batch = 7\nmax_sessions = 5\nlisten = ["unix:/run/a", "127.0.0.1:1"]\n')
    monkeypatch.setenv("NUMBAFLASH_KV_MEMORY", "2GiB")
    monkeypatch.setenv("NUMBAFLASH_MAX_BATCH", "8")
    config = load(file, kv_memory="3GiB", max_batch=None)
    assert (config.kv_memory, config.max_batch, config.max_sessions) == (3 << 30, 8, 5)
    assert config.listen == ("unix:/run/a", "127.0.0.1:1")
    assert config.grace == ServeConfig.model_fields["grace"].default
    monkeypatch.setenv("NUMBAFLASH_CONFIG", str(file))
    assert load().max_sessions == 5


def test_several_addresses_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBAFLASH_LISTEN", "127.0.0.1:0, unix:/run/numbaflash")
    assert load().listen == ("127.0.0.1:0", "unix:/run/numbaflash")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("listen", []),
        ("listen", ["localhost"]),
        ("listen", ["127.0.0.1:65536"]),
        ("listen", ["unix:"]),
        ("backend", "tpu"),
        ("kv_memory", "lots"),
        ("kv_memory", -1),
        ("max_message_bytes", 1),
        ("max_message_bytes", "4GiB"),
        ("max_sessions", 0),
        ("batch_wait", -0.1),
        ("default_ttl", 0),
        ("log_level", "loud"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        load(**{field: value})


def test_a_file_that_is_not_there_or_has_unknown_fields_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.toml"):
        load(tmp_path / "no.toml")
    (tmp_path / "typo.toml").write_text("max_batches = 3")
    with pytest.raises(ValueError, match="max_batches"):
        load(tmp_path / "typo.toml")


@pytest.mark.parametrize(
    ("doors", "opens"),
    [
        ({}, False),
        ({"tls_cert": "c", "tls_key": "k"}, False),
        ({"auth_tokens": "t"}, False),
        ({"tls_cert": "c", "tls_key": "k", "auth_tokens": "t"}, True),
        ({"tls_cert": "c", "tls_key": "k", "tls_client_ca": "a"}, True),
        ({"insecure": True}, True),
    ],
)
@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "host.example.org:1"])
def test_other_machines_are_kept_out_unless_they_are_known_or_it_is_said_that_nobody_is(
    listen: str, doors: dict[str, Any], opens: bool
) -> None:
    listens = ["127.0.0.1:1", listen]
    if opens:
        assert load(listen=listens, **doors).local_only is False
    else:
        with pytest.raises(ValueError, match=r"other machines could connect; takes tls_cert .* insecure"):
            load(listen=listens, **doors)
    assert load(listen=["127.0.0.1:1", "unix:/a"], **doors).local_only


@pytest.mark.parametrize("doors", [{"tls_cert": "c"}, {"tls_key": "k"}, {"tls_client_ca": "a"}])
def test_half_of_tls_is_refused(doors: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="tls_cert and tls_key"):
        load(**doors)


@pytest.mark.parametrize(
    ("listen", "local"),
    [
        (["127.0.0.1:1", "[::1]:2", "localhost:3", "unix:/a"], True),
        (["127.0.0.1:1", "0.0.0.0:2"], False),
        (["[::]:1"], False),
        (["127.example.org:1"], False),
    ],
)
def test_what_counts_as_this_machine_alone(listen: list[str], local: bool) -> None:
    assert load(listen=listen, insecure=True).local_only is local
