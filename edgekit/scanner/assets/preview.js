"use strict";
// Figures once a second; pictures are streams of their own. Nothing here is ever sent, and all text is set as text.
const find = (id) => document.getElementById(id);
const shown = new Map();
const STREAMS = 4;
let turn = 0;

function element(name, text, parent) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// A browser opens six connections to one place: of many cameras, or where others look already, single pictures are fetched.
function picture(name, image, many) {
  if (!many && !image.dataset.single) {
    if (!image.src) image.src = `preview.mjpeg?source=${encodeURIComponent(name)}`;
  } else if (!image.dataset.busy) {
    image.dataset.single = image.dataset.busy = "yes";
    image.src = `preview.jpg?source=${encodeURIComponent(name)}&n=${turn++}`;
  }
}

function pictures(pictured, rows) {
  const names = [...new Set([...rows.filter((row) => row.state && row.state !== "removed").map((row) => row.source), ...pictured])];
  for (const [name, figure] of shown) if (!names.includes(name)) { figure.remove(); shown.delete(name); }
  find("none").hidden = names.length > 0;
  for (const name of names) {
    if (!shown.has(name)) {
      const figure = element("figure", undefined, find("pictures"));
      const image = element("img", undefined, figure);
      image.alt = name ? `newest frame of ${name}` : "newest frame";
      image.onload = () => { delete image.dataset.busy; performance.mark("drawn"); };
      image.onerror = () => { delete image.dataset.busy; image.dataset.single = "yes"; };
      element("figcaption", name || "newest frame", figure);
      shown.set(name, figure);
    }
    if (pictured.includes(name)) picture(name, shown.get(name).firstChild, pictured.length > STREAMS);
    const row = rows.find((each) => each.source === name);
    if (row && row.state) {
      const words = [name, row.reason ? `${row.state}: ${row.reason}` : row.state];
      shown.get(name).lastChild.textContent = words.join(" · ");
      shown.get(name).className = row.state === "down" ? "down" : "";
    }
  }
}

function figures(status) {
  const list = find("figures");
  list.replaceChildren();
  const dropped = Object.entries(status.dropped || {}).map(([reason, count]) => `${count} ${reason}`).join(", ");
  const latency = status.latency_ms || {};
  const waiting = (status.sinks || []).reduce((sum, sink) => sum + (sink.waiting || 0), 0);
  const kpis = status.kpis || {};
  const misreads = Object.entries(kpis.misreads || {}).filter(([, count]) => count).map(([how, count]) => `${count} ${how}`);
  const share = kpis.read_rate == null ? "–" : `${(kpis.read_rate * 100).toFixed(1)}%`;
  const pairs = [["read rate", share], ["codes a frame", kpis.codes_a_frame ?? "–"], ["misreads", misreads.join(", ") || 0],
    ["captured", status.captured], ["read", status.inferred], ["dropped", dropped || 0], ["in flight", status.in_flight],
    ["events", status.events], ["waiting in outbox", waiting],
    ["p50 / p99", latency.p50 == null ? "–" : `${latency.p50.toFixed(1)} / ${latency.p99.toFixed(1)} ms`]];
  for (const [name, value] of pairs) {
    const pair = element("div", undefined, list);
    element("dt", name, pair);
    element("dd", value ?? "–", pair);
  }
}

function what(event) {
  const parts = [];
  if (event.event) parts.push([event.event, event.state, event.reason || event.cause].filter(Boolean).join(" · "));
  if (event.label !== undefined) parts.push(`${event.label} ${Math.round(event.score * 100)}%`);
  if (event.text) parts.push(`“${event.text}”`);
  for (const code of event.codes || []) parts.push(`${code.text} (${code.format})`);
  return parts.join(", ") || "nothing found";
}

function events(list) {
  const body = find("events").tBodies[0];
  body.replaceChildren();
  for (const event of list) {
    const row = element("tr", undefined, body);
    element("td", (event.time || "").slice(11, 23), row);
    element("td", (event.source || "").split("/").pop(), row);
    element("td", event.seq ?? "", row);
    element("td", what(event), row);
  }
}

async function refresh() {
  const state = find("state");
  try {
    const status = await (await fetch("status", { cache: "no-store" })).json();
    state.textContent = status.ready ? "ready" : (status.reasons || []).join("; ") || status.state;
    state.className = `state ${status.ready ? "good" : "bad"}`;
    find("what").textContent = status.model ? status.model.bundle || "" : "";
    pictures(status.pictures || [], status.sources || []);
    figures(status);
    events((status.recent || []).slice(-12).reverse());
  } catch {
    state.textContent = "the scan does not answer";
    state.className = "state bad";
  }
  setTimeout(refresh, 1000);
}
refresh();
