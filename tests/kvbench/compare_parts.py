"""What the tests of `kvkeep bench compare` compare: small servers, and a load that writes known figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SERVER = """
import http.server, json, sys
port, ttft, how = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
print("hello from the server", flush=True)
if how == "broken":
    sys.exit("no such model: <none>")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("out of memory, really", flush=True)
            import os; os._exit(7)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"ttft": ttft, "how": how}).encode())

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# Figures that follow from the server's time to first token t, the seed s and the rate r, all exact in binary.
LOAD = """
import json, os, pathlib, signal, sys, urllib.request
url, rate, seed, output, marks = sys.argv[1:6]
ask = lambda path: urllib.request.urlopen(url + path, timeout=10).read()
figures = json.loads(ask("/figures"))
with open(marks, "a") as file:
    print(figures["how"], rate, seed, file=file)
if figures["how"] == "dies":
    try:
        ask("/die")
    except OSError:
        pass
    signal.pause()
if figures["how"] == "fails":
    sys.exit("the load gave up")
if figures["how"] == "waits":
    signal.pause()
t = figures["ttft"] * (1 + int(seed)) * float(rate)
spread = lambda x: dict.fromkeys(("mean", "p50", "p90", "p95", "p99"), x)
bad = figures["how"] == "overloaded"
summary = {"workload": "fake", "requests": 10, "errors": 3 * bad, "ttft_s": spread(t), "itl_s": spread(0.25),
           "latency_s": spread(t + 2), "prompt_tokens_per_s": 100.0, "output_tokens_per_s": 8 / t,
           "rate": float(rate), "requests_per_s": min(float(rate), 1 / figures["ttft"]),
           "prompt_tokens": 400, "cached_tokens": 100, "goodput": {"requests": 5, "requests_per_s": 0.5},
           "lateness_s": spread(0.001), "kept_schedule": not bad, "partial": False}
pathlib.Path(output, "summary.json").write_text(json.dumps(summary))
pathlib.Path(output, "requests.csv").write_text("sent_s,ttft_s\\n0,1\\n")
"""


class Bench:
    """A directory with both scripts; writes plans, and knows what the load was run on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        self.plan, self._marks = folder / "plan.yaml", folder / "marks"
        (folder / "server.py").write_text(SERVER)
        (folder / "load.py").write_text(LOAD)

    def setup(self, name: str, ttft: float = 1.0, how: str = "well", **more: Any) -> dict[str, Any]:
        command = f"{sys.executable} {self.folder / 'server.py'} {{port}} {ttft} {how}"
        return {"name": name, "command": command, "ready": "http://127.0.0.1:{port}/health", **more}

    def write(self, *setups: Any, **more: Any) -> Path:
        """A plan as YAML (JSON is YAML)."""
        load = f"{{python}} {self.folder / 'load.py'} {{url}} {{rate}} {{seed}} {{output}} {self._marks}"
        plan = {"workload": "fake", "rates": [1], "rounds": 1, "seed": 0, "kv_cache_gib": 1, "load": load}
        self.plan.write_text(json.dumps({**plan, "setups": setups, **more}))
        return self.plan

    @property
    def arguments(self) -> list[str]:
        return ["bench", "compare", str(self.plan), "--output", str(self.output)]

    def marks(self) -> list[str]:
        """A line for each load: kind of server, rate, seed."""
        return self._marks.read_text().splitlines() if self._marks.exists() else []

    def table(self) -> dict[tuple[str, str], dict[str, Any]]:
        """compare.json's rows by figure and set-up (of the only rate)."""
        data = json.loads((self.output / "compare.json").read_text())
        return {(row["figure"], row["setup"]): row for row in data["table"]}

    def report(self) -> str:
        return (self.output / "report.html").read_text(encoding="utf-8")
