// SPDX-License-Identifier: Apache-2.0

// What the scripts of page_test.go share: a real Chromium that is watched for whatever
// it complains of, and the questions that a script has for the test.

import { spawn } from "node:child_process";
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const require = createRequire(process.env.TARN_E2E_MODULES + "/");
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

export const address = "http://127.0.0.1:5051/";
const patience = 30000; // as for whatever is expected to happen: who waits for so long fails

const answers = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

// ask has the test do something, and returns what it says.
export async function ask(what) {
  process.stdout.write("ask " + what + "\n");
  const { value, done } = await answers.next();
  if (done) throw new Error("the test has ended");
  return value;
}

export function check(ok, words) {
  if (!ok) throw new Error(words);
}

// until waits for what a function of the page returns to be true.
export async function until(page, what, ask, argument) {
  try {
    await page.waitForFunction(ask, argument, { timeout: patience });
  } catch {
    const seen = await page.evaluate(() => document.body.innerText.slice(0, 1500));
    throw new Error(`not within ${patience} ms: ${what}; the page says:\n${seen}`);
  }
}

export const says = (page, id, words) => until(page, `#${id} says ${words}`, ([i, w]) => new RegExp(w).test(document.getElementById(i).innerText), [id, words]);

// launch starts Chromium as Debian has it. Of its first context the tabs are visible
// and hidden as people's are; pages of further ones are always visible.
export async function launch() {
  const profile = process.env.TARN_E2E_PROFILE;
  const browser = spawn("chromium", ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--user-data-dir=" + profile, "about:blank"], { stdio: ["ignore", "ignore", "pipe"] });
  const at = await new Promise((found, failed) => {
    let text = "";
    browser.stderr.on("data", (d) => {
      text += d;
      const m = /ws:\/\/\S+/.exec(text);
      if (m) found(m[0]);
    });
    browser.on("exit", () => failed(new Error("chromium ended:\n" + text)));
  });
  const driven = await chromium.connectOverCDP(at, { noDefaults: true });
  const close = async () => {
    await driven.close();
    if (browser.exitCode === null && browser.signalCode === null) {
      const ended = new Promise((done) => browser.on("exit", done));
      browser.kill();
      await ended;
    }
  };
  return { driven, tabs: driven.contexts()[0], close };
}

// watch collects what a page should not do: throw, complain, or ask anybody else.
// expected are complaints that belong to what is tested.
export function watch(page, expected = null) {
  const wrong = [];
  page.on("pageerror", (e) => wrong.push("thrown: " + (e.stack || e)));
  page.on("console", (m) => {
    if (["error", "warning"].includes(m.type()) && !(expected && expected.test(m.text()))) wrong.push(m.type() + ": " + m.text());
  });
  page.on("request", (r) => {
    if (!r.url().startsWith(address)) wrong.push("asked for " + r.url());
  });
  return () => check(wrong.length === 0, wrong.join("\n"));
}

export async function open(context, expected) {
  const page = await context.newPage();
  const fine = watch(page, expected);
  await page.goto(address);
  return { page, fine };
}

export const live = (page) => until(page, "the page is live", () => document.getElementById("live").textContent === "live" && document.getElementById("images-count").textContent !== "");

const looks = [["light", 1280], ["dark", 1280], ["light", 360], ["dark", 360]];

// look holds the page as it is now, in light and dark, wide and narrow, to axe-core's
// rules, and to showing all that it says.
export async function look(driven, name, prepare = () => {}) {
  for (const [colorScheme, width] of looks) {
    const context = await driven.newContext({ viewport: { width, height: 900 }, colorScheme, locale: "en-GB", timezoneId: "UTC" });
    const { page, fine } = await open(context);
    await live(page);
    await prepare(page);
    await hold(page, `${name}-${colorScheme}-${width}`);
    fine();
    await context.close();
  }
}

// hold is a look at one page, as it is.
export async function hold(page, name) {
  if (process.env.TARN_E2E_PAGE_LOOKS) {
    mkdirSync(process.env.TARN_E2E_PAGE_LOOKS, { recursive: true });
    await page.screenshot({ path: `${process.env.TARN_E2E_PAGE_LOOKS}/${name}.png`, fullPage: true });
  }
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => axe.run());
  check(violations.length === 0, `${name}: axe: ` + violations.map((v) => `${v.id}: ${v.help}: ${v.nodes.map((n) => n.target + " " + n.failureSummary).join("; ")}`).join("\n"));
  const cut = await page.evaluate(findCut);
  check(cut.length === 0, `${name}: cut: ${cut.join("\n")}`);
}

// findCut runs in the page: it finds text that cannot be seen, but for what is meant
// to be: who scrolls it sees it, or who comes to it by keyboard.
function findCut() {
  const cut = [];
  if (document.documentElement.scrollWidth > innerWidth) cut.push(`the page is ${document.documentElement.scrollWidth} pixels wide`);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n = texts.nextNode(); n; n = texts.nextNode()) {
    if (!n.data.trim() || n.parentElement.closest(".skip, .scroll, noscript, [hidden], details:not([open]) > :not(summary)")) continue;
    const range = document.createRange();
    range.selectNodeContents(n);
    for (const r of range.getClientRects()) {
      if (r.left < -0.5 || r.right > innerWidth + 0.5) cut.push(`${n.data.slice(0, 80)}: from ${r.left} to ${r.right}`);
      for (let e = n.parentElement; e; e = e.parentElement) {
        const box = e.getBoundingClientRect();
        if (getComputedStyle(e).overflowX !== "visible" && (r.right > box.right + 0.5 || r.bottom > box.bottom + 0.5)) cut.push(`${n.data.slice(0, 80)}: by ${e.tagName}`);
      }
    }
  }
  return cut;
}

// run is a script's main: what it throws is the test's failure.
export async function run(main) {
  const browser = await launch();
  try {
    await main(browser);
  } catch (e) {
    console.log("FAILED " + (e.stack || e));
    process.exitCode = 1;
  } finally {
    await browser.close();
    process.stdin.destroy();
  }
}
