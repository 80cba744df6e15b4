// Shortcuts. Letters alone count on a message only, so that they never surprise who types or talks.

import { actions, focusOn, nodeAt } from "./messages.js";

const composer = document.querySelector("#composer textarea");
const messages = document.querySelector("#messages");

const LETTERS = { e: "edit", r: "again", b: "branch", c: "copy" };
const ARROWS = { ArrowLeft: -1, ArrowRight: 1 };

// `everywhere` has what Alt and a key do, by the key's place: "KeyN".
export function listenToKeys(everywhere, stop) {
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.altKey && !event.ctrlKey && !event.metaKey && everywhere[event.code]) {
      event.preventDefault();
      everywhere[event.code]();
    } else if (event.key === "Escape") {
      if (!stop()) composer.focus();
    } else if (event.target.localName === "article" && !event.ctrlKey && !event.metaKey) {
      if (onMessage(event)) event.preventDefault();
    }
  });
}

function onMessage(event) {
  const node = nodeAt(event.target);
  const item = event.target.parentElement;
  if (event.key === "ArrowUp") item.previousElementSibling?.firstChild.focus();
  else if (event.key === "ArrowDown") (item.nextElementSibling?.firstChild ?? composer).focus();
  else if (event.key === "Home") messages.firstElementChild.firstChild.focus();
  else if (event.key === "End") focusOn(null);
  else if (event.key in ARROWS) actions.turn(node, ARROWS[event.key]);
  else if (event.key in LETTERS && !event.altKey) actions[LETTERS[event.key]](node);
  else return false;
  return true;
}
