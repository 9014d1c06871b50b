"""The client's two ways of driving a stream over a channel: both do the same, against a server of gRPC's own."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

import numbaflash
from numbaflash_service import Client
from numbaflash_service.streams import CallersThread, OwnThreads, open_stream

KINDS = pytest.mark.parametrize("kind", [CallersThread, OwnThreads])
METHOD = "/test.Echo/Attend"


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """Serves a method that answers each request with itself, but for a few words that it heeds."""

    def attend(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for request in requests:
            if request == b"end":
                return
            if request == b"fail":
                context.set_trailing_metadata((("why-bin", b"\0because"),))
                context.abort(grpc.StatusCode.DATA_LOSS, "failed as asked")
            if request == b"metadata":
                yield dict(context.invocation_metadata())["token"].encode()
            elif request != b"wait":
                yield request

    server = grpc.server(ThreadPoolExecutor(8))
    handlers = {"Attend": grpc.stream_stream_rpc_method_handler(attend)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def stream(kind: Callable[..., Any], target: str) -> Iterator[Any]:
    with grpc.insecure_channel(target) as channel:
        opened = kind(channel, METHOD, (("token", "abc"),))
        yield opened
        opened.close()


@KINDS
def test_each_request_gets_its_answer(stream: Any) -> None:
    for nbytes in (0, 1, 100_000, 3_000_000, 7):
        request = bytes([nbytes % 251]) * nbytes
        assert stream.exchange(request) == request


@KINDS
def test_metadata_goes_with_the_call(stream: Any) -> None:
    assert stream.exchange(b"metadata") == b"abc"


@KINDS
def test_an_end_without_an_error_is_no_answer(stream: Any) -> None:
    assert stream.exchange(b"a") == b"a"
    assert stream.exchange(b"end") is None


@KINDS
def test_an_error_comes_with_its_code_words_and_metadata(stream: Any) -> None:
    assert stream.exchange(b"a") == b"a"
    with pytest.raises(grpc.RpcError) as caught:
        stream.exchange(b"fail")
    error = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "failed as asked")
    assert ("why-bin", b"\0because") in tuple(error.trailing_metadata())


@KINDS
@pytest.mark.parametrize("end", ["cancel", "close"])
def test_who_waits_is_told_when_another_thread_breaks_off(stream: Any, end: str) -> None:
    assert stream.exchange(b"a") == b"a"
    breaker = threading.Timer(0.05, getattr(stream, end))
    breaker.start()
    with pytest.raises(grpc.RpcError) as caught:
        stream.exchange(b"wait")
    breaker.join(timeout=10)
    assert not breaker.is_alive()
    assert caught.value.code() is grpc.StatusCode.CANCELLED


@KINDS
def test_closing_again_and_closing_the_channel_is_fine(kind: Callable[..., Any], target: str) -> None:
    channel = grpc.insecure_channel(target)
    unused, used = kind(channel, METHOD, ()), kind(channel, METHOD, ())
    assert used.exchange(b"a") == b"a"
    for stream in (unused, used, used):
        stream.close()
    still_open = kind(channel, METHOD, ())
    assert still_open.exchange(b"a") == b"a"
    channel.close()
    with pytest.raises(grpc.RpcError):
        still_open.exchange(b"b")
    still_open.close()


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("kind", [CallersThread])
def test_ctrl_c_at_any_moment_leaves_a_stream_that_can_be_closed(kind: Callable[..., Any], target: str) -> None:
    main = threading.main_thread().ident
    assert main is not None
    broken_off = 0
    with grpc.insecure_channel(target) as channel:
        for moment in range(40):
            stream = kind(channel, METHOD, ())
            assert stream.exchange(b"a") == b"a"
            user = threading.Timer(moment * 2e-5, signal.pthread_kill, (main, signal.SIGINT))
            try:
                user.start()
                until = time.monotonic() + 10
                while time.monotonic() < until:
                    stream.exchange(b"b")
            except KeyboardInterrupt:
                broken_off += 1
            user.join()
            stream.close()
    assert broken_off == 40


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep freed memory by rules of their own")
def test_a_client_uses_the_memory_of_one_message_for_the_next() -> None:
    program = """
import resource
from numbaflash_service.calls import keep_freed_memory
keep_freed_memory()
def faults_of_messages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [bytearray(4 << 20) for _ in range(3)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_messages()
print(faults_of_messages())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3072  # pages of one message


class _Counting(grpc.StreamStreamClientInterceptor):
    def __init__(self) -> None:
        self.calls = 0

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        self.calls += 1
        return continuation(details, requests)


def test_interceptors_see_the_stream(target: str) -> None:
    counting = _Counting()
    with grpc.intercept_channel(grpc.insecure_channel(target), counting) as channel:
        stream = open_stream(channel, METHOD, ())
        assert stream.exchange(b"a") == b"a"
        stream.close()
    assert counting.calls == 1


def test_versions_of_grpc_that_were_not_seen_go_the_public_way(
    server: Any, qkv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc, "__version__", "1.999.0rc1")
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        stream = open_stream(channel, METHOD, ())
        assert isinstance(stream, OwnThreads)
        stream.close()
    cache = numbaflash.RingKVCache(1, 2, 16, capacity=64)
    with Client(server.target) as client:
        session = client.create_session(1, 2, 16, capacity=64)
        for tokens in (20, 1, 1):
            arrays = qkv(tokens)
            np.testing.assert_array_equal(session.step(0, **arrays), cache.step(0, **arrays))
