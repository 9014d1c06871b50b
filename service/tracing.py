"""OpenTelemetry spans, where an endpoint is configured: one for each call, and one for each step inside it.

The SDK reads its own environment variables for all the rest: OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG say how
many calls are traced, OTEL_EXPORTER_OTLP_HEADERS what the collector wants to be told. A caller that sends `traceparent`
in its metadata finds the spans below its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from opentelemetry.context import get_current
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .errors import ServiceError
from .steps import Done, Outcome
from .v1 import attention_pb2 as pb


class Tracing:
    """Makes spans and sends them.

    Args:
        endpoint: Of a collector that speaks OTLP over gRPC, such as http://127.0.0.1:4317.
    """

    def __init__(self, endpoint: str) -> None:
        resource = Resource.create({"service.name": "numbaflash", "service.version": version("numbaflash")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("numbaflash")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def call(self, service: str, method: str, metadata: Any, request_id: str) -> Iterator[None]:
        """Put a span around a call, below the caller's own where its metadata names one."""
        carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": method,
            "numbaflash.request_id": request_id,
        }
        with self._tracer.start_as_current_span(
            f"{service}/{method}",
            self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except ServiceError as error:
                span.set_attribute("rpc.grpc.status_code", error.code.value[0])
                span.set_status(StatusCode.ERROR, error.reason or error.code.name)
                raise

    def step(
        self, request: pb.StepRequest, tokens: int, settle: Callable[[Outcome], None]
    ) -> Callable[[Outcome], None]:
        """Return a `settle` that ends the span of a step, which begins now and belongs to the current call."""
        span = self._tracer.start_span(
            "step",
            get_current(),
            attributes={
                "numbaflash.session": request.session_id[:8],
                "numbaflash.layer": request.layer,
                "numbaflash.tokens": tokens,
                "numbaflash.request_id": request.request_id,
            },
            start_time=time.time_ns(),
        )

        def end(outcome: Outcome) -> None:
            if isinstance(outcome, Done):
                span.set_attributes(
                    {
                        "numbaflash.queue_ns": outcome.queue_ns,
                        "numbaflash.kernel_ns": outcome.kernel_ns,
                        "numbaflash.batch_size": outcome.batch_size,
                        "numbaflash.replayed": outcome.replayed,
                    }
                )
            elif outcome is not None:
                span.set_status(StatusCode.ERROR, outcome.reason or outcome.code.name)
            span.end()
            settle(outcome)

        return end

    def close(self) -> None:
        """Send what is left; may take some seconds where nobody takes it."""
        self._provider.shutdown()
