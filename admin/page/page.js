// SPDX-License-Identifier: Apache-2.0

const $ = (id) => document.getElementById(id);

// element makes one with text or children; nothing that anybody sent is ever markup.
function element(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) {
    if (k === "onclick") e.addEventListener("click", v);
    else if (v !== null && v !== undefined) e.setAttribute(k, v);
  }
  e.append(...children.filter((c) => c !== null && c !== undefined));
  return e;
}

function drawing(tag, attributes, ...children) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  e.append(...children);
  return e;
}

// set changes the text only where it is another, so that a screen reader is left alone.
function set(id, text) {
  const e = $(id);
  if (e.textContent !== text) e.textContent = text;
}

// list shows items, and keeps the elements of those that have not changed: where the
// focus is, it stays.
function list(id, items, key, make) {
  const parent = $(id);
  const before = new Map([...parent.children].map((e) => [e.dataset.key, e]));
  const now = items.map((item) => {
    const k = key(item);
    const kept = before.get(k);
    const text = JSON.stringify(item);
    if (kept && kept.dataset.text === text) return kept;
    const e = make(item);
    e.dataset.key = k;
    e.dataset.text = text;
    return e;
  });
  if (now.length !== parent.children.length || now.some((e, i) => e !== parent.children[i])) parent.replaceChildren(...now);
}

function size(n) {
  if (n < 1024) return n + " B";
  const units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
  let u = -1;
  do { n /= 1024; u++; } while (n >= 1023.95 && u < units.length - 1);
  return (n >= 100 ? n.toFixed(0) : n.toFixed(1)) + " " + units[u];
}

const times = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const hours = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });

function at(text, format = times) {
  return element("time", { datetime: text }, format.format(new Date(text)));
}

function since(text) {
  const s = Math.max(0, (Date.now() - new Date(text)) / 1000);
  if (s < 90) return Math.round(s) + " s";
  if (s < 5400) return Math.round(s / 60) + " min";
  if (s < 172800) return Math.round(s / 3600) + " h";
  return Math.round(s / 86400) + " days";
}

const short = (digest) => digest.replace(/^(\w+:.{12}).*/, "$1");

async function get(path) {
  const answer = await fetch(path, { cache: "no-store" });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error + (body.next ? " (" + body.next + ")" : ""));
  return body;
}

// ---- what comes live

function show(state) {
  const { status, flights, day } = state;
  set("version", status.version);
  set("verdict", status.clients);
  document.title = "tarn: " + status.clients;
  showTroubles(status);
  showFigures(status, day);
  showDay(day);
  showFlights(flights);
  showUpstreams([...status.upstreams, ...(status.unlisted || [])]);
  if (state.decisions) {
    decisions = state.decisions;
    showDecisions();
  } else if (state.names) {
    hideNames(state.names);
  }
}

function showTroubles(status) {
  const all = [];
  if (status.cache.trouble) all.push("The disk refuses, and objects pass through: " + status.cache.trouble);
  for (const u of status.upstreams) for (const f of u.failing || []) all.push(u.name + ": " + f.cause + (f.advice ? ". To do: " + f.advice : ""));
  list("troubles", all, (t) => t, (t) => element("li", {}, t));
  $("troubles").hidden = all.length === 0;
}

function showFigures(status, day) {
  const used = status.cache.usedBytes, most = status.cache.maxBytes;
  set("space", size(used));
  set("space-more", `of ${size(most)} in ${status.dir}; ${status.index.objects} objects`);
  $("space-meter").value = most ? used / most : 0;
  const sum = (k) => day.reduce((n, s) => n + s[k], 0);
  const disk = sum("fromDiskBytes"), registry = sum("fromRegistryBytes"), received = sum("receivedBytes"), all = disk + registry;
  set("share", all ? Math.floor(100 * disk / all) + " %" : "–");
  set("share-more", all ? `of ${size(all)} in ${sum("requests")} requests` : "nothing was asked for");
  set("saved", size(Math.max(0, all - received)));
  set("saved-more", `${size(all)} served, ${size(received)} received from registries`);
}

let drawn = "";

