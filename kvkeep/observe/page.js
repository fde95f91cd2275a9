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

function drawMemory({ arena, keeper }) {
  const uses = [["held", "memory"], ["pinned", "pinned"], ["reserved", "reserved"], ["free", "computed"]];
  const counters = keeper.counters;
  show("memory",
    bar(uses.map(([use, name]) => [arena[use], name, `${use}: ${size(arena[use])}`])),
    element("div", { class: "legend" }, ...legend(uses.map(([use, name]) => [`${use} ${size(arena[use])}`, name]))),
    terms([
      ["of", size(keeper.memory_bytes)], ["prepared", percent(keeper.prefaulted_bytes, keeper.memory_bytes)],
      ["chunks", count(keeper.chunks)], ["stored", count(counters.stored_chunks)],
      ["evicted", count(counters.evicted_chunks)], ["refused", count(counters.refused_chunks)],
      ["leases", count(keeper.leases)], ["engines", count(keeper.sessions)],
      ["protocol errors", count(keeper.protocol_errors)],
    ]));
}

function drawTiers({ tiers }) {
  const columns = [
    ["tier", "name", (t) => element("span", {}, t.name, " ", t.writable ? "" :
      element("span", { class: "bad" }, `${t.available ? "read only" : "off"}: ${t.last_error}`))],
    ["full", "bars", (t) => t.capacity_bytes
      ? bar([[t.used_bytes, `tier${tiers.indexOf(t) % 4}`, size(t.used_bytes)]], t.capacity_bytes) : "–"],
    ["used", "num", (t) => size(t.used_bytes)], ["of", "num wide", (t) => size(t.capacity_bytes)],
    ["had", "num", (t) => percent(t.found, t.asked)], ["read", "num wide", (t) => size(t.got_bytes)],
    ["GB/s", "num wide", (t) => t.read_GBps ?? "–"], ["written", "num wide", (t) => size(t.put_bytes)],
    ["waiting", "num wide", (t) => count(t.waiting_chunks)], ["lost", "num wide", (t) => count(t.lost_chunks)],
    ["damaged", "num wide", (t) => count(t.damaged)], ["errors", "num", (t) => count(t.errors)],
  ];
  show("tiers", table(columns, tiers, "Memory only: no tier is configured (--tier)."));
}

/** Share of asked chunks that came from memory, and on top from tiers, between each two samples. */
function drawHistory({ history }) {
  const steps = [];
  for (let i = 1; i < history.length; i++) {
    const [before, now] = [history[i - 1], history[i]];
    const asked = now[1] - before[1];
    if (asked > 0) steps.push([now[0], (now[2] - before[2]) / asked, (now[3] - before[3]) / asked]);
    else steps.push([now[0], 0, 0]);
  }
  const last = history.at(-1), first = history[0];
  const asked = history.length > 1 ? last[1] - first[1] : 0;
  $("ratio").textContent = asked ? percent(last[2] - first[2] + last[3] - first[3], asked) : "–";
  if (!steps.length) return show("history", element("p", { class: "faint" }, "The first sample comes in 15 s."));
  const [width, height] = [600, 150];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const add = (tag, attributes) => {
    const made = document.createElementNS(svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    svg.append(made);
  };
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const floor = height - 2, slot = width / 240;
  const y = (share) => floor - (floor - 2) * Math.min(1, share);
  for (const share of [0, 0.5, 1]) add("line", { x1: 0, x2: width, y1: y(share), y2: y(share), class: "grid" });
  steps.forEach(([, memory, tiers], i) => {
    const x = width - (steps.length - i) * slot;
    add("rect", { x, width: slot * 0.92, y: y(memory), height: floor - y(memory), class: "memory" });
    add("rect", { x, width: slot * 0.92, y: y(memory + tiers), height: y(memory) - y(memory + tiers), class: "tiers" });
  });
  show("history", svg, element("div", { class: "legend" },
    ...legend([["memory", "memory"], ["tiers", "tier0"]]),
    element("span", { class: "faint" }, `lines at 0, 50, 100 %; the last hour, up to ${clock(last[0])}`)));
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
    ["found here", "num", (r) => (r.waiting ? "waits" : amount(r, found(r)))],
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
  for (const part of [drawMemory, drawTiers, drawHistory, drawRequests, drawPrefixes, drawNamespaces]) part(state);
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
refresh();
setInterval(refresh, EVERY);
