"""Locked doors: who is let in, by token or by certificate, and what the others see of the server."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from numbaflash_service import TLS, Client, RetryPolicy, auth
from numbaflash_service.auth import TokenFile
from numbaflash_service.cli import app
from numbaflash_service.errors import ServiceError, UnauthenticatedError, from_call
from numbaflash_service.tls import ServerCertificate
from numbaflash_service.v1 import attention_pb2 as pb

ONCE = RetryPolicy(attempts=1)
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


def token_line(name: str, token: str) -> str:
    return f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("# who  what\n\n" + token_line("alice", "of-alice") + token_line("bob", "of-bob"))
    return file


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Pem:
    """Files of a certificate, its key and its root."""

    def __init__(self, folder: Path, authority: trustme.CA, *names: str, common_name: str | None = None) -> None:
        issued = authority.issue_cert(*names, common_name=common_name)
        folder.mkdir()
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        issued.cert_chain_pems[0].write_to_path(str(self.cert))
        issued.private_key_pem.write_to_path(str(self.key))

    @property
    def of_server(self) -> dict[str, Path]:
        return {"tls_cert": self.cert, "tls_key": self.key}


@pytest.fixture
def pem(tmp_path: Path, authority: trustme.CA) -> Callable[..., Pem]:
    def make(folder: str, *names: str, by: trustme.CA = authority, **more: Any) -> Pem:
        return Pem(tmp_path / folder, by, *names, **more)

    return make


def callers(server: Any) -> set[str]:
    """The names that a server has counted anything for."""
    return set(server.server._servicer._door._principals._by_name)


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_a_token_says_who_calls(start_server: Any, tokens: Path) -> None:
    server = start_server(auth_tokens=tokens)
    for name in ("alice", "bob"):
        with Client(server.target, token=f"of-{name}") as client:
            assert client.info().backend == "cpu"
    assert callers(server) == {"alice", "bob"}


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer of-mallory"),),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer"),),
        (("authorization", "Basic of-alice"),),
        (("authorization", "of-alice"),),
        (("authorization", "Bearer " + hashlib.sha256(b"of-alice").hexdigest()),),
        (("authorization", "Bearer of-mallory"), ("authorization", "Bearer of-alice")),
        (("token", "of-alice"),),
    ],
)
def test_without_a_good_token_no_call_is_let_in(token_server: Any, metadata: tuple[tuple[str, str], ...]) -> None:
    with grpc.insecure_channel(token_server.target) as channel:
        for method in pb.DESCRIPTOR.services_by_name["Attention"].methods:
            path = f"/numbaflash.v1.Attention/{method.name}"
            make = channel.stream_unary if method.client_streaming else channel.unary_unary
            with pytest.raises(grpc.RpcError) as caught:
                make(path)(iter([b""]) if method.client_streaming else b"\xff", metadata=metadata)
            assert caught.value.code() is UNAUTHENTICATED, method.name
            assert "alice" not in caught.value.details()


@pytest.fixture(scope="module")
def token_server(start_module_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("auth") / "tokens"
    file.write_text(token_line("alice", "of-alice"))
    return start_module_server(auth_tokens=file)


def test_the_scheme_is_read_in_any_case(token_server: Any) -> None:
    with grpc.insecure_channel(token_server.target) as channel:
        get_info = channel.unary_unary("/numbaflash.v1.Attention/GetInfo")
        assert get_info(b"", metadata=(("authorization", "bEARER of-alice"),))


def test_health_asks_for_no_token(token_server: Any) -> None:
    with grpc.insecure_channel(token_server.target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_client_says_so_and_does_not_try_again(token_server: Any) -> None:
    eager = RetryPolicy(attempts=50, first_delay=100.0)
    with (
        Client(token_server.target, token="of-mallory", retry=eager) as client,
        pytest.raises(UnauthenticatedError, match="the token is not known"),
    ):
        client.info()


def test_tokens_are_read_again_when_their_file_changes(tokens: Path) -> None:
    names = TokenFile(tokens)
    carol = hashlib.sha256(b"of-carol").digest()
    assert names.name(carol) is None
    tokens.write_text(token_line("carol", "of-carol"))
    names.refresh()
    assert names.name(carol) == "carol"
    assert names.name(hashlib.sha256(b"of-alice").digest()) is None


def replace(file: Path, text: str) -> None:
    """As editors and configuration managers do it."""
    file.with_suffix(".new").write_text(text)
    os.replace(file.with_suffix(".new"), file)


def test_a_file_that_cannot_be_read_takes_nobody_away_and_lets_nobody_in(
    tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = TokenFile(tokens)
    alice, carol = (hashlib.sha256(f"of-{name}".encode()).digest() for name in ("alice", "carol"))
    for break_it in (
        lambda: replace(tokens, token_line("carol", "of-carol") + "a line with a secret\n"),
        lambda: tokens.write_bytes(b"\xff\xfe"),
        tokens.unlink,
    ):
        break_it()
        caplog.clear()
        names.refresh()
        names.refresh()
        assert (names.name(alice), names.name(carol)) == ("alice", None)
        assert [record.name for record in caplog.records].count(auth.__name__) == 1  # once, not every second
        assert "secret" not in caplog.text
    tokens.write_text(token_line("carol", "of-carol"))
    names.refresh()
    assert (names.name(alice), names.name(carol)) == (None, "carol")


@pytest.mark.parametrize(
    "line",
    ["alice", "alice of-alice", "alice sha256:abc", "al ice " + "sha256:" + "0" * 64, token_line("alice", "of-bob")],
)
def test_a_line_that_is_no_token_stops_the_start_by_its_number(tokens: Path, line: str) -> None:
    tokens.write_text(token_line("bob", "of-bob") + line)
    with pytest.raises(ValueError, match="line 2 of the file of tokens"):
        TokenFile(tokens)


def test_a_stream_ends_when_its_token_goes(
    start_server: Any, connect_stock: Any, tokens: Path, qkv: Any, step_request: Any
) -> None:
    server = start_server(auth_tokens=tokens)
    stock = connect_stock(server, token="of-alice")
    session_id, requests = stock.new_session(), queue.SimpleQueue()
    stream = stock.Attend(iter(requests.get, None))
    requests.put(step_request(session_id, qkv(1)))
    assert next(stream).position == 1
    replace(tokens, token_line("bob", "of-bob"))
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() is UNAUTHENTICATED
    requests.put(None)


def test_a_token_goes_to_no_other_machine_in_the_clear() -> None:
    for target in ("example.org:50051", "10.0.0.1:50051", "dns:///example.org:50051"):
        with pytest.raises(ValueError, match=r"unencrypted; takes tls"):
            Client(target, token="secret")
    for token in ("", " x", "x\n", "ü"):
        with pytest.raises(ValueError, match="token takes printable"):
            Client("127.0.0.1:1", token=token)


# -- TLS -------------------------------------------------------------------------------------------------------------


def test_the_command_line_lists_what_a_token_may_see(
    start_server: Any, pem: Callable[..., Pem], tokens: Path, tmp_path: Path
) -> None:
    files = pem("server", "127.0.0.1")
    server = start_server(**files.of_server, auth_tokens=tokens)
    command = ["sessions", "--target", server.target, "--ca", str(files.ca), "--json"]
    with Client(server.target, tls=TLS(ca=files.ca), token="of-alice") as client:
        session = client.create_session(1, 2, 16, capacity=64)
        for name, seen in (("alice", [session.id]), ("bob", [])):
            token = tmp_path / name
            token.write_text(f"of-{name}\n")
            listed = json.loads(CliRunner().invoke(app, [*command, "--token-file", str(token)]).output)
            assert [entry["session_id"] for entry in listed["sessions"]] == seen
    assert CliRunner().invoke(app, [*command, "--cert", str(files.cert)]).exit_code == 2
    assert CliRunner().invoke(app, [*command, "--token-file", str(tmp_path / "none")]).exit_code == 1


def test_tls_and_a_token(start_server: Any, pem: Callable[..., Pem], tokens: Path, qkv: Any) -> None:
    files = pem("server", "127.0.0.1", "attention.example.org")
    server = start_server(**files.of_server, auth_tokens=tokens)
    for name in (None, "attention.example.org"):
        tls = TLS(ca=files.ca, server_name=name)
        with Client(server.target, tls=tls, token="of-alice") as client:
            assert client.create_session(1, 2, 16, capacity=64).step(0, **qkv(1)).shape == (1, 4, 16)
    assert callers(server) == {"alice"}
    for wrong in (None, TLS(), TLS(ca=files.ca, server_name="other.example.org")):  # plain, other roots, another name
        with Client(server.target, tls=wrong, token="of-alice", retry=ONCE, timeout=10.0) as client:
            with pytest.raises(ServiceError) as caught:
                client.info()
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_certificates_name_says_who_calls(start_server: Any, pem: Callable[..., Pem], tmp_path: Path) -> None:
    files = pem("server", "127.0.0.1")
    socket = f"unix:{tmp_path}/socket"
    server = start_server(listen=["127.0.0.1:0", socket], **files.of_server, tls_client_ca=files.ca)
    for client_files in (
        pem("named", "alice.example.org", "second", common_name="nobody"),
        pem("common", common_name="bob"),
    ):
        tls = TLS(ca=files.ca, cert=client_files.cert, key=client_files.key)
        with Client(server.target, tls=tls) as client:
            client.info()
    with Client(socket) as client:
        client.info()
    assert callers(server) == {"alice.example.org", "bob", "local"}


def test_no_certificate_and_one_of_other_roots_are_not_let_in(start_server: Any, pem: Callable[..., Pem]) -> None:
    files = pem("server", "127.0.0.1")
    other = pem("other", "alice.example.org", by=trustme.CA())
    server = start_server(**files.of_server, tls_client_ca=files.ca)
    for tls in (TLS(ca=files.ca), TLS(ca=files.ca, cert=other.cert, key=other.key)):
        with Client(server.target, tls=tls, retry=ONCE, timeout=10.0) as client:
            with pytest.raises(ServiceError) as caught:
                client.info()
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert callers(server) == set()


def test_a_renewed_certificate_is_taken_up_by_the_next_connection(start_server: Any, pem: Callable[..., Pem]) -> None:
    files, renewed = pem("server", "127.0.0.1"), pem("renewed", "127.0.0.1")
    server = start_server(**files.of_server)
    address = ("127.0.0.1", int(server.target.rpartition(":")[2]))
    with Client(server.target, tls=TLS(ca=files.ca)) as client:
        client.info()
        first = files.cert.read_text()
        assert shown(address) == first
        os.replace(renewed.cert, files.cert)
        assert shown(address) == first  # the key does not fit yet
        os.replace(renewed.key, files.key)
        assert shown(address) == files.cert.read_text() != first
        client.info()  # a connection that stands goes on


def shown(address: tuple[str, int]) -> str:
    return ssl.get_server_certificate(address).replace("\r", "")


def test_files_that_are_no_certificate_stop_the_start(pem: Callable[..., Pem], tmp_path: Path) -> None:
    good, other = pem("server", "127.0.0.1"), pem("other", "127.0.0.1")
    nonsense, missing = tmp_path / "nonsense", tmp_path / "missing"
    nonsense.write_text("no certificate")
    for files in ((nonsense, good.key, None), (good.cert, other.key, None), (good.cert, good.key, nonsense)):
        with pytest.raises(ValueError, match="are not PEM files of a certificate, its key and roots"):
            ServerCertificate(*files)
    with pytest.raises(FileNotFoundError, match="missing"):
        ServerCertificate(good.cert, missing, None)


def test_a_message_larger_than_the_limit_is_refused(
    start_server: Any, connect_stock: Any, qkv: Any, step_request: Any
) -> None:
    stock = connect_stock(start_server(max_message_bytes=64 << 10))
    with pytest.raises(grpc.RpcError) as caught:
        stock.Prefill(step_request(stock.new_session(capacity=4096), qkv(300)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert from_call(caught.value).retry_after is None
