"use strict";

// Sends the request that a form of the reference describes, and shows the answer as it comes.

function requestOf(form) {
  const { method, path } = form.dataset;
  const query = new URLSearchParams();
  const headers = {};
  let address = path;
  for (const field of form.querySelectorAll("[data-in]")) {
    if (field.value === "") {
      continue;
    }
    if (field.dataset.in === "path") {
      address = address.replace(`{${field.name}}`, encodeURIComponent(field.value));
    } else if (field.dataset.in === "query") {
      query.set(field.name, field.value);
    } else {
      headers[field.name] = field.value;
    }
  }
  const [user, password, token] = ["user", "password", "token"].map(
    (name) => form.querySelector(`[data-login=${name}]`)?.value,
  );
  if (user) {
    const login = new TextEncoder().encode(`${user}:${password}`);
    headers.Authorization = `Basic ${btoa(String.fromCharCode(...login))}`;
  } else if (token) {
    headers.Authorization = `Bearer ${token}`;
  }
  const body = form.querySelector("[data-body]");
  if (body) {
    headers["Content-Type"] = "application/json";
  }
  const text = query.toString();
  // Without the browser's own logins: it would ask for one on status 401.
  const options = { method, headers, body: body?.value, redirect: "manual", credentials: "omit" };
  return [text ? `${address}?${text}` : address, options];
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

async function show(answer, shown) {
  const heads = [...answer.headers].map(([name, value]) => `${name}: ${value}`);
  const head = `${answer.status} ${answer.statusText}\n${heads.join("\n")}\n\n`;
  const isJson = (answer.headers.get("content-type") || "").startsWith("application/json");
  shown.textContent = head;
  if (!answer.body) {
    return;
  }
  let text = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    text += piece.value;
    shown.textContent = head + text;
  }
  if (isJson) {
    shown.textContent = head + indented(text);
  }
}

for (const form of document.querySelectorAll("form.try")) {
  let sending = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (sending) {
      sending.abort();
    }
    sending = new AbortController();
    const shown = form.nextElementSibling;
    shown.hidden = false;
    shown.textContent = "…";
    const [address, options] = requestOf(form);
    try {
      const answer = await fetch(address, { ...options, signal: sending.signal });
      if (answer.type === "opaqueredirect") {
        shown.textContent = "It leads to another address; open it in the browser to go there.";
      } else {
        await show(answer, shown);
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        shown.textContent = String(error);
      }
    }
  });
}

// A link to a part opens it.
function openTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") {
    target.open = true;
  }
}

addEventListener("hashchange", openTarget);
openTarget();
