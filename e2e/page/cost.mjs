// SPDX-License-Identifier: Apache-2.0

// The page is open, and visible, while something is pulled.

import { ask, live, open, run } from "./browser.mjs";

run(async ({ driven }) => {
  const { page, fine } = await open(await driven.newContext({ viewport: { width: 1280, height: 900 } }));
  await live(page);
  await ask("pull");
  fine();
});