function showDay(day) {
  const text = JSON.stringify(day) + Math.floor(Date.now() / 60000);
  if (text === drawn) return;
  drawn = text;
  const width = 720, height = 160, left = 64, bottom = 20, top = 8, bars = 97, quarter = 900000;
  const start = Math.floor(Date.now() / quarter) * quarter - (bars - 1) * quarter;
  const most = Math.max(1, ...day.map((s) => s.fromDiskBytes + s.fromRegistryBytes));
  const y = (n) => top + (height - top - bottom) * (1 - n / most);
  const wide = (width - left) / bars;
  const svg = drawing("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": describeDay(day) });
  for (const n of [0, most / 2, most]) {
    svg.append(drawing("line", { class: "axis", x1: left, x2: width, y1: y(n), y2: y(n) }),
      drawing("text", { x: left - 6, y: y(n) + 4, "text-anchor": "end" }, most > 1 ? size(Math.round(n)) : ""));
  }
  for (const s of day) {
    const i = (new Date(s.start) - start) / quarter;
    if (i < 0 || i >= bars) continue;
    const x = left + i * wide, disk = s.fromDiskBytes, all = disk + s.fromRegistryBytes;
    svg.append(drawing("rect", { class: "disk", x, width: wide - 1, y: y(disk), height: y(0) - y(disk) }),
      drawing("rect", { class: "registry", x, width: wide - 1, y: y(all), height: y(disk) - y(all) }));
  }
  for (const hour of [24, 18, 12, 6, 0]) {
    const x = left + (bars - hour * 4) * wide;
    svg.append(drawing("text", { x: Math.min(width, x), y: height - 4, "text-anchor": hour === 24 ? "start" : hour === 0 ? "end" : "middle" }, hours.format(start + (bars - hour * 4) * quarter)));
  }
  $("chart").replaceChildren(svg);
  $("day-table").tBodies[0].replaceChildren(...day.map((s) => element("tr", {}, element("td", {}, at(s.start)),
    element("td", {}, String(s.requests)), element("td", {}, size(s.fromDiskBytes)), element("td", {}, size(s.fromRegistryBytes)), element("td", {}, size(s.receivedBytes)))));
}

function describeDay(day) {
  const sum = (k) => day.reduce((n, s) => n + s[k], 0);
  return `In 24 hours ${size(sum("fromDiskBytes"))} were served from the disk, and ${size(sum("fromRegistryBytes"))} as they came from a registry.`;
}

function showFlights(flights) {
  $("flights-none").hidden = flights.length > 0;
  list("flights", flights, (f) => f.digest + f.sourceDomain, (f) => {
    const known = f.totalBytes !== undefined;
    const bar = element("progress", { max: known ? Math.max(1, f.totalBytes) : 1, "aria-label": "Fetched of " + short(f.digest) });
    if (known) bar.value = f.hereBytes;
    return element("li", {},
      element("p", { class: "line" }, element("code", {}, short(f.digest)), size(f.hereBytes) + (known ? " of " + size(f.totalBytes) : "")),
      bar,
      element("p", { class: "more" }, element("span", {}, f.upstream || f.sourceDomain),
        element("span", {}, f.parked ? "broke off, and is gone on with when it is asked for" : f.readers + (f.readers === 1 ? " reader" : " readers")), element("span", {}, "for " + since(f.since))));
  });
}

function showUpstreams(upstreams) {
  list("upstreams", upstreams, (u) => u.name, (u) => {
    const more = [];
    if (u.effect) more.push(u.effect);
    if (u.limitedUntil) more.push("limits requests until " + times.format(new Date(u.limitedUntil)));
    if (u.rateLimit) more.push(`grants ${u.rateLimit.remaining} of ${u.rateLimit.limit} requests still`);
    const failing = u.failing || [];
    return element("li", {},
      element("p", { class: "line" }, element("strong", {}, u.name), element("span", { class: failing.length ? "bad" : null }, failing.length ? "does not answer" : "no trouble seen")),
      ...more.map((m) => element("p", {}, m)),
      ...failing.map((f) => element("p", { class: "bad" }, `${f.origin}, since ${times.format(new Date(f.since))}: ${f.cause}${f.advice ? ". To do: " + f.advice : ""}`)));
  });
}

// ---- images, decisions, and one image explained

let images = [], decisions = { decisions: [], since: null };
const shown = 200;

function matches(id, text) {
  const wanted = $(id).value.trim().toLowerCase();
  return !wanted || wanted.split(/\s+/).every((w) => text.toLowerCase().includes(w));
}

function showImages() {
  const name = (i) => `${i.upstream}/${i.repository}${i.tag ? ":" + i.tag : "@" + i.digest}`;
  const found = images.filter((i) => matches("images-search", name(i) + " " + i.digest + (i.pinned ? " pinned" : "") + " " + i.platforms.join(" ")));
  set("images-count", `${found.length} of ${images.length} images${found.length > shown ? `, the first ${shown} are shown` : ""}`);
  list("images", found.slice(0, shown), name, (i) => element("li", {},
    element("p", { class: "line" }, element("strong", {}, name(i)), element("button", { type: "button", "aria-label": "Explain " + name(i), onclick: () => explain(name(i)) }, "Explain")),
    element("p", { class: "more" }, element("code", {}, short(i.digest)),
      element("span", {}, i.hereBytes === i.totalBytes ? size(i.hereBytes) : `${size(i.hereBytes)} of ${size(i.totalBytes)}`),
      element("span", {}, i.platforms.join(", ")), i.pinned ? element("span", {}, "pinned") : null,
      i.confirmed ? element("span", {}, "confirmed " + since(i.confirmed) + " ago") : null)));
}

