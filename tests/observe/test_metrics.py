"""Metrics: named as the page says, few labels, right sums; each query of the dashboard finds its data."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvkeep.identity import tenant_of
from kvkeep.observe.histogram import Histogram
from kvkeep.tiers.base import Got
from kvkeep.tiers.open import open_raw
from kvkeep.wire.messages import Reservation
from tests.observe.traffic import CHUNK, Engine, keys_of, traffic
from tests.tiers.peer_place import Lending
from tests.tiers.place import PAGE, buffers_of, closing
from tests.tiers.place import keys_of as peer_keys

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "kvkeep.json"


def queries() -> list[tuple[str, str]]:
    """(panel, query) of all targets, as Grafana would send them."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [
        (
            panel["title"],
            target["expr"]
            .replace("$__rate_interval", "5s")
            .replace("$instance", ".*")
            .replace("$engine", ".*"),
        )
        for panel in panels
        for target in panel.get("targets", [])
    ]


def samples(text: str) -> dict[str, list]:
    found: dict[str, list] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def value(text: str, name: str, **labels: str) -> float:
    """Sum of the samples with these labels, at least one of which must be there."""
    rows = [s for s in samples(text)[name] if labels.items() <= s.labels.items()]
    assert rows, f"no {name} with {labels}"
    return sum(row.value for row in rows)


def test_sums(busy) -> None:
    text, state = busy.text(), busy.state()
    namespace = "07070707 SmolLM2-135M bfloat16 tp1"
    asked = value(text, "kvkeep_asked_chunks_total", namespace=namespace)
    assert asked == sum(12 + turn - (2 * (d % 2) if turn else 0) for turn in range(4) for d in range(8))
    hits = value(text, "kvkeep_hit_chunks_total", namespace=namespace)
    known = asked - 8 * 12 - 8 * 3  # the first round, and one chunk more in each later one, are new
    assert hits == known, "what memory had to give up was in the tier by then"
    (tier,) = [tier["name"] for tier in state["tiers"]]
    assert value(text, "kvkeep_hit_chunks_total", tier=tier) > 0
    arena = {
        use: value(text, "kvkeep_arena_bytes", use=use) for use in ("held", "pinned", "reserved", "free")
    }
    assert arena == state["arena"]
    assert value(text, "kvkeep_used_bytes") == arena["held"] + arena["pinned"] + arena["reserved"]
    counters = state["keeper"]["counters"]
    for name in ("stored", "evicted", "refused", "fetched", "aborted"):
        assert value(text, f"kvkeep_{name}_chunks_total") == counters[f"{name}_chunks"], name
    assert value(text, "kvkeep_lookup_seconds_count") == value(text, "kvkeep_lookups_total")
    assert value(text, "kvkeep_tier_got_bytes_total") == value(text, "kvkeep_move_bytes_sum", verb="get")
    assert value(text, "kvkeep_tier_up") == value(text, "kvkeep_tier_writable") == 1


def test_all_books_agree_where_a_tier_gave_everything(watched, wait_until) -> None:
    """`kvkeep status`, /metrics, the page and the tenants: one request, counted once."""
    one = watched(tier=True)
    link, space, tenant = one.engine.connection, one.engine.space, tenant_of("t")
    keys = keys_of(1, 10)
    (done,) = link.reserve(space, [Reservation(keys, [b"\1" * 10], 0, 0, tenant)])
    link.commit(done.reservation, 0)
    wait_until(lambda: not link.status()["tiers"][0]["waiting_chunks"])
    link.clear()
    first = link.lookup(space, keys, patience=1e6, tenant=tenant)
    wait_until(lambda: link.poll([first.ticket]) == b"\2")
    assert link.status()["counters"]["asked_chunks"] == 0, "it waits"
    assert link.lookup(space, keys, ticket=first.ticket, tenant=tenant).chunks == 10
    given_up = link.lookup(space, keys_of(2, 5), patience=1e6, tenant=tenant)
    link.forget(given_up.ticket)
    text, state, figures = one.text(), one.state(), link.status()
    (tier,) = [tier["name"] for tier in state["tiers"]]
    for counters in (figures["counters"], figures["namespaces"][0], state["keeper"]["counters"]):
        assert (counters["asked_chunks"], counters["hit_chunks"]) == (10, 10)
    (row,) = figures["tenants"]
    assert (row["asked_chunks"], row["hit_chunks"]) == (10, 10)
    assert value(text, "kvkeep_asked_chunks_total") == value(text, "kvkeep_tenant_asked_chunks_total") == 10
    assert value(text, "kvkeep_hit_chunks_total", tier=tier) == 10
    assert value(text, "kvkeep_hit_chunks_total") == value(text, "kvkeep_tenant_hit_chunks_total") == 10
    assert value(text, "kvkeep_missed_chunks_total") == 0
    assert [(line["state"], line["tiers"]) for line in state["requests"]] == [
        ("gave up", {}),
        ("", {tier: 10}),
    ]
    wait_until(lambda: sum(one.state()["history"][-1][1:4]) == 20)
    assert one.state()["history"][-1][1:4] == [10, 0, 10]


