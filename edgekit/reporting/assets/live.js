// Follows the server of `report --serve`: asks once a second whether the page has changed, and loads it again where one was.
"use strict";
(() => {
  const PLACE = "edgekit-place", status = document.getElementById("live"), version = status.dataset.version;
  const key = (details) => `${details.closest("section").id}/${details.dataset.key ?? details.querySelector("summary").firstChild.textContent.trim()}`;
  const all = () => [...document.querySelectorAll("details")];

  // The place is kept within its section: what is new above it must not push it away.
  function remember() {
    const at = [...document.querySelectorAll("section")].filter((section) => section.getBoundingClientRect().top <= 1).at(-1);
    const place = { y: scrollY, id: at?.id, below: at ? -at.getBoundingClientRect().top : 0 };
    place.open = Object.fromEntries(all().map((details) => [key(details), details.open]));
    place.chosen = [...document.querySelectorAll("[data-cell][aria-pressed=true]")].map((cell) => cell.dataset.cell);
    sessionStorage.setItem(PLACE, JSON.stringify(place));
  }

  function restore() {
    const place = JSON.parse(sessionStorage.getItem(PLACE) ?? "null");
    sessionStorage.removeItem(PLACE);
    if (!place) return;
    history.scrollRestoration = "manual";
    all().forEach((details) => (details.open = place.open[key(details)] ?? details.open));
    [...document.querySelectorAll("[data-cell]")].filter((cell) => place.chosen.includes(cell.dataset.cell)).forEach((cell) => cell.click());
    const at = place.id && document.getElementById(place.id);
    scrollTo({ top: at ? at.getBoundingClientRect().top + scrollY + place.below : place.y, behavior: "instant" });
  }

  async function ask() {
    try {
      const answer = await fetch("/version", { cache: "no-store" });
      const now = await answer.text();
      status.dataset.state = "following";
      if (answer.ok && now !== version) {
        remember();
        location.reload();
        return;
      }
    } catch {
      status.dataset.state = "ended";
    }
    setTimeout(ask, 1000);
  }

  restore();
  addEventListener("load", () => setTimeout(ask, 1000));
})();
