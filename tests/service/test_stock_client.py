"""A stub that grpc_tools makes from the proto alone can do it all, and the checked-in messages are the proto's."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2

import numbaflash
from numbaflash_service.v1 import attention_pb2

PROTOS = Path(__file__).parents[2] / "protos"
PROTO = "numbaflash/v1/attention.proto"


def protoc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *arguments, PROTO], check=True)


def test_the_checked_in_messages_are_what_the_proto_says(tmp_path: Path) -> None:
    protoc(f"--descriptor_set_out={tmp_path}/set")
    compiled = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file[0]
    for message in compiled.message_type:
        for field in message.field:
            field.ClearField("json_name")  # which follows from the name
    checked_in = descriptor_pb2.FileDescriptorProto.FromString(attention_pb2.DESCRIPTOR.serialized_pb)
    assert checked_in == compiled, "run scripts/generate_protos"


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, ModuleType]]:
    """Fresh generated code, under a file name of its own so that it shares the process with the checked-in one."""
    folder = tmp_path_factory.mktemp("stub")
    renamed = PROTOS.joinpath(PROTO).read_text().replace("numbaflash.v1", "stock.v1")
    (folder / "stock_attention.proto").write_text(renamed)
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--python_out={folder}"]
    subprocess.run([*command, f"--grpc_python_out={folder}", "stock_attention.proto"], check=True)
    generated = folder / "stock_attention_pb2_grpc.py"
    generated.write_text(generated.read_text().replace("/stock.v1.", "/numbaflash.v1."))
    sys.path.insert(0, str(folder))
    yield importlib.import_module("stock_attention_pb2"), importlib.import_module("stock_attention_pb2_grpc")
    sys.path.remove(str(folder))


def tensors(pb: ModuleType, **arrays: np.ndarray) -> dict[str, Any]:
    """As the proto's comments tell a client to lay them out; nothing of the project's own codec."""
    payload, descriptors = b"", []
    for name, array in arrays.items():
        payload += bytes(-len(payload) % 64)
        descriptors.append(
            pb.TensorDesc(name=name, dtype="float32", shape=array.shape, offset=len(payload), nbytes=4 * array.size)
        )
        payload += array.tobytes()
    return {"tensors": descriptors, "payload": payload}


def test_a_generated_stub_does_everything(server: Any, stub: tuple[ModuleType, ModuleType], qkv: Any) -> None:
    pb, pb_grpc = stub
    with grpc.insecure_channel(server.target) as channel:
        attention = pb_grpc.AttentionStub(channel)
        info = attention.GetInfo(pb.GetInfoRequest())
        assert "float16" in info.dtypes
        shape = pb.SessionShape(num_layers=1, num_kv_heads=2, head_dim=16, capacity=32, sink_tokens=2, dtype="float32")
        session = attention.CreateSession(pb.CreateSessionRequest(shape=shape))
        assert len(bytes.fromhex(session.session_id)) == 16
        cache = numbaflash.RingKVCache(1, 2, 16, capacity=32, sink_tokens=2, dtype="float32")
        slopes = np.linspace(0.1, 0.4, 4, dtype=np.float32)

        def request(tokens: int, position: int, request_id: str) -> Any:
            return pb.StepRequest(
                session_id=session.session_id,
                layer=0,
                position=position,
                request_id=request_id,
                options=pb.StepOptions(scale=0.2, softcap=5.0),
                **tensors(pb, **qkv(tokens), alibi_slopes=slopes),
            )

        answers = [attention.Prefill(request(40, 0, "a")), attention.Decode(request(1, 40, "b"))]
        answers += attention.Attend(iter([request(2, 41, "c"), request(1, 43, "d")]))
        for tokens, answer in zip((40, 1, 2, 1), answers, strict=True):
            expected = cache.step(0, **qkv(tokens), scale=0.2, softcap=5.0, alibi_slopes=slopes)
            (out,) = answer.tensors
            assert (out.name, out.dtype, list(out.shape)) == ("out", "float32", [tokens, 4, 16])
            got = np.frombuffer(answer.payload, np.float32, tokens * 64, out.offset).reshape(out.shape)
            np.testing.assert_array_equal(got, expected)
        assert (answers[-1].position, answers[-1].first) == (44, cache.first(0))
        (listed,) = [
            listed
            for listed in attention.ListSessions(pb.ListSessionsRequest()).sessions
            if listed.session_id == session.session_id
        ]
        assert (listed.min_length, listed.steps, listed.shape.sink_tokens) == (44, 4, 2)
        attention.CloseSession(pb.CloseSessionRequest(session_id=session.session_id))
