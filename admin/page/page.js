// SPDX-License-Identifier: Apache-2.0

import { $, age, ages, at, count, drawing, element, hours, list, set, short, size, time } from "./dom.js";
import { stream } from "./stream.js";

async function get(path) {
  const answer = await fetch(path, { cache: "no-store" });
  const body = await answer.json().catch(() => ({ error: `this is no answer of tarn's: ${answer.status} ${answer.statusText}` }));
  if (!answer.ok || body.error) throw new Error(body.error + (body.next ? ". To do: " + body.next : ""));
  return body;
}

const toDo = (advice) => (advice ? ". To do: " + advice : "");

// ---- what comes live

export function show(state) { // a test has it show a day
  const { status, flights, day } = state;
  set("version", status.version);
  set("verdict", status.clients);
  showTroubles(status);
  showFigures(status, day);
  showDay(day);
  showFlights(flights, status.cache.flights + status.cache.parked);
  showUpstreams([...status.upstreams, ...(status.unlisted || [])]);
  showNames(state);
  ages();
}

// few is the share of a registry's quota that is worth a word.
const few = 0.1;

function showTroubles(status) {
  const all = [];
  if (status.cache.trouble) all.push(`The disk refuses, and objects pass through: ${status.cache.trouble}. To do: see what fills the filesystem of ${status.dir} (df), or whether it can be written at all (dmesg); as soon as it takes something again, objects are stored`);
  for (const u of status.upstreams) {
    for (const f of u.failing || []) all.push(`${u.name} does not answer: ${f.cause}${toDo(f.advice)}`);
    if (u.limitedUntil) all.push(`${u.name} limits requests until ${time(u.limitedUntil)}`);
    else if (u.rateLimit && u.rateLimit.remaining < few * u.rateLimit.limit) all.push(`${u.name} grants ${u.rateLimit.remaining} of ${u.rateLimit.limit} requests still`);
  }
  trouble(all);
  document.title = (all.length ? "trouble: " : "") + "tarn at " + location.host;
}

function trouble(all) {
  list("troubles", all, (t) => t, (t) => element("li", {}, t));
  $("troubles").hidden = all.length === 0;
}

function showFigures(status, day) {
  const used = status.cache.usedBytes, most = status.cache.maxBytes;
  set("space", size(used));
  set("space-more", `of ${size(most)} in ${status.dir}; ${count(status.index.objects, "object")}`);
  $("space-meter").value = most ? used / most : 0;
  const sum = (k) => day.reduce((n, s) => n + s[k], 0);
  const disk = sum("fromDiskBytes"), registry = sum("fromRegistryBytes"), received = sum("receivedBytes"), all = disk + registry;
  set("share", all ? Math.floor(100 * disk / all) + "%" : "–");
  set("share-more", all ? `of ${size(all)} in ${count(sum("requests"), "request")}` : "no bytes were asked for");
  set("saved", all ? size(Math.max(0, all - received)) : "–");
  set("saved-more", `${size(all)} served, ${size(received)} received from registries`);
}

let drawn = "";

function showDay(day) {
  const text = JSON.stringify(day) + Math.floor(Date.now() / 60000);
  if (text === drawn) return;
  drawn = text;
  const bars = 97, quarter = 900000; // of a day, and the one that has begun
  const start = Math.floor(Date.now() / quarter) * quarter - (bars - 1) * quarter;
  const most = Math.max(0, ...day.map((s) => s.fromDiskBytes + s.fromRegistryBytes));
  $("day").hidden = most === 0;
  $("day-none").hidden = most !== 0;
  set("day-none", "Nothing was served in 24 hours.");
  if (most === 0) return;
  set("day-most", `the highest bar is ${size(most)}`);
  const y = (n) => 100 * (1 - n / most);
  const svg = drawing("svg", { viewBox: `0 0 ${bars} 100`, preserveAspectRatio: "none", role: "img", "aria-label": describeDay(day) });
  for (const s of day) {
    const x = (new Date(s.start) - start) / quarter;
    if (x < 0 || x >= bars) continue;
    const disk = s.fromDiskBytes, all = disk + s.fromRegistryBytes;
    svg.append(drawing("rect", { class: "disk", x, width: 0.85, y: y(disk), height: y(0) - y(disk) }),
      drawing("rect", { class: "registry", x, width: 0.85, y: y(all), height: y(disk) - y(all) }));
  }
  $("chart").replaceChildren(svg);
  $("day-hours").replaceChildren(...[0, 6, 12, 18].map((h) => element("span", {}, hours.format(start + 4 * h * quarter))), element("span", {}, "now"));
  $("day-table").tBodies[0].replaceChildren(...day.map((s) => element("tr", {}, element("th", { scope: "row" }, at(s.start)),
    element("td", {}, String(s.requests)), element("td", {}, size(s.fromDiskBytes)), element("td", {}, size(s.fromRegistryBytes)), element("td", {}, size(s.receivedBytes)))));
}

function describeDay(day) {
  const sum = (k) => day.reduce((n, s) => n + s[k], 0);
  return `In 24 hours ${size(sum("fromDiskBytes"))} were served from the disk, and ${size(sum("fromRegistryBytes"))} as they came from a registry.`;
}

