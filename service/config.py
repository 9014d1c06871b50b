"""What `numbaflash serve` can be told.

Precedence, first wins: flags of the command line, environment variables `NUMBAFLASH_<FIELD>`, the TOML file named by
`--config` or `NUMBAFLASH_CONFIG`, the defaults below.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from .addresses import is_local

# A prefill chunk of 4 MiB of tensors, and its head.
_DEFAULT_MESSAGE_BYTES = ByteSize((4 << 20) + (64 << 10))


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class ServeConfig(BaseSettings):
    """Configuration of one server process; frozen."""

    model_config = SettingsConfigDict(env_prefix="NUMBAFLASH_", frozen=True, extra="forbid", validate_default=True)

    listen: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        ("127.0.0.1:50051",),
        description="Addresses to serve on, HOST:PORT (port 0: any free one) or unix:PATH; several with commas.",
    )
    backend: Literal["cpu", "cuda", "emulated"] | None = Field(
        None, description="Where attention is computed. Default: cuda where there is a GPU, else cpu."
    )
    kv_memory: ByteSize = Field(
        ByteSize(4 << 30),
        ge=1 << 20,
        lt=1 << 63,
        description="Hard budget for keys and values, for example 4GiB.",
    )
    kv_high_water: float = Field(
        0.9, ge=0, le=1, description="Share of kv_memory above which idle sessions go in advance."
    )
    spill_dir: Path | None = Field(
        None, description="Folder for idle sessions whose memory is needed; without one they are ended, with a notice."
    )
    spill_memory: ByteSize = Field(
        ByteSize(16 << 30), ge=1 << 20, lt=1 << 63, description="Bytes of sessions in spill_dir."
    )
    spill_after: float = Field(1.0, ge=0, description="Seconds without a step after which a session may be spilled.")
    evict_after: float = Field(
        60.0, ge=0, description="Seconds without a step after which one may be ended that cannot be spilled."
    )
    snapshot_dir: Path | None = Field(
        None, description="Folder for snapshots. Default: snapshots in spill_dir; without either there are none."
    )
    snapshot_memory: ByteSize = Field(ByteSize(16 << 30), ge=1 << 20, lt=1 << 63, description="Bytes of snapshots.")
    replay_memory: ByteSize = Field(
        ByteSize(256 << 20),
        ge=1 << 20,
        lt=1 << 63,
        description="Bytes of answers kept so that a step can be sent again.",
    )
    max_message_bytes: ByteSize = Field(
        _DEFAULT_MESSAGE_BYTES,
        ge=64 << 10,
        lt=1 << 31,
        description="Largest message accepted. Clients cut prompts that are larger.",
    )
    max_sessions: PositiveInt = Field(1024, le=1 << 20, description="Sessions at a time.")
    max_calls: PositiveInt = Field(1024, description="Calls under way at a time, each Attend stream one of them.")
    max_queued_steps: PositiveInt = Field(256, description="Steps waiting or running at a time, of all callers.")
    max_queued_bytes: ByteSize = Field(
        ByteSize(256 << 20), ge=1 << 20, description="Bytes of those steps' requests at a time."
    )
    max_queue_time: PositiveFloat = Field(
        30.0, le=3600, description="Seconds that a step may wait before it is refused."
    )
    max_in_flight: PositiveInt = Field(
        64, description="Steps in flight on one Attend stream; beyond it the stream is not read."
    )
    max_batch: PositiveInt = Field(64, description="Steps computed together at most.")
    batch_wait: float = Field(
        0.0, ge=0, le=1, description="Seconds that a step waits for others to be computed with. 0: whatever is there."
    )
    default_ttl: PositiveFloat = Field(
        600.0, description="Seconds without a step after which a session ends, unless its creator said otherwise."
    )
    max_ttl: PositiveFloat = Field(86400.0, le=10 * 365 * 86400, description="Longest time to live in seconds.")
    grace: float = Field(10.0, ge=0, description="Seconds that running calls have to finish when the server stops.")
    quota_sessions: PositiveInt | None = Field(None, description="Sessions of one caller at a time.")
    quota_kv_memory: ByteSize | None = Field(None, description="Keys and values of one caller.")
    quota_tokens_per_second: PositiveFloat | None = Field(
        None,
        description="Tokens of one caller a second, in the long run; one that goes through all layers counts once.",
    )
    tls_cert: Path | None = Field(
        None, description="PEM file of the server's certificate (and those up to its root): TLS on all TCP addresses."
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's key.")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of roots: clients need a certificate of theirs, whose name is the caller's."
    )
    auth_tokens: Path | None = Field(
        None, description="File of the bearer tokens that are accepted, a line 'NAME sha256:DIGEST' for each."
    )
    insecure: bool = Field(
        False, description="Serve other machines without TLS, or without asking who calls, all the same."
    )
    reflection: bool = Field(False, description="Serve gRPC reflection.")
    metrics_port: int | None = Field(
        None, ge=0, lt=1 << 16, description="HTTP port of metrics and the status page; 0: any free one. Default: none."
    )
    metrics_host: str = Field("127.0.0.1", description="Address that port is on.")
    otlp_endpoint: str | None = Field(
        None, description="Collector that OpenTelemetry spans are sent to, such as http://127.0.0.1:4317."
    )
    pin_event_loop: bool = Field(
        True,
        description="Keep the event loop, and the thread that waits on sockets for it, on the CPU where they start.",
    )
    log_format: Literal["json", "text"] | None = Field(
        None, description="Form of the log. Default: text where standard error is a terminal, else json."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @field_validator("listen")
    @classmethod
    def _addresses(cls, listen: tuple[str, ...]) -> tuple[str, ...]:
        if not listen:
            raise ValueError("takes at least one address")
        for address in listen:
            path = address.removeprefix("unix:")
            host, _, port = address.rpartition(":")
            if path == address and not (host and port.isdecimal() and int(port) < 65536):
                raise ValueError(f"got {address!r}; takes HOST:PORT or unix:PATH")
            if not path:
                raise ValueError("takes a path after unix:")
        return listen

    @model_validator(mode="after")
    def _locked(self) -> ServeConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca takes tls_cert and tls_key")
        asks = self.auth_tokens or self.tls_client_ca
        if not (self.local_only or self.insecure or (self.tls_cert and asks)):
            raise ValueError(
                "listen: other machines could connect; takes tls_cert and tls_key, with auth_tokens or tls_client_ca,"
                " or the word that nobody has to be kept out: insecure"
            )
        return self

    @property
    def local_only(self) -> bool:
        """Whether only processes of this machine can connect."""
        return all(map(is_local, self.listen))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources as the module says."""
        assert isinstance(init_settings, InitSettingsSource)
        path = init_settings.init_kwargs.pop("config", None) or os.environ.get("NUMBAFLASH_CONFIG")
        if path is None:
            return init_settings, env_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _readable(path))


def load(config: str | os.PathLike[str] | None = None, **flags: Any) -> ServeConfig:
    """Read the configuration from all its sources.

    Args:
        config: a TOML file of `ServeConfig`'s fields.
        flags: fields given on the command line; None means not given.

    Raises:
        ValueError: a value that a field does not take, or a file that is not TOML (pydantic's error says which).
        FileNotFoundError: there is no such file.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if config is not None:
        given["config"] = config
    return ServeConfig(**given)


def _readable(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():  # pydantic would go on without it
        raise FileNotFoundError(f"configuration file {file} does not exist")
    return file
