"""A span for each request, a child of the caller's and the parent of the engine's."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from miles_api.errors import ConfigError
from miles_router.middleware import resolve_middleware

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_without_opentelemetry_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "miles_router.middlewares.tracing", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'miles-router\[tracing\]'"):
        resolve_middleware(["tracing"])


@pytest.fixture
def spans():
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        trace.set_tracer_provider(TracerProvider())
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    trace.get_tracer_provider().add_span_processor(processor)
    yield exporter
    processor.shutdown()


def test_the_span_is_the_callers_child_and_the_engine_is_told_of_it(spans, serve, routed, engine):
    from miles_router.middlewares.tracing import Tracing

    async def main():
        backend = engine()
        async with serve(backend) as url, routed(url, middleware=[Tracing]) as r:
            await r.post(content=b"x", headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
            (sent,) = [value for name, value in backend.requests[0][0]["headers"] if name == b"traceparent"]
            r.app.registry.remove(url)
            assert (await r.post(content=b"x")).status_code == 503
        return sent.decode()

    version, trace_id, parent, _ = asyncio.run(main()).split("-")
    first, second = spans.get_finished_spans()
    assert (version, trace_id, parent) == ("00", TRACE, f"{first.context.span_id:016x}")
    assert f"{first.context.trace_id:032x}" == TRACE
    assert f"{first.parent.span_id:016x}" == CALLER
    assert first.name == "POST /generate"
    assert first.attributes["http.response.status_code"] == 200
    assert (second.parent, second.attributes["http.response.status_code"]) == (None, 503)
    assert not second.status.is_ok


START = """
import asyncio
from types import SimpleNamespace
from opentelemetry import trace
from miles_router.middlewares.tracing import Tracing
tracing = Tracing(None, router=SimpleNamespace())
trace.get_tracer("x").start_span("made").end()
asyncio.run(tracing.aclose())
"""


@pytest.mark.parametrize(("exporter", "said"), [("console", '"name": "made"'), ("nowhere", "no such exporter")])
def test_in_the_routers_own_process_the_environment_says_where_spans_go(exporter, said):
    pytest.importorskip("opentelemetry.sdk")
    env = {"OTEL_TRACES_EXPORTER": exporter, "PYTHONPATH": ":".join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", START], env=env, capture_output=True, text=True, check=False)
    assert said in run.stdout + run.stderr
