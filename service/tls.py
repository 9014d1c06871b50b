"""The server's certificate, read from files at the start and again whenever they change."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

import grpc

log = logging.getLogger(__name__)


class ServerCertificate:
    """A certificate, its key, and whose certificates are asked of clients.

    A renewed certificate is taken up by the next connection; while the new files do not fit each other, the old
    certificate stays.

    Args:
        certificate: PEM file of the certificate and those between it and the root.
        key: PEM file of its key, not encrypted.
        client_ca: PEM file of the roots of the clients' certificates; None: clients need none.

    Raises:
        ValueError: The files are not what they should be.
        OSError: They cannot be read.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._files = (certificate, key, client_ca)
        self._seen = self._versions()
        self._initial = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Make the credentials of a port."""
        return grpc.dynamic_ssl_server_credentials(
            self._initial, self._fetch, require_client_authentication=self._files[2] is not None
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the files' content if it has changed; called by grpc before every handshake, in a thread of its."""
        try:
            versions = self._versions()
            if versions == self._seen:
                return None
            self._seen = versions
            renewed = self._read()
        except (OSError, ValueError) as error:
            log.error("the certificate stays as it was: %s", error)
            return None
        log.info("read the certificate again")
        return renewed

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate, key, client_ca = self._files
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # grpc takes anything and fails each handshake.
            context.load_cert_chain(certificate, key, password=_refuse)
            if client_ca is not None:
                context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise ValueError(
                f"tls_cert {certificate}, tls_key {key} and tls_client_ca {client_ca} are not PEM files of a"
                f" certificate, its key and roots: {error.reason or error}"
            ) from None
        roots = None if client_ca is None else client_ca.read_bytes()
        return grpc.ssl_server_certificate_configuration([(key.read_bytes(), certificate.read_bytes())], roots)

    def _versions(self) -> tuple[tuple[int, int], ...]:
        statuses = [os.stat(file) for file in self._files if file is not None]
        return tuple((status.st_mtime_ns, status.st_ino) for status in statuses)


def _refuse() -> str:
    raise ValueError("tls_key is encrypted; takes a key without a password")
