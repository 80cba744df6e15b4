// The page: which conversation is open, what is written, and what each control does.

import { Answering } from "./answering.js";
import { models as askModels } from "./api.js";
import { element, icon, rename } from "./elements.js";
import { listenToKeys } from "./keyboard.js";
import { actions, editInPlace, focusOn, showMessages, showProgress } from "./messages.js";
import { clearError, copyText, say, sayAnswer, showError } from "./notices.js";
import { askSettings, focusOnKey, rememberSettings, showTheme } from "./settings.js";
import { listenToFiles, showList, toggleList } from "./sidebar.js";
import * as storage from "./storage.js";
import * as tree from "./tree.js";

const $ = (selector) => document.querySelector(selector);
const [composer, scroller, send] = [$("#say"), $("#scroller"), $("#send")];
const branches = $("#branches select");

let models = null; // until the server has said which there are
let all = storage.readAll();
let open = all[0] ?? tree.newConversation(storage.lastSettings());
let running = null;

const modelOf = ({ settings }) => models?.find(({ id }) => id === settings.model) ?? models?.[0];
const form = () => (modelOf(open)?.has_chat_template === false ? "text" : "chat");

// --- showing ---

function show() {
  showMessages(open, form());
  if (running?.conversation === open) showProgress(running.node, true, form());
  showList(all, open, choose, remove);
  showHeader();
  rename(send, running ? "Stop" : "Send");
  send.replaceChildren(icon(running ? "stop" : "send"));
  send.classList.toggle("running", Boolean(running));
}

function showHeader() {
  const model = modelOf(open);
  const isEmpty = !tree.path(open).length;
  $("#model").value = model?.id ?? "";
  $("#welcome").hidden = !isEmpty;
  $("#welcome h2").textContent = model?.id ?? "No model yet";
  $("#about").textContent = model ? described(model) : "";
  $("#hint").textContent = model ? hint(isEmpty) : "";
  composer.placeholder = form() === "chat" ? "Say something" : "Begin a text, or go on with it";
  document.title = isEmpty ? "AnyMamba" : `${tree.titleOf(open)} – AnyMamba`;
  showBranches();
}

function described({ parameters, weights, has_chat_template: talks }) {
  const size = new Intl.NumberFormat("en", { notation: "compact" }).format(parameters);
  const does = talks
    ? "Each turn costs its new words only: what was read before is kept as a state."
    : "It has no chat template: it continues your text as it stands.";
  return `${size} parameters in ${weights}. ${does}`;
}

function hint(isEmpty) {
  const goes = form() === "text" && !isEmpty ? "Enter alone lets the model go on" : "Enter sends";
  return `${goes} · Shift+Enter starts a line · Alt+K shows all shortcuts`;
}

function showBranches() {
  const leaves = tree.leaves(open);
  const last = tree.path(open).at(-1);
  $("#branches").hidden = leaves.length < 2;
  const choices = leaves.map((leaf, i) => {
    const words = leaf.text.trim().replace(/\s+/g, " ").slice(0, 40) || "…";
    return element("option", { value: leaf.id }, `Branch ${i + 1} of ${leaves.length}: ${words}`);
  });
  if (last && !leaves.includes(last)) {
    choices.push(element("option", { value: last.id }, "A new branch"));
  }
  branches.replaceChildren(...choices);
  branches.value = last?.id ?? "";
}

const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

// --- answering ---

function submit(text) {
  if (!modelOf(open)) return loadModels();
  const last = tree.path(open).at(-1) ?? null;
  if (form() === "text" && !text && last) return write(last);
  if (!text.trim()) return composer.focus();
  composer.value = "";
  grow();
  return write(tree.add(open, last, "user", text));
}

// Let the model answer a message, as a new version of what follows it.
async function write(parent) {
  const model = modelOf(open);
  if (running || !model) return;
  const conversation = open;
  clearError();
  const node = tree.add(conversation, parent, "assistant", "");
  running = new Answering(conversation, node, model, tree.pathTo(conversation, parent));
  keep(conversation);
  show();
  toEnd();
  say("Answering.");
  let failure = null;
  try {
    await running.run(soon);
  } catch (error) {
    failure = error;
  }
  running = null;
  if (!node.text && node.facts.end) tree.removeLeaf(conversation, node);
  keep(conversation);
  show();
  if (conversation === open) showProgress(node, false, form());
  if (failure) return fail(failure, () => write(parent));
  if (node.text) sayAnswer(node);
}

// Show what came, once for each picture that the screen shows.
let isDue = false;
function soon() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    if (running?.conversation !== open) return;
    const follows = isAtEnd();
    showProgress(running.node, true, form());
    if (follows) toEnd();
    $("#latest").hidden = isAtEnd();
  });
}

