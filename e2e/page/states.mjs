// SPDX-License-Identifier: Apache-2.0

// The page of a tarn in a certain state: its words, and how it looks.

import { check, live, look, open, run, says, until } from "./browser.mjs";

const [, , name] = process.argv;

const wanted = {
  hostile: async (page) => {
    await says(page, "images", "<img.src=x.onerror=alert");
    check(await page.evaluate(() => document.querySelector("main img, main script") === null), "what somebody sent is markup");
    await page.fill("#explain-image", "<script>alert(1)</script>\u202e");
    await page.press("#explain-image", "Enter");
    await says(page, "explain-state", "script");
  },
  away: async (page) => {
    await says(page, "troubles", "upstream.test does not answer: .*connection refused.*To do: ");
    await says(page, "upstreams", "does not answer");
    check((await page.title()).startsWith("trouble: "), "the title does not say that there is trouble");
  },
  full: async (page) => {
    await says(page, "troubles", "The disk refuses.*no (room|space).*To do: ");
  },
  socket: async (page) => {
    await says(page, "images-count", "only, by the user that tarn runs as");
    check(await page.evaluate(() => [...document.querySelectorAll("form")].every((f) => f.offsetParent === null)), "there are forms that lead nowhere");
    check(!(await page.evaluate(() => document.body.innerText)).includes("app/small"), "a name of an image is shown");
  },
};

run(async ({ driven }) => {
  const { page, fine } = await open(await driven.newContext(), /400 \(Bad Request\)/);
  await live(page);
  await wanted[name](page);
  fine();
  await look(driven, name, name === "hostile" ? undefined : wanted[name]);
  if (name === "hostile") await day(page);
});

// day has the page shown more than it is told in a day: it stays as large as it was.
async function day(page) {
  await until(page, "a thousand states were shown", async () => {
    const { show } = await import("/page.js");
    const state = await first();
    const counts = [];
    for (let i = 0; i < 1000; i++) {
      show(grown(state, i));
      if (i % 100 === 99) counts.push(document.querySelectorAll("*").length);
    }
    window.counts = counts;
    return true;

    // first is the first event of a stream of its own.
    async function first() {
      const source = new EventSource("/api/v1/events");
      const text = await new Promise((done) => { source.onmessage = (e) => done(e.data); });
      source.close();
      return JSON.parse(text);
    }
    function grown(state, i) {
      const s = structuredClone(state);
      s.status.index.objects = i;
      s.flights = Array.from({ length: 3 }, (_, n) => ({ digest: "sha256:" + String(i + n).padStart(64, "0"), sourceDomain: "listed", hereBytes: i, totalBytes: 1000, readers: 1, since: s.status.started, parked: false }));
      s.decisions.decisions = Array.from({ length: 50 }, (_, n) => ({ id: 1e6 + i + n, at: s.status.started, count: 1, upstream: "upstream.test", repository: "app/" + i, outcome: "hit", words: "words " + (i + n), bytes: i }));
      s.status.upstreams[0].failing = i % 2 ? [{ origin: "http://x" + i, since: s.status.started, cause: "cause " + i }] : [];
      return s;
    }
  });
  const counts = await page.evaluate(() => window.counts);
  check(counts.every((n) => Math.abs(n - counts[0]) < 20), `elements after each hundred of states: ${counts}`);
}
