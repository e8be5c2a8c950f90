"""OpenTelemetry: one server span a request, child of the caller's, whose context goes on to the engine.

Needs `pip install miles-router[tracing]`. With opentelemetry-sdk, spans go where `OTEL_TRACES_EXPORTER` says: console,
or what an installed exporter calls itself, otlp say; the SDK reads `OTEL_SERVICE_NAME` and the like itself. Without
it, spans are not recorded and the context is passed on as it came.
"""

from __future__ import annotations

import asyncio
import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError as error:
    raise ConfigError(
        "the middleware `tracing` needs OpenTelemetry: pip install 'miles-router[tracing]', and for spans that are "
        "sent somewhere opentelemetry-sdk with an exporter"
    ) from error
try:
    from opentelemetry.sdk import trace as sdk
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
except ModuleNotFoundError:
    sdk = None

if TYPE_CHECKING:
    from miles_router.handle import RouterHandle
    from miles_router.messages import Message, Receive, Scope, Send
    from miles_router.middleware import App

__all__ = ["Tracing"]

_FIRST_ERROR = 500


class Tracing:
    """Spans named by method and path, with status and duration. Bodies are not in them."""

    changes_tokens = False

    def __init__(self, app: App, *, router: RouterHandle) -> None:
        self._app = app
        self._router = router
        self._provider = _set_up()
        self._tracer = trace.get_tracer("miles_router")
        self._spans = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on within a span."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._spans += 1
        context = propagate.extract(
            {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        )
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        name = f"{scope['method']} {scope['path']}"
        kind = trace.SpanKind.SERVER
        with self._tracer.start_as_current_span(name, context, kind=kind, attributes=attributes) as span:
            await self._app({**scope, "headers": _with_context(scope["headers"])}, receive, _noting(span, send))

    def counts(self) -> dict[str, int]:
        """Say how many spans were started."""
        return {"spans": self._spans}

    async def aclose(self) -> None:
        """Send the spans that wait."""
        if self._provider is not None:
            await asyncio.to_thread(self._provider.shutdown)


def _with_context(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    ours = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in carrier.items()]
    replaced = {name for name, _ in ours}
    return [*(pair for pair in headers if pair[0] not in replaced), *ours]


def _noting(span: Any, send: Send) -> Send:
    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.set_attribute("http.response.status_code", message["status"])
            if message["status"] >= _FIRST_ERROR:
                span.set_status(trace.StatusCode.ERROR)
        await send(message)

    return noting


def _set_up() -> Any:
    """Give this process the tracer provider that the environment asks for, unless it has one; return it for the end."""
    name = os.environ.get("OTEL_TRACES_EXPORTER", "none")
    if name == "none" or not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    exporters = {point.name: point for point in entry_points(group="opentelemetry_traces_exporter")}
    if sdk is None or name not in exporters:
        known = ", ".join(sorted(exporters)) or "none"
        raise ConfigError(
            f"OTEL_TRACES_EXPORTER is {name!r}, and no such exporter is installed (there is: {known}): pip install "
            "opentelemetry-sdk, and for `otlp` opentelemetry-exporter-otlp"
        )
    provider = sdk.TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporters[name].load()()))
    trace.set_tracer_provider(provider)
    return provider
