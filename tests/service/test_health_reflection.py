"""The standard services beside ours."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from numbaflash_service.config import load
from numbaflash_service.server import Server
from numbaflash_service.servicer import AttentionServicer
from numbaflash_service.v1 import attention_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("service", ["", "numbaflash.v1.Attention"])
def test_the_server_says_that_it_serves(stock: Any, service: str) -> None:
    health = health_pb2_grpc.HealthStub(stock.channel)
    assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING


def test_the_server_says_so_only_when_the_first_step_needs_no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    warm_up = AttentionServicer.warm_up

    async def ask_meanwhile() -> None:
        server = Server(load(listen=["127.0.0.1:0"]))

        async def watched(servicer: AttentionServicer) -> None:
            async with grpc.aio.insecure_channel(server.addresses[0]) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                requests = (health_pb2.HealthCheckRequest(service=name) for name in ("", "numbaflash.v1.Attention"))
                seen.extend([(await health.Check(request)).status for request in requests])
            await warm_up(servicer)

        monkeypatch.setattr(AttentionServicer, "warm_up", watched)
        await server.start()
        await server.stop()

    asyncio.run(ask_meanwhile())
    assert seen == [health_pb2.HealthCheckResponse.NOT_SERVING] * 2


def test_health_is_answered_while_the_engine_is_busy(server: Any, stock: Any) -> None:
    health = health_pb2_grpc.HealthStub(stock.channel)
    with server.engine_held():
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=20).status == SERVING


def test_reflection_tells_the_whole_service_when_it_is_asked_for(start_server: Any, connect_stock: Any) -> None:
    stock = connect_stock(start_server(reflection=True))
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(stock.channel))
    service = pool.FindServiceByName("numbaflash.v1.Attention")
    assert [method.name for method in service.methods] == [
        method.name for method in pb.DESCRIPTOR.services_by_name["Attention"].methods
    ]
    fields = pool.FindMessageTypeByName("numbaflash.v1.StepRequest").fields
    assert [field.name for field in fields] == [field.name for field in pb.StepRequest.DESCRIPTOR.fields]


@pytest.mark.parametrize(
    "method",
    [
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "grpc.channelz.v1.Channelz/GetServers",
        "envoy.service.status.v3.ClientStatusDiscoveryService/FetchClientStatus",
    ],
)
def test_what_tells_about_the_server_is_off_unless_asked_for(stock: Any, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stock.channel.stream_stream(f"/{method}")(iter([b""])))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_unix_socket_serves_too(start_server: Any, connect_stock: Any, tmp_path: Any) -> None:
    server = start_server(listen=[f"unix:{tmp_path}/socket"])
    assert server.target == f"unix:{tmp_path}/socket"
    assert connect_stock(server).GetInfo(pb.GetInfoRequest()).backend == "cpu"