let speeds = new Map(); // by flight: when it was seen, with how many bytes, and how fast it was

// speed is in bytes a second, over some seconds; undefined while nobody knows.
function speed(key, f, before) {
  const was = before.get(key), now = Date.now();
  if (!was || f.parked) return { at: now, here: f.hereBytes };
  if (now - was.at < 900) return was;
  const measured = 1000 * Math.max(0, f.hereBytes - was.here) / (now - was.at);
  return { at: now, here: f.hereBytes, rate: was.rate === undefined ? measured : 0.7 * was.rate + 0.3 * measured };
}

function showFlights(flights, all) {
  const before = speeds, key = (f) => f.digest + f.sourceDomain;
  speeds = new Map(flights.map((f) => [key(f), speed(key(f), f, before)]));
  set("flights-count", all === 0 ? "Nothing is being fetched." : flights.length < all ? `The first ${flights.length} of ${all}.` : "");
  list("flights", flights.map((f) => ({ ...f, rate: speeds.get(key(f)).rate })), key, flight);
}

function flight(f) {
  const known = f.totalBytes !== undefined;
  const bar = element("progress", { max: known ? Math.max(1, f.totalBytes) : 1, "aria-label": "Fetched of " + short(f.digest) });
  if (known) bar.value = f.hereBytes;
  return element("li", {},
    element("p", { class: "line" }, element("code", {}, short(f.digest)),
      element("span", {}, size(f.hereBytes) + (known ? " of " + size(f.totalBytes) : "") + (f.rate === undefined ? "" : `, ${size(Math.round(f.rate))} a second`))),
    bar,
    element("p", { class: "more" }, element("span", {}, f.upstream || (f.sourceDomain === "listed" ? "a listed registry" : f.sourceDomain)),
      element("span", {}, f.parked ? "broke off, and is gone on with when it is asked for" : count(f.readers, "reader")), age(f.since, "for ", "")));
}

function showUpstreams(upstreams) {
  list("upstreams", upstreams, (u) => u.name, (u) => {
    const more = [];
    if (u.effect) more.push(u.effect);
    if (u.limitedUntil) more.push("limits requests until " + time(u.limitedUntil));
    if (u.rateLimit) more.push(`grants ${u.rateLimit.remaining} of ${u.rateLimit.limit} requests still, as it said at ${time(u.rateLimit.seen)}`);
    const failing = u.failing || [];
    const word = failing.length ? "does not answer" : u.limitedUntil ? "limits requests" : "no trouble seen";
    return element("li", {},
      element("p", { class: "line" }, element("strong", {}, u.name), element("span", { class: failing.length || u.limitedUntil ? "bad" : "more" }, word)),
      ...more.map((m) => element("p", {}, m)),
      ...failing.map((f) => element("p", { class: "more" }, `${f.origin}, since ${time(f.since)}: ${f.cause}${toDo(f.advice)}`)));
  });
}

// ---- images, decisions, and one image explained

let images = [], decisions = { decisions: [], since: null };
const shown = 200;

// showNames shows what names images; or, where this listener does not, why.
function showNames(state) {
  for (const part of document.querySelectorAll(".named")) part.hidden = Boolean(state.names);
  if (state.names) {
    images = [];
    for (const id of ["images", "decisions", "explanation"]) $(id).replaceChildren();
    set("images-count", state.names);
    listed = { index: "", at: 0, pause: 0 };
    return;
  }
  decisions = state.decisions;
  showDecisions();
  loadImages(JSON.stringify(state.status.index));
}

function matches(id, text) {
  const wanted = $(id).value.trim().toLowerCase();
  return !wanted || wanted.split(/\s+/).every((w) => text.toLowerCase().includes(w));
}

const nameOf = (i) => `${i.upstream}/${i.repository}${i.tag ? ":" + i.tag : "@" + i.digest}`;

function showImages() {
  const found = images.filter((i) => matches("images-search", nameOf(i) + " " + i.digest + (i.pinned ? " pinned" : "") + " " + i.platforms.join(" ")));
  set("images-count", images.length === 0 ? "None is here yet." : `${found.length} of ${count(images.length, "image")}${found.length > shown ? `, the first ${shown} are shown` : ""}`);
  list("images", found.slice(0, shown), (i) => nameOf(i) + "@" + i.digest, (i) => element("li", {},
    element("p", { class: "line" }, element("strong", {}, nameOf(i)), element("button", { type: "button", "aria-label": "Explain " + nameOf(i), onclick: () => explain(nameOf(i)) }, "Explain")),
    element("p", { class: "more" }, element("code", {}, short(i.digest)),
      element("span", {}, i.hereBytes === i.totalBytes ? size(i.hereBytes) : `${size(i.hereBytes)} of ${size(i.totalBytes)}`),
      i.platforms.length ? element("span", {}, i.platforms.join(", ")) : null, i.pinned ? element("span", {}, "pinned") : null,
      i.confirmed ? age(i.confirmed, "confirmed ", " ago") : null)));
}

