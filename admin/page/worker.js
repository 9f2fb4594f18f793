// SPDX-License-Identifier: Apache-2.0

// One stream of events for all tabs: a browser gives a host six connections. It is open
// while any of them is visible.

const tabs = new Map(); // by port: whether it is visible
let stream = null;
let last = null;

function tell(message) {
  for (const [port, visible] of tabs) if (visible) port.postMessage(message);
}

function follow() {
  const wanted = [...tabs.values()].some(Boolean);
  if (!wanted && stream) {
    stream.close();
    stream = null;
  }
  if (!wanted || stream) return;
  stream = new EventSource("api/v1/events");
  stream.onmessage = (e) => { last = e.data; tell({ state: last }); };
  stream.onerror = () => {
    tell({ lost: true });
    if (stream && stream.readyState === EventSource.CLOSED) { // refused: too many streams, or no tarn
      stream = null;
      setTimeout(follow, 5000);
    }
  };
}

onconnect = (e) => {
  const port = e.ports[0];
  port.onmessage = (m) => {
    if (m.data.gone) tabs.delete(port);
    else {
      tabs.set(port, m.data.visible);
      if (m.data.visible && last) port.postMessage({ state: last });
    }
    follow();
  };
};
