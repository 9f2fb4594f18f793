// SPDX-License-Identifier: Apache-2.0

import { stream } from "./stream.js";

// One stream of events for all tabs: a browser gives a host six connections. It is open
// while any of them is visible.

const tabs = new Map(); // by port: whether it is visible
let last = null; // what a tab that comes back is shown at once; null while nothing is followed

const follow = stream((message) => {
  last = message;
  for (const [port, visible] of tabs) if (visible) port.postMessage(message);
});

onconnect = (e) => {
  const port = e.ports[0];
  port.onmessage = (m) => {
    if (m.data.gone) tabs.delete(port);
    else tabs.set(port, m.data.visible);
    const wanted = [...tabs.values()].some(Boolean);
    if (!wanted) last = null; // it is old by the time that somebody looks again
    else if (m.data.visible && last) port.postMessage(last);
    follow(wanted);
  };
};