function event(e) {
  const name = e.repository ? `${e.upstream}/${e.repository}` : e.digest ? short(e.digest) : e.upstream;
  return element("li", { class: "event" }, at(e.last || e.at),
    element("div", {}, name ? element("p", {}, element("strong", {}, name)) : null, element("p", { class: e.status >= 500 ? "bad" : null }, e.words)));
}

function showDecisions() {
  const all = decisions.decisions;
  const found = all.filter((e) => matches("decisions-search", `${e.upstream || ""}/${e.repository || ""} ${e.words} ${e.digest || ""} ${e.outcome}`)).reverse();
  set("decisions-count", all.length === 0 ? "Nothing yet: what clients ask for is told here as it happens."
    : `${found.length} of the last ${all.length}; /api/v1/decisions has more, all since ${time(decisions.since)}.`);
  list("decisions", found.slice(0, shown), (e) => String(e.id), event);
}

let asked = 0; // how many images were to be explained: only the last one's answer is shown

async function explain(image) {
  const mine = ++asked;
  $("explain-image").value = image;
  set("explain-state", "Asking the registry …");
  $("explanation").replaceChildren();
  try {
    const x = await get("api/v1/explain?" + new URLSearchParams({ image }));
    if (mine !== asked) return;
    set("explain-state", "");
    $("explanation").replaceChildren(explanation(x));
    $("explanation").querySelector("h3").focus();
  } catch (e) {
    if (mine === asked) set("explain-state", e.message);
  }
}

function explanation(x) {
  const missing = x.here.missing || [];
  return element("div", { class: "figure" },
    element("h3", { tabindex: "-1" }, x.image),
    element("p", { class: "verdict" }, x.verdict), element("p", {}, x.next),
    x.advice ? element("p", {}, "To do: " + x.advice) : null,
    element("p", {}, "Who may have it: " + x.who + "."),
    x.here.digest ? element("p", {}, "Here: ", element("code", {}, x.here.digest), `, ${size(x.here.hereBytes)} of ${size(x.here.totalBytes)}`) : null,
    missing.length ? element("p", {}, `Not here: ${count(missing.length, "object")}, ${size(missing.reduce((n, g) => n + g.bytes, 0))}: ${[...new Set(missing.map((g) => g.cause))].join(", ")}`) : null,
    x.there.digest ? element("p", {}, "There: ", element("code", {}, x.there.digest), `, asked now with ${x.there.method} as ${x.there.as}`) : null,
    element("p", {}, `What happened, since ${time(x.since)}:` + (x.happened.length ? "" : " nothing.")),
    x.happened.length ? element("ol", { class: "rows" }, ...x.happened.map(event)) : null);
}

let listed = { index: "", at: 0, pause: 0 }; // of what state the images are, and when to ask again

// loadImages asks for the images where what is stored has changed, and once a minute.
// A long list is asked for less often: a fiftieth of the time at most.
async function loadImages(index) {
  const now = Date.now();
  if (now - listed.at < (index === listed.index ? Math.max(60000, listed.pause) : listed.pause)) return;
  listed = { index, at: now, pause: Infinity };
  try {
    images = (await get("api/v1/images")).images;
    showImages();
  } catch (e) {
    set("images-count", e.message);
  }
  listed.pause = Math.max(3000, 50 * (Date.now() - now));
}

$("explain-form").addEventListener("submit", (e) => {
  e.preventDefault();
  const image = $("explain-image").value.trim();
  if (image) explain(image);
});
$("images-search").addEventListener("input", showImages);
$("decisions-search").addEventListener("input", showDecisions);
for (const form of document.querySelectorAll("form.filter")) form.addEventListener("submit", (e) => e.preventDefault());
setInterval(ages, 10000);

// ---- live, while the tab is visible

let lostAt = null, seen = false;

function receive(message) {
  if (!message.lost) {
    lostAt = null;
    seen = true;
    set("live", "live");
    show(JSON.parse(message.state));
    return;
  }
  lostAt ??= new Date();
  set("live", "not live");
  const said = message.next ? "This page is not live: " + message.lost : message.lost + ", since " + time(lostAt);
  set("verdict", said + (seen ? "; what stands below is from before" : ""));
  trouble(["This page tries again by itself. To do: " + (message.next || "on the node, systemctl status tarn and journalctl -u tarn say why; in a cluster, kubectl describe and kubectl logs of tarn's pod there. Meanwhile containerd asks the registries themselves")]);
  document.title = "not live: tarn at " + location.host;
}

// follow has a worker keep one stream for all tabs; where there are no such workers,
// each visible tab has its own.
function follow() {
  let tell;
  if (window.SharedWorker) {
    const worker = new SharedWorker("worker.js", { name: "tarn", type: "module" });
    worker.port.onmessage = (m) => receive(m.data);
    tell = (visible, gone) => worker.port.postMessage({ visible, gone });
  } else {
    tell = stream(receive);
  }
  const look = () => tell(document.visibilityState === "visible", false);
  document.addEventListener("visibilitychange", look);
  addEventListener("pagehide", () => tell(false, true));
  addEventListener("pageshow", look);
  look();
}

follow();
