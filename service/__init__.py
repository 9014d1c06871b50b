"""The KV cache as a gRPC service, its Python client and the command line.

    from numbaflash_service import Client

    with Client("127.0.0.1:50051") as client, client.create_session(
        num_layers=32, num_kv_heads=8, head_dim=128, capacity=4096
    ) as session:
        out = session.prefill(layer, q, k, v)

Nothing is imported before it is used: the command line works, as far as it can, without the `service` extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import TLS as TLS
    from .client import Client as Client
    from .client import RetryPolicy as RetryPolicy
    from .client import Session as Session
    from .errors import ServiceError as ServiceError

_HOMES = {"TLS": "client", "Client": "client", "RetryPolicy": "client", "Session": "client", "ServiceError": "errors"}
__all__ = ["TLS", "Client", "RetryPolicy", "ServiceError", "Session"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
