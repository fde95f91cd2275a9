"""An engine ends with all its processes, and leaves nothing in /dev/shm; a small server stands for vLLM."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbench import process
from kvbench.engine import VllmServer

STAND_IN = """#!{python}
import http.server, os, signal, sys
from multiprocessing.shared_memory import SharedMemory

if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = SharedMemory(create=True, size=64)
print(memory.name, flush=True)
if not os.fork():
    signal.pause()  # a worker, which nobody tells to end

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_is_left_is_killed_and_its_shared_memory_removed(
    stubborn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    monkeypatch.setattr(process, "_STOP_S", 1.0)
    script = tmp_path / "python"
    script.write_text(STAND_IN.format(python=sys.executable, stubborn=stubborn))
    script.chmod(stat.S_IRWXU)
    log = tmp_path / "log"
    with VllmServer(tmp_path, log=log, python=str(script)) as server:
        memory = Path("/dev/shm") / log.read_text().split()[0]
        wait_until(lambda: len(server.pids) == 2)
        pids = server.pids
        assert memory.exists()
    assert not memory.exists()
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
