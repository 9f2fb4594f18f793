// SPDX-License-Identifier: Apache-2.0

// A person looks at the page while containerd pulls.

import { ask, check, live, look, open, run, says, until } from "./browser.mjs";

const here = () => document.querySelector("#flights progress")?.value ?? 0;
const moved = (n) => (document.querySelector("#flights progress")?.value ?? 0) > n;

run(async ({ driven }) => {
  const context = await driven.newContext({ viewport: { width: 1280, height: 900 } });
  const { page, fine } = await open(context);
  await live(page);
  await says(page, "verdict", "nothing has asked");
  await says(page, "flights-count", "Nothing is being fetched");
  await says(page, "images-count", "None is here yet");
  await says(page, "decisions-count", "Nothing yet");
  await says(page, "upstreams", "upstream.test");
  await look(driven, "empty");
  await page.evaluate(() => { window.sameDocument = true; });

  await ask("begin the pull");
  await until(page, "the flight is shown", moved, 0);
  await says(page, "verdict", "containerd");
  const first = await page.evaluate(here);
  await ask("let more come");
  await until(page, "the progress moves", moved, first);
  const part = await page.evaluate(() => { const p = document.querySelector("#flights progress"); return p.value / p.max; });
  check(part > 0 && part < 1, `the progress is ${part} while half of the layer is held back`);
  await says(page, "flights", "upstream.test");
  await says(page, "flights", "[0-9] [KM]iB of [0-9.]+ MiB");
  await says(page, "flights", "1 reader");
  await says(page, "decisions", "containerd: v1");
  await look(driven, "pulling");

  await ask("let all come");
  await says(page, "flights-count", "Nothing is being fetched");
  await says(page, "images", "upstream.test/app/large:v1");
  await says(page, "decisions", "never seen here");
  check(await page.evaluate(() => window.sameDocument), "the page was loaded anew");

  await page.fill("#images-search", "large");
  await says(page, "images-count", "^1 of 2 images$");
  await page.fill("#images-search", "nosuch");
  await says(page, "images-count", "^0 of 2 images$");
  await page.fill("#images-search", "");
  await page.fill("#decisions-search", "app/small");
  await until(page, "decisions are chosen", () => [...document.querySelectorAll("#decisions li")].every((e) => e.innerText.includes("app/small")));
  await page.fill("#decisions-search", "");

  await page.getByRole("button", { name: "Explain upstream.test/app/large:v1" }).click();
  await says(page, "explanation", "current");
  check(await page.evaluate(() => document.activeElement.tagName === "H3"), "the focus is not at the explanation");
  await keyboard(page);
  await look(driven, "explained", async (p) => {
    await p.getByRole("button", { name: "Explain upstream.test/app/large:v1" }).click();
    await says(p, "explanation", "current");
  });
  fine();
});

// keyboard explains an image with nothing but keys, from the top of the page.
async function keyboard(page) {
  await page.evaluate(() => { document.activeElement.blur(); scrollTo(0, 0); });
  await page.reload();
  await live(page);
  for (let i = 0; i < 20; i++) {
    await page.keyboard.press("Tab");
    if (await page.evaluate(() => document.activeElement.id === "explain-image")) break;
    check(i < 19, "the keyboard does not reach the image's field");
  }
  check(await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle !== "none"), "the focus is not to be seen");
  await page.keyboard.type("upstream.test/app/small:v1");
  await page.keyboard.press("Enter");
  await says(page, "explanation", "upstream.test/app/small:v1");
  await page.keyboard.press("Shift+Tab"); // back to the button, and on to the first image's
  await page.keyboard.press("Tab");
  for (let i = 0; i < 20 && !await page.evaluate(() => document.activeElement.getAttribute("aria-label")?.startsWith("Explain upstream.test/app/large")); i++) await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await says(page, "explanation", "upstream.test/app/large:v1");
}