function fail(error, retry) {
  showError(error, retry);
  if (error.status === 401) {
    settings();
    focusOnKey();
  }
}

function stop() {
  running?.stop();
  return Boolean(running);
}

// --- conversations ---

function keep(conversation) {
  conversation.updated = Date.now();
  if (!all.includes(conversation)) all = [conversation, ...all];
  try {
    storage.write(conversation);
  } catch {
    showError(new Error("The browser has no room left for conversations: export and delete some."));
  }
}

function choose(conversation) {
  open = conversation;
  toggleList(false);
  show();
  toEnd();
  composer.focus();
}

const create = () => choose(tree.newConversation(storage.lastSettings()));

function remove(conversation) {
  if (!confirm(`Delete the conversation “${tree.titleOf(conversation)}”?`)) return;
  if (running?.conversation === conversation) stop();
  all = all.filter((other) => other !== conversation);
  storage.remove(conversation);
  if (conversation === open) create();
  else show();
}

function change(settings) {
  open.settings = settings;
  rememberSettings(settings);
  if (all.includes(open)) keep(open);
  show();
}

const settings = () => askSettings(open, modelOf(open), change, loadModels);

async function loadModels() {
  try {
    models = await askModels();
    clearError();
  } catch (error) {
    fail(error, loadModels);
  }
  $("#model").replaceChildren(...(models ?? []).map(({ id }) => element("option", { value: id }, id)));
  show();
  toEnd();
}

// --- what is done with a message ---

Object.assign(actions, {
  choose(node) {
    tree.choose(open, node);
    keep(open);
    show();
    focusOn(node);
  },
  turn(node, way) {
    const ways = tree.versions(open, node);
    if (ways.length > 1) this.choose(ways.at((ways.indexOf(node) + way) % ways.length));
  },
  edit(node) {
    if (running) return;
    editInPlace(node, (text) => {
      const edited = tree.add(open, tree.parentOf(open, node), node.role, text);
      if (node.role === "user") return write(edited);
      edited.facts = { end: "edited" };
      return actions.choose(edited);
    });
  },
  again(node) {
    write(node.role === "user" ? node : tree.parentOf(open, node));
  },
  branch(node) {
    if (running) return;
    tree.endAt(open, node);
    keep(open);
    show();
    composer.focus();
    say("What you say now starts a new branch.");
  },
  copy: (node) => copyText(node.text),
});

// --- controls ---

function grow() {
  composer.style.height = "auto";
  composer.style.height = `${composer.scrollHeight}px`;
}

composer.addEventListener("input", grow);
composer.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) submit(composer.value);
});
$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!stop()) submit(composer.value);
});
$("#new").addEventListener("click", create);
$("#open-settings").addEventListener("click", settings);
$("#show-keys").addEventListener("click", () => $("#keys").showModal());
$("#model").addEventListener("change", (event) => change({ ...open.settings, model: event.target.value }));
branches.addEventListener("change", () => {
  const leaf = open.nodes.find(({ id }) => id === branches.value);
  tree.choose(open, leaf);
  keep(open);
  show();
  toEnd();
});
scroller.addEventListener("scroll", () => ($("#latest").hidden = isAtEnd()));
$("#latest").addEventListener("click", toEnd);
listenToFiles(
  () => all,
  (found) => {
    for (const conversation of found) keep(conversation);
    if (found.length) choose(found[0]);
  },
);
listenToKeys(
  {
    ArrowUp: () => focusOn(null),
    KeyN: create,
    KeyR: () => tree.path(open).length && actions.again(tree.path(open).at(-1)),
    KeyS: settings,
    KeyK: () => $("#keys").showModal(),
  },
  stop,
);

// What another tab of this page has written or deleted shows here too.
window.addEventListener("storage", (event) => {
  const id = storage.idOf(event.key);
  if (!id || running?.conversation.id === id) return;
  const found = storage.readOne(id);
  all = all.filter((other) => other.id !== id);
  if (found) all = [found, ...all];
  if (open.id === id) open = found ?? tree.newConversation(storage.lastSettings());
  show();
});
window.addEventListener("pagehide", () => {
  if (!running) return;
  if (!running.node.text) tree.removeLeaf(running.conversation, running.node);
  keep(running.conversation);
});

for (const [id, name] of [["open-list", "menu"], ["close-list", "close"], ["open-settings", "settings"], ["latest", "down"]]) {
  $(`#${id}`).append(icon(name));
}
showTheme();
show();
loadModels();
