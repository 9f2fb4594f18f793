// SPDX-License-Identifier: Apache-2.0

// The picture of the page that the documentation has.

import { ask, live, open, run, says } from "./browser.mjs";

run(async ({ driven }) => {
  const context = await driven.newContext({ viewport: { width: 1000, height: 1640 }, colorScheme: "light", locale: "en-GB", timezoneId: "UTC" });
  const { page, fine } = await open(context);
  await live(page);
  await ask("begin the pull");
  await says(page, "flights", "of 64.0 MiB");
  await ask("let more come");
  await says(page, "flights", "48.0 MiB of 64.0 MiB, .* a second");
  await says(page, "images", "data/model");
  await page.screenshot({ path: process.argv[2] });
  await ask("let all come");
  fine();
});
