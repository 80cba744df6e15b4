// What is told beside the messages: errors in words, and what a screen reader hears.

import { button, element } from "./elements.js";

const status = document.querySelector("#status");
const errors = document.querySelector("#error");
const MOST_SPOKEN = 400;

// Told to screen readers, once.
export function say(text) {
  status.textContent = "";
  requestAnimationFrame(() => (status.textContent = text));
}

// The end of an answer, with its text unless that is long: nothing is said token by token.
export function sayAnswer({ text, facts }) {
  const end = facts.end === "stopped" ? "Stopped." : "The answer is finished.";
  say(text.length > MOST_SPOKEN ? `${end} It has ${text.split(/\s+/).length} words.` : `${end} ${text}`);
}

// An error, until the next attempt. `retry` is offered where it may help.
export function showError(error, retry = null) {
  const again = retry && element("button", { type: "button" }, "Try again");
  again?.addEventListener("click", () => {
    clearError();
    retry();
  });
  const shown = element("p", {}, error.message);
  errors.replaceChildren(shown, ...(again ? [again] : []), button("close", "Dismiss", clearError));
}

export function clearError() {
  errors.replaceChildren();
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    showError(new Error("The browser does not let this page copy: it does so at https or localhost."));
  }
}
