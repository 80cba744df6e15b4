// The list of conversations, and conversations as files.

import { button, element } from "./elements.js";
import { clearError, say, showError } from "./notices.js";
import { exported, imported } from "./storage.js";
import { titleOf } from "./tree.js";

const nav = document.querySelector("#conversations");
const list = document.querySelector("#list");
const opener = document.querySelector("#open-list");
const file = document.querySelector("#file");

export function showList(all, open, choose, remove) {
  const items = all
    .filter((conversation) => conversation.nodes.length)
    .map((conversation) => {
      const title = titleOf(conversation);
      const current = conversation === open ? "true" : null;
      const chosen = element("button", { type: "button", class: "title", "aria-current": current }, title);
      chosen.addEventListener("click", () => choose(conversation));
      return element("li", {}, chosen, button("remove", `Delete: ${title}`, () => remove(conversation)));
    });
  list.replaceChildren(...items);
}

// Where there is little room, the list lies over the page.
export function toggleList(isOpen) {
  nav.classList.toggle("open", isOpen);
  opener.setAttribute("aria-expanded", String(isOpen));
  if (isOpen) document.querySelector("#new").focus();
}

export function listenToFiles(all, add) {
  document.querySelector("#export").addEventListener("click", () => {
    const kept = all().filter((conversation) => conversation.nodes.length);
    const url = URL.createObjectURL(new Blob([exported(kept)], { type: "application/json" }));
    element("a", { href: url, download: "anymamba-conversations.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    say(`${kept.length} conversations exported.`);
  });
  document.querySelector("#import").addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    clearError();
    try {
      const found = imported(await file.files[0].text());
      add(found);
      say(`${found.length} conversations imported.`);
    } catch (error) {
      showError(error);
    }
    file.value = "";
  });
}

opener.addEventListener("click", () => toggleList(true));
document.querySelector("#close-list").addEventListener("click", () => {
  toggleList(false);
  opener.focus();
});
nav.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !nav.classList.contains("open")) return;
  event.stopPropagation();
  toggleList(false);
  opener.focus();
});
