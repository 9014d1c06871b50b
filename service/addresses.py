"""Addresses, as `--listen` and clients have them: HOST:PORT or unix:PATH."""

from __future__ import annotations

import ipaddress


def is_local(address: str) -> bool:
    """Say whether only processes of this machine can be at the other end."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
