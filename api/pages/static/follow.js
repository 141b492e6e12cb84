"use strict";

// Shows the end of a log, follows it while it grows, and shows the facts anew when something has happened: without a reload of the page.

const MAX_CHARS = 2000000; // a browser gets slow with more; the whole log is one link away
const ESCAPES = /\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-Z\\^-~]/g;
const CONTROLS = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]/g;

const log = document.getElementById("log");
let chars = log ? log.textContent.length : 0;

function append(text) {
  const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
  const shown = text.replace(ESCAPES, "").replace(CONTROLS, "\ufffd") + "\n";
  log.append(shown);
  chars += shown.length;
  while (chars > MAX_CHARS && log.childNodes.length > 1) {
    chars -= log.firstChild.textContent.length;
    log.firstChild.remove();
  }
  if (atEnd) {
    log.scrollTop = log.scrollHeight;
  }
}

async function refresh() {
  const answer = await fetch(location.href, { cache: "no-store" });
  if (!answer.ok) {
    return;
  }
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const facts = page.getElementById("facts");
  if (facts) {
    document.getElementById("facts").replaceWith(facts);
  }
}

function follow() {
  const events = new EventSource(log.dataset.follow);
  let began = log.textContent.trim() !== "";
  events.addEventListener("log", (event) => {
    append(event.data);
    if (!began) {
      began = true;
      refresh();
    }
  });
  events.addEventListener("end", () => {
    events.close();
    refresh();
  });
}

// What has no log to follow is asked for again and again, until it is done.
function poll() {
  const facts = document.getElementById("facts");
  if (facts && "going" in facts.dataset) {
    setTimeout(() => refresh().finally(poll), 5000);
  }
}

poll();
if (log) {
  log.scrollTop = log.scrollHeight;
  if (log.dataset.follow) {
    follow();
  }
}
