// SPDX-License-Identifier: Apache-2.0

// What makes elements, and words of numbers and times.

export const $ = (id) => document.getElementById(id);

// element makes one with text or children; nothing that anybody sent is ever markup.
export function element(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) {
    if (k === "onclick") e.addEventListener("click", v);
    else if (v !== null && v !== undefined) e.setAttribute(k, v);
  }
  e.append(...children.filter((c) => c !== null && c !== undefined));
  return e;
}

export function drawing(tag, attributes, ...children) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  e.append(...children);
  return e;
}

// set changes the text only where it is another, so that a screen reader is left alone.
export function set(id, text) {
  const e = $(id);
  if (e.textContent !== text) e.textContent = text;
}

const made = new WeakMap(); // by element of a list: the key and the text of its item

// list shows items, and keeps the elements of those that have not changed: where the
// focus is, it stays.
export function list(id, items, key, make) {
  const parent = $(id);
  const before = new Map([...parent.children].map((e) => [made.get(e).key, e]));
  const now = items.map((item) => {
    const is = { key: key(item), text: JSON.stringify(item) };
    const kept = before.get(is.key);
    if (kept && made.get(kept).text === is.text) return kept;
    const e = make(item);
    made.set(e, is);
    return e;
  });
  if (now.length !== parent.children.length || now.some((e, i) => e !== parent.children[i])) parent.replaceChildren(...now);
}

export function size(n) {
  if (n < 1024) return n + " B";
  const units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
  let u = -1;
  do { n /= 1024; u++; } while (n >= 1023.95 && u < units.length - 1);
  return (n >= 100 ? n.toFixed(0) : n.toFixed(1)) + " " + units[u];
}

export const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

const dates = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const clocks = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
export const hours = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });

// time says when, with the date where that is not today's.
export function time(text) {
  const t = new Date(text);
  return (t.toDateString() === new Date().toDateString() ? clocks : dates).format(t);
}

export const at = (text) => element("time", { datetime: text }, time(text));

// duration is in seconds.
function duration(s) {
  if (s < 90) return Math.round(s) + " s";
  if (s < 5400) return Math.round(s / 60) + " min";
  if (s < 172800) return Math.round(s / 3600) + " h";
  return Math.round(s / 86400) + " days";
}

// age says how long ago something was, and goes on saying so.
export function age(text, before, after) {
  return aged(element("span", { "data-since": text, "data-before": before, "data-after": after }));
}

function aged(e) {
  const { since, before, after } = e.dataset;
  const text = before + duration(Math.max(0, (Date.now() - new Date(since)) / 1000)) + after;
  if (e.textContent !== text) e.textContent = text;
  return e;
}

export function ages() {
  document.querySelectorAll("[data-since]").forEach(aged);
}

export const short = (digest) => digest.replace(/^(\w+:.{12}).*/, "$1");
