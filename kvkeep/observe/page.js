"use strict";
// The keeper's page: asks /api/state every two seconds and draws it. Data goes into the page as text only.

const EVERY = 2000;
const $ = (id) => document.getElementById(id);
const color = (name) => `var(--${name})`;
let tierNames = [];

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(made.style, value);
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

const show = (id, ...children) => $(id).replaceChildren(...children);

function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit++; }
  return `${bytes < 100 && unit ? bytes.toFixed(bytes < 10 ? 2 : 1) : Math.round(bytes)} ${units[unit]}`;
}

const count = (number) => number.toLocaleString("en");
const percent = (part, whole) => (whole ? `${(100 * part / whole).toFixed(1)} %` : "–");
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });

function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`;
}

/** A bar of [amount, colour name, title] pieces, against `whole` or their sum. */
function bar(pieces, whole, kind = "") {
  const total = whole || pieces.reduce((sum, [amount]) => sum + amount, 0) || 1;
  return element("div", { class: `bar ${kind}` }, ...pieces.filter(([amount]) => amount > 0).map(
    ([amount, name, title]) =>
      element("i", { title, style: { width: `${100 * amount / total}%`, background: color(name) } })));
}

const legend = (pieces) => pieces.map(([label, name]) =>
  element("span", {}, element("i", { style: { background: color(name) } }), label));

/** Columns are [heading, class, row => cell]; a class of `wide` is not shown on narrow screens. */
function table(columns, rows, nothing) {
  if (!rows.length) return element("p", { class: "faint" }, nothing);
  return element("table", {},
    element("thead", {}, element("tr", {}, ...columns.map(([head, kind]) => element("th", { class: kind }, head)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...columns.map(
      ([, kind, cell]) => element("td", { class: kind }, cell(row)))))));
}

function terms(pairs) {
  return element("dl", {}, ...pairs.map(
    ([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value))));
}

function drawMemory({ arena, keeper, history }) {
  const uses = [["held", "memory"], ["pinned", "pinned"], ["reserved", "reserved"], ["free", "computed"]];
  const counters = keeper.counters;
  $("used").textContent = percent(keeper.memory_bytes - arena.free, keeper.memory_bytes);
  show("memory",
    bar(uses.map(([use, name]) => [arena[use], name, `${use}: ${size(arena[use])}`])),
    element("div", { class: "legend" }, ...legend(uses.map(([use, name]) => [`${use} ${size(arena[use])}`, name]))),
    chart("memory in use", steps(history).map(([from, to]) => [from[0], to[0], [to[4]]]),
      [["in use", "memory"]], keeper.memory_bytes, size),
    terms([
      ["of", size(keeper.memory_bytes)], ["prepared", percent(keeper.prefaulted_bytes, keeper.memory_bytes)],
      ["huge pages", percent(keeper.huge_page_bytes, keeper.memory_bytes)], ["index", size(keeper.index_bytes)],
      ["chunks", count(keeper.chunks)], ["stored", count(counters.stored_chunks)],
      ["evicted", count(counters.evicted_chunks)], ["refused", count(counters.refused_chunks)],
    ]));
}

function drawKeeper({ keeper }) {
  const { peers, recorded } = keeper;
  show("keeper", terms([
    ["engines", count(keeper.sessions)], ["connections", count(keeper.connections)],
    ["leases", count(keeper.leases)], ["reservations", count(keeper.reservations)],
    ["protocol errors", count(keeper.protocol_errors)], ["process", keeper.pid],
    ["socket", element("span", { class: "name" }, keeper.socket)],
    ["peers", peers ? `may read at ${peers.address}` : "may not read (--peers)"],
    ...(peers ? [["peers now", `${count(peers.connections)} connections, ${size(peers.lent_bytes)} lent`],
      ["given to peers", `${count(peers.given_chunks)} chunks of ${count(peers.asked)}, ${size(peers.given_bytes)}`],
      ["peers dropped", count(peers.dropped)]] : []),
    ["recording", recorded ? element("span", { class: recorded.recording ? "" : "bad" },
      recorded.recording ? "on" : "ended: its file cannot be written") : "off (--record)"],
    ...(recorded ? [["recorded", `${count(recorded.lines)} requests, ${count(recorded.dropped)} left out`],
      ["to", element("span", { class: "name" }, recorded.file)]] : []),
  ]));
}

function drawTenants({ keeper }) {
  $("tenants").parentElement.hidden = !keeper.tenants.length;
  show("tenants", table([
    ["tenant", "name", (t) => element("code", {}, t.tenant)],
    ["of its quota", "bars", (t) => (t.quota_bytes === null ? element("span", { class: "faint" }, "no quota")
      : bar([[t.used_bytes, "memory", size(t.used_bytes)]], t.quota_bytes))],
    ["used", "num", (t) => size(t.used_bytes)], ["quota", "num wide", (t) => size(t.quota_bytes)],
    ["hit ratio", "num", (t) => percent(t.hit_chunks, t.asked_chunks)],
    ["stored", "num wide", (t) => count(t.stored_chunks)], ["evicted", "num wide", (t) => count(t.evicted_chunks)],
    ["refused", "num wide", (t) => count(t.refused_chunks)],
  ], keeper.tenants, ""));
}

function drawTiers({ tiers }) {
  const columns = [
    ["tier", "name", (t) => element("span", {}, t.name, " ", t.writable ? "" :
      element("span", { class: "bad" }, `${t.available ? "read only" : "off"}: ${t.last_error}`))],
    ["full", "bars", (t) => t.capacity_bytes
      ? bar([[t.used_bytes, `tier${tiers.indexOf(t) % 4}`, size(t.used_bytes)]], t.capacity_bytes) : "–"],
    ["used", "num", (t) => size(t.used_bytes)], ["of", "num wide", (t) => size(t.capacity_bytes)],
    ["hit ratio", "num", (t) => percent(t.found, t.asked)], ["read", "num wide", (t) => size(t.got_bytes)],
    ["GB/s", "num wide", (t) => t.read_GBps ?? "–"], ["written", "num wide", (t) => size(t.put_bytes)],
    ["waiting", "num wide", (t) => count(t.waiting_chunks)], ["lost", "num wide", (t) => count(t.lost_chunks)],
    ["damaged", "num wide", (t) => count(t.damaged)], ["errors", "num", (t) => count(t.errors)],
  ];
  show("tiers", table(columns, tiers, "Memory only: no tier is configured (--tier)."));
}

/** What lies between samples, or between every second, third, … of many: pairs of them, 60 at most. */
function steps(history) {
  const every = Math.ceil((history.length - 1) / 60) || 1;
  const kept = history.filter((_, i) => (history.length - 1 - i) % every === 0);
  return kept.slice(1).map((sample, i) => [kept[i], sample]);
}

/** The next larger number that begins with 1, 2 or 5. */
function round(number) {
  const power = 10 ** Math.floor(Math.log10(number));
  return power * [1, 2, 5, 10].find((digit) => digit * power >= number);
}

/** Bars over the last hour: [from, to, values], values stacked in the order of `kinds`. */
function chart(name, bars, kinds, most, format) {
  if (!bars.length) return element("p", { class: "faint" }, `The first point of ${name} comes in 15 s.`);
  const [width, height, left, low, high] = [Math.max(240, $("history").clientWidth), 130, 62, 112, 8];
  const make = (tag, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(text);
    return made;
  };
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name} over time` });
  const end = bars.at(-1)[1], start = Math.max(end - 3600, Math.min(bars[0][0], end - 300));
  const x = (at) => left + (width - left - 4) * (Math.max(at, start) - start) / (end - start);
  const y = (value) => low - (low - high) * Math.min(1, value / (most || 1));
  for (const share of [0, 0.5, 1]) {
    svg.append(make("line", { x1: left, x2: width - 4, y1: y(share * most), y2: y(share * most), class: "grid" }),
      make("text", { x: left - 6, y: y(share * most) + 4, class: "right" }, format(share * most)));
  }
  const every = [60, 120, 300, 600, 900].find((step) => (end - start) / step <= Math.max(2, width / 110));
  for (let at = Math.ceil(start / every) * every; at <= end; at += every) {
    svg.append(make("line", { x1: x(at), x2: x(at), y1: low, y2: low + 4, class: "grid" }));
    if (x(at) > left + 18 && x(at) < width - 20) {
      svg.append(make("text", { x: x(at), y: height - 3, class: "middle" }, clock(at).slice(0, 5)));
    }
  }
  for (const [from, to, values] of bars) {
    let below = 0;
    const told = kinds.map(([label], i) => `${label} ${format(values[i])}`).join(", ");
    values.forEach((value, i) => {
      const piece = make("rect", { x: x(from), width: Math.max(0.5, x(to) - x(from)), y: y(below + value),
        height: y(below) - y(below + value), class: kinds[i][1] });
      piece.append(make("title", {}, `until ${clock(to)}: ${told}`));
      if (value > 0) svg.append(piece);
      below += value;
    });
  }
  return svg;
}