function event(e) {
  return element("li", {}, element("p", {}, at(e.last || e.at)), element("p", { class: e.status >= 500 ? "bad" : null }, e.words),
    e.repository ? element("p", { class: "more" }, e.upstream + "/" + e.repository) : null);
}

function showDecisions() {
  const found = decisions.decisions.filter((e) => matches("decisions-search", `${e.upstream || ""}/${e.repository || ""} ${e.words} ${e.digest || ""} ${e.outcome}`)).reverse();
  if (decisions.since) set("decisions-count", `The last ${decisions.decisions.length}; /api/v1/decisions has all since ${times.format(new Date(decisions.since))}.`);
  list("decisions", found.slice(0, shown), (e) => String(e.id), event);
}

async function explain(image) {
  $("explain-image").value = image;
  const target = $("explanation");
  target.replaceChildren(element("p", {}, "Asking the registry …"));
  try {
    const x = await get("api/v1/explain?" + new URLSearchParams({ image }));
    target.replaceChildren(...[
      element("h3", { tabindex: "-1" }, x.image),
      element("p", {}, element("strong", {}, x.verdict)), element("p", {}, x.next),
      x.advice ? element("p", {}, "To do: " + x.advice) : null,
      element("p", {}, "Who may have it: " + x.who + "."),
      x.here.digest ? element("p", {}, "Here: ", element("code", {}, x.here.digest), `, ${size(x.here.hereBytes)} of ${size(x.here.totalBytes)}`) : null,
      x.there.digest ? element("p", {}, "There: ", element("code", {}, x.there.digest), `, asked now with ${x.there.method} as ${x.there.as}`) : null,
      element("p", {}, `What happened, since ${times.format(new Date(x.since))}:` + (x.happened.length ? "" : " nothing.")),
      x.happened.length ? element("ol", { class: "rows" }, ...x.happened.map(event)) : null].filter(Boolean));
    target.querySelector("h3").focus();
  } catch (e) {
    target.replaceChildren(element("p", { class: "bad" }, String(e.message)));
  }
}

async function loadImages() {
  try {
    images = (await get("api/v1/images")).images;
    showImages();
  } catch (e) {
    set("images-count", e.message);
  }
}

function hideNames(words) {
  for (const id of ["images-count", "decisions-count"]) set(id, words);
}

$("explain-form").addEventListener("submit", (e) => { e.preventDefault(); if ($("explain-image").value.trim()) explain($("explain-image").value.trim()); });
$("images-search").addEventListener("input", showImages);
$("decisions-search").addEventListener("input", showDecisions);
for (const form of document.querySelectorAll("form.filter")) form.addEventListener("submit", (e) => e.preventDefault());

// ---- live, while the tab is visible

let loaded = 0, names = true;

function receive(message) {
  if (message.lost) {
    set("live", "tarn does not answer; trying again");
    return;
  }
  const state = JSON.parse(message.state);
  set("live", "live");
  show(state);
  names = !state.names;
  if (names && Date.now() - loaded > 30000) {
    loaded = Date.now();
    loadImages();
  }
}

function follow() {
  if (window.SharedWorker) {
    const worker = new SharedWorker("worker.js", { name: "tarn" });
    const tell = (m) => worker.port.postMessage(m);
    worker.port.onmessage = (m) => receive(m.data);
    const look = () => tell({ visible: document.visibilityState === "visible" });
    document.addEventListener("visibilitychange", look);
    addEventListener("pagehide", () => tell({ gone: true }));
    addEventListener("pageshow", look);
    look();
    return;
  }
  let stream = null; // without one, each visible tab has its own
  const look = () => {
    const visible = document.visibilityState === "visible";
    if (visible && !stream) {
      stream = new EventSource("api/v1/events");
      stream.onmessage = (e) => receive({ state: e.data });
      stream.onerror = () => {
        receive({ lost: true });
        if (stream.readyState === EventSource.CLOSED) { stream = null; setTimeout(look, 5000); }
      };
    } else if (!visible && stream) {
      stream.close();
      stream = null;
    }
  };
  document.addEventListener("visibilitychange", look);
  look();
}

follow();
