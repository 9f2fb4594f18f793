// SPDX-License-Identifier: Apache-2.0

// Nine tabs, as people have them open; and a tarn that goes and comes.

import { ask, check, hold, live, open, run, says, until } from "./browser.mjs";

const away = /ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE|503 \(Service Unavailable\)/;

run(async ({ driven, tabs }) => {
  // Nine that are visible at once, as in nine windows.
  const context = await driven.newContext();
  const all = [];
  for (let i = 0; i < 9; i++) all.push(await open(context));
  for (const { page } of all) await live(page);
  await ask("15 streams are free");
  await ask("pull");
  for (const { page } of all) await says(page, "decisions", "app/small");
  for (const { fine } of all) fine();
  await context.close();
  await ask("16 streams are free");

  // A browser without shared workers, as on phones: each tab has its own stream.
  const plain = await driven.newContext();
  await plain.addInitScript(() => { delete window.SharedWorker; });
  const alone = [await open(plain), await open(plain)];
  for (const { page } of alone) await live(page);
  await ask("14 streams are free");
  for (const { fine } of alone) fine();
  await plain.close();
  await ask("16 streams are free");

  // Nine of one window, of which one is visible.
  const window = [];
  for (let i = 0; i < 9; i++) window.push(await open(tabs, away));
  const shown = window[8].page, hidden = window[0].page;
  await live(shown);
  const state = (p) => p.evaluate(() => document.visibilityState);
  check(await state(shown) === "visible" && await state(hidden) === "hidden", "the browser does not hide tabs, and this shows nothing");
  await ask("15 streams are free");
  const before = await hidden.evaluate(() => document.body.innerText);
  await ask("move the tag");
  await says(shown, "decisions", "app/moved");
  check(await hidden.evaluate(() => document.body.innerText) === before, "a hidden tab is told what happens");
  await hidden.bringToFront();
  await says(hidden, "decisions", "app/moved");

  const blank = await tabs.newPage(); // now all of them are hidden
  await ask("16 streams are free");
  await ask("pull");
  await hidden.bringToFront();
  await live(hidden);
  await until(hidden, "a tab that comes back shows the latest", () => document.querySelector("#decisions li").innerText.includes("app/small"));
  await blank.close();

  await ask("stop tarn");
  await says(hidden, "verdict", "tarn does not answer, since .*from before");
  await says(hidden, "troubles", "journalctl");
  await shown.bringToFront();
  await says(shown, "verdict", "tarn does not answer");
  await hold(shown, "lost");
  await ask("start tarn");
  await live(shown);
  await says(shown, "verdict", "containerd|nothing has asked");
  check(await shown.evaluate(() => document.getElementById("troubles").hidden), "trouble is shown where there is none any more");
  for (const { fine, page } of window) {
    fine();
    await page.close();
  }

  await ask("take all streams");
  const late = await open(tabs, away);
  await says(late.page, "verdict", "This page is not live: 16 listen to events already");
  await says(late.page, "troubles", "close one");
  await hold(late.page, "refused");
  await ask("give them back");
  await live(late.page);
  late.fine();
});