/** What came from where between each two samples: shares of what was asked for, and chunks per second. */
function drawHistory({ history }) {
  const kinds = [["memory", "memory"], ["tiers", "tier0"], ["computed", "computed"]];
  const shares = [], rates = [];
  for (const [from, to] of steps(history)) {
    const [seconds, asked, memory, tiers] = to.map((value, at) => value - from[at]);
    shares.push([from[0], to[0], asked > 0 ? [memory / asked, tiers / asked] : [0, 0]]);
    rates.push([from[0], to[0], [memory, tiers, asked - memory - tiers].map((chunks) => chunks / seconds)]);
  }
  const last = history.at(-1), first = history[0];
  const asked = history.length > 1 ? last[1] - first[1] : 0;
  $("ratio").textContent = asked ? percent(last[2] - first[2] + last[3] - first[3], asked) : "–";
  const busiest = round(Math.max(1, ...rates.map(([, , values]) => values.reduce((a, b) => a + b, 0))));
  const perSecond = (chunks) => `${chunks < 10 ? Number(chunks.toFixed(1)) : count(Math.round(chunks))}/s`;
  show("history",
    element("div", { class: "legend" }, ...legend(kinds)),
    element("p", { class: "faint" }, "share of the chunks that engines asked for and did not have themselves"),
    chart("the hit ratio", shares, kinds.slice(0, 2), 1, (share) => `${Math.round(100 * share)} %`),
    element("p", { class: "faint" }, "chunks per second"),
    chart("the chunks asked for", rates, kinds, busiest, perSecond));
}

