"""What a call without the project's own client gives: an output, or the error that it is refused with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from numbaflash_service.errors import ServiceError, from_call
from numbaflash_service.v1 import attention_pb2 as pb


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> ServiceError:
    """Make a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    return from_call(caught.value)


def out(answer: pb.StepResponse) -> np.ndarray:
    """The output of a step in float32."""
    return np.frombuffer(answer.payload, np.float32).reshape(answer.tensors[0].shape)
