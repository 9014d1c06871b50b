"""What comes of a step, as a `StepResponse`."""

from __future__ import annotations

from . import wire
from .errors import ServiceError, to_status
from .steps import Done
from .v1 import attention_pb2 as pb


def encode_answer(request: pb.StepRequest, done: Done) -> bytes:
    """Serialize the answer to a step that was taken."""
    answer = done.answer
    head = pb.StepResponse(
        session_id=request.session_id,
        layer=request.layer,
        position=answer.position,
        request_id=request.request_id,
        first=answer.first,
        replayed=done.replayed,
        queue_ns=done.queue_ns,
        kernel_ns=done.kernel_ns,
        batch_size=done.batch_size,
    )
    return wire.encode_step(head, {} if answer.out is None else {"out": answer.out})


def encode_error(request: pb.StepRequest, error: ServiceError) -> bytes:
    """Serialize the answer to a step of a stream that failed."""
    status = to_status(error)
    head = pb.StepResponse(
        session_id=request.session_id,
        layer=request.layer,
        request_id=request.request_id,
        error=pb.Status(code=status.code, message=status.message, details=status.details),
    )
    return wire.encode_step(head, {})