function drawRequests({ requests, keeper }) {
  const sources = [["engine's own cache", "engine"], ["memory", "memory"],
    ...tierNames.map((name, i) => [name, `tier${i % 4}`]), ["computed", "computed"]];
  show("sources", ...legend(sources));
  const amount = (r, chunks) => (r.chunk_tokens ? `${count(chunks * r.chunk_tokens)}` : `${chunks} chunks`);
  const pieces = (r) => {
    const tiers = tierNames.map((name, i) => [r.tiers[name] || 0, `tier${i % 4}`, name]);
    const found = tiers.reduce((sum, [n]) => sum + n, r.local + r.memory);
    return [[r.local, "engine", "engine's own cache"], [r.memory, "memory", "memory"], ...tiers,
      [r.chunks - found, "computed", "computed"]].map(([n, name, title]) => [n, name, `${title}: ${amount(r, n)}`]);
  };
  const found = (r) => r.memory + Object.values(r.tiers).reduce((a, b) => a + b, 0);
  show("requests", table([
    ["time", "", (r) => clock(r.at)], ["engine", "wide", (r) => element("code", {}, r.engine)],
    ["model", "name wide", (r) => labelOf(keeper, r.namespace)],
    ["where its tokens came from", "bars", (r) => bar(pieces(r), 0, "small")],
    ["tokens", "num", (r) => amount(r, r.chunks)],
    ["found here", "num", (r) => r.state || amount(r, found(r))],
  ], requests.slice(0, 25), "No request yet."));
}

function labelOf(keeper, number) {
  const space = keeper.namespaces.find((one) => one.namespace === number);
  return space ? space.label || space.fingerprint.slice(0, 8) : `#${number}`;
}

