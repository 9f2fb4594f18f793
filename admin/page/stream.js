// SPDX-License-Identifier: Apache-2.0

// restMs is how long a stream that was refused is not asked for again.
const restMs = 5000;

// stream returns a function that opens the stream of events, or closes it. tell is
// called with {state}, the text of an event, or {lost, next}, why there is none and what
// to do; next is not there where tarn does not answer at all.
export function stream(tell) {
  let source = null, timer = 0;

  function open() {
    const mine = source = new EventSource("api/v1/events");
    mine.onmessage = (e) => tell({ state: e.data });
    mine.onerror = async () => {
      if (mine.readyState !== EventSource.CLOSED) { // the browser asks again by itself
        tell({ lost: "tarn does not answer" });
        return;
      }
      const reason = await why();
      if (source !== mine) return; // closed while we asked
      tell(reason);
      timer = setTimeout(open, restMs);
    };
  }

  return (wanted) => {
    if (wanted && !source) open();
    if (!wanted && source) {
      clearTimeout(timer);
      source.close();
      source = null;
    }
  };
}

// why asks again for the words of a refusal, which an EventSource does not tell.
async function why() {
  const call = new AbortController();
  try {
    const answer = await fetch("api/v1/events", { signal: call.signal });
    if (answer.ok) return { lost: "the stream of events broke off", next: "wait: it is asked for again" };
    const said = await answer.json();
    return { lost: said.error, next: said.next };
  } catch {
    return { lost: "tarn does not answer" };
  } finally {
    call.abort();
  }
}
