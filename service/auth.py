"""Names for callers: bearer tokens from a file, and the certificates that TLS has checked."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .errors import UnauthenticatedError
from .principals import ANONYMOUS

log = logging.getLogger(__name__)

# Who comes over a unix socket to a server that asks for certificates: there is no TLS, but only the server's own user
# can open the socket.
LOCAL: Final = "local"

_SCHEME: Final = "bearer "
_LINE: Final = re.compile(r"(?P<name>[!-~]{1,128})\s+sha256:(?P<digest>[0-9a-fA-F]{64})")


class TokenFile:
    """The tokens that callers may bring.

    The file has a line `NAME sha256:DIGEST` for each token: the caller's name, and the SHA-256 of the token in hex.
    A name may have several tokens, so that a new one can be handed out before the old one goes. Empty lines, and what
    follows a `#` at the start of a line, are left out. Tokens themselves are in no file.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
        ValueError: A line is not of this form, or a digest stands there twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _version(path)
        self._names = _parse(path.read_text())

    def name(self, digest: bytes) -> str | None:
        """Return whose token has this digest, or None."""
        # What is looked up is a digest: the time that takes tells about the guess's digest, and nothing of a token.
        return self._names.get(digest)

    def refresh(self) -> None:
        """Read the file again if it has changed; while it cannot be read, the tokens stay as they were."""
        version = _version(self._path)
        if version == self._seen:
            return
        self._seen = version
        try:
            self._names = _parse(self._path.read_text())
        except (OSError, ValueError) as error:
            log.error("the tokens stay as they were: %s", error)
        else:
            log.info("read the tokens again, %d of them", len(self._names))


class Authenticator:
    """Gives every call its caller's name.

    Args:
        tokens: The tokens that are accepted; None: none are asked for.
        certificates: Whether TLS has asked every caller for a certificate.
    """

    def __init__(self, tokens: TokenFile | None = None, *, certificates: bool = False) -> None:
        self._tokens = tokens
        self._certificates = certificates

    @property
    def asks(self) -> bool:
        """Whether callers have to say who they are, so that there can be several."""
        return self._tokens is not None or self._certificates

    def name(self, context: Any) -> str:
        """Return who makes a call, given grpc.aio's context of it: by its token, or else by its certificate.

        Raises:
            UnauthenticatedError: It brings neither, or a token that is not known.
        """
        if self._tokens is not None and (token := _bearer_token(context)) is not None:
            name = self._tokens.name(hashlib.sha256(token).digest())
            if name is None:
                raise UnauthenticatedError("the token is not known")
            return name
        if self._certificates:
            # The first of the certificate's alternative names, or its common name where it has none.
            for identity in context.peer_identities() or ():
                return str(identity, "utf-8", "replace")
            if context.peer().startswith("unix:"):
                return LOCAL
        if self.asks:
            raise UnauthenticatedError("takes the metadata 'authorization: Bearer TOKEN'")
        return ANONYMOUS

    def refresh(self) -> None:
        """Take note of tokens that have been added and taken away."""
        if self._tokens is not None:
            self._tokens.refresh()


def _bearer_token(context: Any) -> bytes | None:
    for key, value in context.invocation_metadata():
        if key == "authorization":
            if not value[: len(_SCHEME)].lower() == _SCHEME:
                raise UnauthenticatedError("takes the metadata 'authorization: Bearer TOKEN', got another scheme")
            return bytes(value[len(_SCHEME) :].strip(), "utf-8")
    return None


def _parse(text: str) -> Mapping[bytes, str]:
    names: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = _LINE.fullmatch(line.strip())
        if parts is None:  # the line itself is not repeated: it may hold a token
            raise ValueError(f"line {number} of the file of tokens is not 'NAME sha256:DIGEST'")
        digest = bytes.fromhex(parts["digest"])
        if digest in names:
            raise ValueError(f"line {number} of the file of tokens has the digest of an earlier one")
        names[digest] = parts["name"]
    return names


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