function button(text, path, body, question) {
  return element("button", { type: "button", onclick: () => act(path, body, question) }, text);
}

function drawPrefixes({ prefixes, keeper }) {
  show("prefixes", table([
    ["prefix", "", (p) => element("code", { title: labelOf(keeper, p.namespace) }, p.prefix.slice(0, 8))],
    ["tokens", "num", (p) => (p.tokens ? count(p.tokens) : `${p.chunks} chunks`)],
    ["size", "num wide", (p) => size(p.bytes)], ["uses", "num", (p) => count(p.uses)],
    ["size × uses", "num", (p) => size(p.weight)], ["last", "num wide", (p) => clock(p.last)],
    ["", "num", (p) => (p.held ? button(p.pinned ? "unpin" : "pin", p.pinned ? "unpin" : "pin", { prefix: p.prefix })
      : element("span", { class: "faint" }, "not in memory"))],
  ], prefixes, "Nothing was found twice yet."));
}

function drawNamespaces({ keeper }) {
  const actions = (s) => element("span", {},
    button("pin", "pin", { namespace: s.namespace }), " ", button("unpin", "unpin", { namespace: s.namespace }), " ",
    button("clear", "clear", { namespace: s.namespace }, `Forget all of ${s.label}?`));
  show("namespaces", table([
    ["namespace", "name", (s) => element("span", {}, s.label, " ", element("code", { class: "faint" },
      s.fingerprint.slice(0, 8)))],
    ["size", "num", (s) => size(s.used_bytes)], ["chunks", "num wide", (s) => count(s.chunks)],
    ["hit ratio", "num wide", (s) => percent(s.hit_chunks, s.asked_chunks)],
    ["lookups", "num wide", (s) => count(s.lookups)], ["", "num", actions],
  ], keeper.namespaces, "No engine has come yet."));
}

function draw(state) {
  tierNames = state.tiers.map((tier) => tier.name);
  $("state").className = `pill ${state.ready ? "on" : "off"}`;
  $("state").textContent = state.ready ? "ready" : "draining";
  const keeper = state.keeper;
  $("about").textContent = `${keeper.version}, policy ${keeper.policy}, up ${duration(keeper.uptime_s)}, `
    + `${count(keeper.counters.lookups)} lookups`;
  const parts = [drawMemory, drawHistory, drawTiers, drawRequests, drawPrefixes, drawNamespaces, drawTenants,
    drawKeeper];
  for (const part of parts) part(state);
}

function note(text, bad = false) {
  $("note").textContent = text;
  $("note").className = bad ? "bad" : "";
  $("note").hidden = !text;
}

const headers = () => ({
  "Content-Type": "application/json",
  ...($("token").value ? { Authorization: `Bearer ${$("token").value.trim()}` } : {}),
});

async function act(path, body, question) {
  if (question && !window.confirm(question)) return;
  if (!$("token").value) return note("Actions need the token: its file is named in the keeper's log.", true);
  try {
    const answer = await fetch(`api/${path}`, { method: "POST", headers: headers(), body: JSON.stringify(body) });
    const told = answer.status === 401 ? { error: "this is not the token" } : await answer.json();
    const done = Object.entries(told).map(([name, value]) => `${name.replaceAll("_", " ")}: ${value}`).join(", ");
    note(told.error || done, Boolean(told.error));
    await refresh();
  } catch { note("The keeper does not answer.", true); }
}

async function refresh() {
  try {
    const answer = await fetch("api/state", { headers: headers() });
    if (answer.status === 401) return note("This address needs the token to read, too.", true);
    draw(await answer.json());
  } catch {
    $("state").className = "pill off";
    $("state").textContent = "no answer";
  }
}

$("token-form").addEventListener("submit", (event) => { event.preventDefault(); refresh(); });
$("token").addEventListener("change", refresh);
$("clear").addEventListener("click", () => act("clear", {}, "Forget everything that is held?"));
$("drain").addEventListener("click", () =>
  act("drain", {}, "Write what the tiers lack, and end this keeper? Engines go on without it."));
document.title = `kvkeep ${location.host}`;
refresh();
setInterval(refresh, EVERY);
