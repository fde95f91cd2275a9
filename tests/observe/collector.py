"""A collector of traces, as far as its clients can tell."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{CALLER}-01"
"""The traceparent of a request: its trace, its caller's span, sampled."""


class Collector(http.server.ThreadingHTTPServer):
    """Takes what an OTLP collector takes, and keeps the spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.spans: list[Any] = []
        self.services: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def of(self, trace: str) -> list[Any]:
        """Spans of one trace."""
        return [span for span in self.spans if span.trace_id.hex() == trace]


class _Post(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.services |= {a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def collecting() -> Iterator[Collector]:
    """One that serves inside the block."""
    with Collector() as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield server
        finally:
            server.shutdown()
            serving.join()