def test_a_session_that_ends_waits_no_more(watched, wait_until) -> None:
    one = watched(tier=True)
    other = Engine(one.keeper.connect("other:1"))
    assert other.connection.lookup(other.space, keys_of(2, 5), patience=1e6).ticket
    other.connection.close()
    wait_until(lambda: [line["state"] for line in one.state()["requests"]] == ["gave up"])


def test_names_and_types_are_those_of_the_page(busy) -> None:
    page = (ROOT / "docs" / "observe.md").read_text()
    told = set(re.findall(r"^\| `(kvkeep_\w+)", page, re.MULTILINE))
    families = {f.name: f for f in text_string_to_metric_families(busy.text()) if f.name.startswith("kvkeep")}
    exported = {f"{name}_total" if f.type == "counter" else name for name, f in families.items()}
    assert told == exported
    assert all(family.documentation for family in families.values())


def test_each_query_of_the_dashboard_names_what_is_exported(busy) -> None:
    found, engines = samples(busy.text()), (ROOT / "docs" / "vllm.md").read_text()
    assert len(queries()) > 60
    for panel, query in queries():
        for name in re.findall(r"vllm:\w+", query):
            own = name == "vllm:time_to_first_token_seconds_bucket"
            assert own or f"| `{name}` |" in engines, f"{panel}: {name} is not exported"
        names = re.findall(r"(?<!:)\b(?:kvkeep|process)_\w+", query)
        assert names or "vllm:" in query, panel
        for name in names:
            assert name in found, f"{panel}: {name} is not exported"
        labels = {label for name in names for s in found[name] for label in s.labels} | {"instance"}
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert not names or set(group.replace(" ", "").split(",")) <= labels, f"{panel}: {query}"
        for label, wanted in re.findall(r'(\w+)!?="([^"]*)"', query):
            assert any(s.labels.get(label) == wanted for name in names for s in found[name]), (
                f"{panel}: {label}"
            )


def test_every_exported_metric_is_on_the_dashboard(busy) -> None:
    shown = " ".join(query for _, query in queries())
    families = {name.removesuffix("_bucket") for name in re.findall(r"kvkeep_\w+", shown)}
    families |= {name.removesuffix("_total") for name in families}
    exported = {f.name for f in text_string_to_metric_families(busy.text()) if f.name.startswith("kvkeep")}
    assert exported - families == {"kvkeep_chunks", "kvkeep_start_time_seconds", "kvkeep_stored_bytes"}


