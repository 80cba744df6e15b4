// The messages of the shown path: each an article with its text, its facts and what can be done.

import { factsInWords } from "./answering.js";
import { button, element } from "./elements.js";
import { showText } from "./text.js";
import { path, versions } from "./tree.js";

const list = document.querySelector("#messages");

// What is done with a message; main.js says how. Each takes the message.
export const actions = {};

// Show a conversation's path. Articles that stay are not touched: what has the focus keeps it.
export function showMessages(conversation, form) {
  const wanted = path(conversation);
  const mark = (node) => `${conversation.id} ${node.id} ${form} ${versions(conversation, node).length}`;
  const shown = [...list.children];
  let same = 0;
  while (same < wanted.length && shown[same]?.mark === mark(wanted[same])) same += 1;
  for (const old of shown.slice(same)) old.remove();
  for (const node of wanted.slice(same)) {
    const made = element("li", {}, article(conversation, node, form, list.children.length + 1));
    list.append(Object.assign(made, { mark: mark(node), node }));
  }
  list.dataset.form = form;
  if (!list.querySelector("article[tabindex='0']")) makeCurrent(list.lastElementChild?.firstChild);
}

// Show what has been added to a message, and how it comes.
export function showProgress(node, isWriting, form) {
  const item = [...list.children].find((other) => other.node === node);
  if (!item) return;
  const shown = item.querySelector("article");
  shown.setAttribute("aria-busy", String(isWriting));
  if (!item.querySelector("form")) {
    showText(item.querySelector(".text"), node.text, form === "chat" && node.role === "assistant");
  }
  item.querySelector(".facts").textContent = factsInWords(node.facts).join(" · ");
}

// One article is reached by Tab, with its buttons; arrows lead from it to the others.
export function makeCurrent(shown) {
  if (!shown) return;
  for (const control of list.querySelectorAll("article, article button")) {
    control.tabIndex = shown.contains(control) ? 0 : -1;
  }
}

export function focusOn(node) {
  const item = [...list.children].find((other) => other.node === node) ?? list.lastElementChild;
  item?.firstChild.focus();
}

export const nodeAt = (target) => target.closest?.("#messages > li")?.node ?? null;

list.addEventListener("focusin", (event) => makeCurrent(event.target.closest("article")));

function article(conversation, node, form, place) {
  const who = node.role === "user" ? "You" : node.facts?.model || "Model";
  const ways = versions(conversation, node);
  const version = ways.length > 1 ? `, version ${ways.indexOf(node) + 1} of ${ways.length}` : "";
  const text = element("div", { class: "text" });
  showText(text, node.text, form === "chat" && node.role === "assistant");
  const facts = element("p", { class: "facts" }, factsInWords(node.facts).join(" · "));
  return element(
    "article",
    { class: node.role, tabindex: "-1", "aria-label": `${who}, message ${place}${version}` },
    element("h2", {}, who),
    text,
    element("footer", {}, tools(conversation, node, ways), facts),
  );
}

function tools(conversation, node, ways) {
  const group = element("div", { class: "tools", role: "group", "aria-label": "This message" });
  if (ways.length > 1) {
    const at = ways.indexOf(node);
    const turn = (name, way) =>
      button(name, name === "left" ? "Previous version" : "Next version", () =>
        actions.choose(ways.at((at + way) % ways.length)),
      );
    const shown = element("span", { class: "versions" }, `${at + 1} of ${ways.length}`);
    group.append(turn("left", -1), shown, turn("right", 1));
  }
  group.append(button("edit", "Edit", () => actions.edit(node)));
  if (node.role === "assistant") group.append(button("again", "Regenerate", () => actions.again(node)));
  group.append(
    button("branch", "Branch from here", () => actions.branch(node)),
    button("copy", "Copy", () => actions.copy(node)),
  );
  return group;
}

// Let a message be edited in its place; `done` gets the new text.
export function editInPlace(node, done) {
  const item = [...list.children].find((other) => other.node === node);
  if (!item || item.querySelector("form")) return;
  const text = item.querySelector(".text");
  const field = element("textarea", { "aria-label": "The message's text", rows: "3" });
  field.value = node.text;
  const verb = node.role === "user" ? "Send as a new version" : "Keep as a new version";
  const cancel = element("button", { type: "button" }, "Cancel");
  const submit = element("button", { type: "submit", class: "main" }, verb);
  const form = element("form", { class: "editing" }, field, element("div", {}, cancel, submit));
  const close = () => {
    form.replaceWith(text);
    item.firstChild.focus();
  };
  cancel.addEventListener("click", close);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    close();
    if (field.value !== node.text) done(field.value);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === field) {
      event.preventDefault();
      form.requestSubmit();
    }
    event.stopPropagation();
  });
  text.replaceWith(form);
  makeCurrent(item.firstChild);
  field.focus();
}