def test_panels_say_when_something_is_wrong() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Overview", "Hits", "Tiers", "Movement", "Engines", "Tenants"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] in ("stat", "bargauge", "state-timeline"):
            assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]
        elif panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "heatmap", panel["title"]
    ready, state = (next(p for p in panels if p["title"] == title) for title in ("Ready", "State"))
    for panel in (ready, state):
        (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
        assert mapping["options"]["0"]["color"] == "red"


def test_namespaces_are_bounded(watched) -> None:
    one = watched(memory="16MiB")
    for number in range(40):
        Engine(one.engine.connection, f"model-{number}", 100 + number).request(number, 2)
    text = one.text()
    names = {sample.labels["namespace"] for sample in samples(text)["kvkeep_asked_chunks_total"]}
    assert len(names) == 33
    assert {f"{100 + number:02x}" * 4 + f" model-{number}" for number in range(8, 40)} < names, "the newest"
    assert value(text, "kvkeep_asked_chunks_total", namespace="others") == 2 * 8
    assert value(text, "kvkeep_stored_chunks_total", namespace="others") == 2 * 8
    assert value(text, "kvkeep_stored_chunks_total") == 80
    assert value(text, "kvkeep_used_bytes", namespace="others") == 2 * 8 * CHUNK
    assert value(text, "kvkeep_used_bytes") == 80 * CHUNK == one.state()["arena"]["held"]


def test_tenants_are_bounded_too(watched) -> None:
    one = watched("--tenant-quota", f"{tenant_of('t1').hex()}=1MiB")
    link, space = one.engine.connection, one.engine.space
    for number in range(40):
        keys, tenant = keys_of(number, 2), tenant_of(f"t{number}")
        link.lookup(space, keys, tenant=tenant)
        (done,) = link.reserve(space, [Reservation(keys, [b"\1\1"], 0, 0, tenant)])
        link.commit(done.reservation, 0)
    link.lookup(space, keys_of(20, 2), tenant=tenant_of("t20"))
    text = one.text()
    for name in ("asked", "stored"):
        rows = samples(text)[f"kvkeep_tenant_{name}_chunks_total"]
        assert len(rows) == 33
        assert value(text, f"kvkeep_tenant_{name}_chunks_total", tenant="others") == 2 * 8
    assert value(text, "kvkeep_tenant_hit_chunks_total") == 2
    assert [(s.labels["tenant"], s.value) for s in samples(text)["kvkeep_tenant_quota_bytes"]] == [
        (tenant_of("t1").hex(), 1 << 20)
    ]
    assert value(text, "kvkeep_tenant_used_bytes") == value(text, "kvkeep_used_bytes")


def test_what_peers_were_given(watched, wait_until) -> None:
    started = []

    def start(*options: str, **how: str) -> object:
        started.append(watched(*options, **how))
        return started[0].keeper

    lending = Lending(start, memory="16MiB")
    names, values = peer_keys(4), buffers_of([4 * PAGE] * 4, 1)
    for name, saved in zip(names[:3], values, strict=False):
        lending.save(name, saved)
    with closing(open_raw(lending.url())) as tier:
        assert tier.contains(names) == [True] * 3 + [False]
        assert tier.get(names[:2], buffers_of([4 * PAGE] * 2)) == [Got.HIT] * 2
        assert value(started[0].text(), "kvkeep_peer_connections") >= 1
    with socket.create_connection(("127.0.0.1", lending.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: " + b"x" * 100)
        wait_until(lambda: value(started[0].text(), "kvkeep_peer_dropped_total") == 1)
    wait_until(lambda: value(started[0].text(), "kvkeep_peer_connections") == 0)
    text = started[0].text()
    for name, count in (("asked", 4), ("given_chunks", 2), ("given_bytes", 2 * 4 * PAGE)):
        assert value(text, f"kvkeep_peer_{name}_total") == count
    assert value(text, "kvkeep_peer_lent_bytes") == 0
    assert "kvkeep_peer" not in watched().text()


def test_errors_by_kind(watched) -> None:
    one = watched()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(one.keeper.socket)
        stranger.sendall(b"\1\0\0\0x")
        while stranger.recv(4096):
            pass
    one.engine.connection.release(12345)
    one.engine.request(1, 1)
    text = one.text()
    errors = {s.labels["kind"]: s.value for s in samples(text)["kvkeep_errors_total"]}
    assert errors == {"protocol": 1, "silent": 0, "unread": 0, "user": 0, "refused": 1}


def test_labels_cannot_break_the_format(watched) -> None:
    one = watched()
    name = 'a"b\\c\nd\x00é' + "x" * 400
    Engine(one.engine.connection, name, 9).request(1, 1)
    rows = samples(one.text())["kvkeep_asked_chunks_total"]
    assert [row.labels["namespace"] for row in rows if row.labels["namespace"].startswith("0909")] == [
        f"09090909 {name[:60]}"
    ]


def test_a_histogram() -> None:
    histogram = Histogram((1.0, 2.0))
    for number in (0.5, 1.0, 1.5, 9.0):
        histogram.add(number)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == 12.0


def test_watching_is_bounded(watched) -> None:
    """Whatever is asked, what is remembered of it is not more: many documents, each hit once."""
    one = watched(memory="16MiB")
    for document in range(600):
        keys = keys_of(document, 1)
        found = one.engine.connection.lookup(one.engine.space, keys)
        (done,) = one.engine.connection.reserve(
            one.engine.space, [Reservation(keys, [b"\1"], 0, found.epoch)]
        )
        one.engine.connection.commit(done.reservation, 0)
        lease = one.engine.connection.lookup(one.engine.space, keys).lease
        one.engine.connection.release(lease, 0)
    state = one.state()
    assert len(state["requests"]) == 100
    assert len(state["prefixes"]) == 12


@pytest.fixture(scope="module")
def prometheus(busy, tmp_path_factory: pytest.TempPathFactory, wait_until):
    """A real Prometheus that scrapes the keeper five times a second."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on this machine (Debian: apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    target = busy.url.removeprefix("http://")
    (folder / "config.yml").write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        f"scrape_configs: [{{job_name: kvkeep, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = [f"--config.file={folder}/config.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [program, *options, f"--web.listen-address={address}"], stdout=log, stderr=log
        )
    with httpx.Client(base_url=f"http://{address}", timeout=20) as client:
        try:
            wait_until(lambda: _ready(client), 30)
            yield client
        finally:
            process.terminate()
            process.wait(20)


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_each_query_finds_data_in_a_real_prometheus(busy, prometheus: httpx.Client, wait_until) -> None:
    missing = dict.fromkeys(queries())

    def asked() -> bool:
        traffic(busy.engine, rounds=1, documents=8)
        busy.tenants()
        for panel, query in list(missing):
            answer = prometheus.get("/api/v1/query", params={"query": query}).json()
            assert answer["status"] == "success", (panel, query, answer)
            values = [row["value"][1] for row in answer["data"]["result"]]
            if "vllm:" in query or any(value != "NaN" for value in values):  # no engine is here
                del missing[panel, query]
        return not missing

    try:
        wait_until(asked, 40)
    except AssertionError:
        pytest.fail(f"no data for {list(missing)}")


def test_promtool_finds_nothing_to_say(busy) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool on this machine (Debian: apt-get install prometheus)")
    done = subprocess.run(
        [program, "check", "metrics"],
        input=busy.text(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
