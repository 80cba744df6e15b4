// Conversations in the browser's own storage, and as files.

const PREFIX = "anymamba:conversation:";
const LAST = "anymamba:settings";
const THEME = "anymamba:theme";
const KEY = "anymamba:key";
const FORMAT = "anymamba-conversations";

export const DEFAULTS = {
  model: "",
  system: "",
  temperature: 0.7,
  top_p: 0.9,
  max_tokens: 512,
  seed: null,
};

// All conversations, the last one used first.
export function readAll() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
  const found = names.map((name) => readText(localStorage.getItem(name))).filter(Boolean);
  return found.sort((one, other) => other.updated - one.updated);
}

export function idOf(storageKey) {
  return storageKey?.startsWith(PREFIX) ? storageKey.slice(PREFIX.length) : null;
}

export function readOne(id) {
  return readText(localStorage.getItem(PREFIX + id));
}

// Throws where the browser has no room left.
export function write(conversation) {
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function remove(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}

// The settings that were used last: those of the next conversation.
export function lastSettings() {
  return checkedSettings(parsed(localStorage.getItem(LAST)) ?? {});
}

export function writeLastSettings(settings) {
  localStorage.setItem(LAST, JSON.stringify(settings));
}

export const theme = () => localStorage.getItem(THEME) ?? "system";
export const writeTheme = (name) => localStorage.setItem(THEME, name);

// The key is gone when the tab is closed.
export const apiKey = () => sessionStorage.getItem(KEY) ?? "";
export const writeApiKey = (key) => sessionStorage.setItem(KEY, key);

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

// The conversations of such a file, under new names. Throws where it is another kind of file.
export function imported(text) {
  const file = parsed(text);
  if (file?.format !== FORMAT || file.version !== 1 || !Array.isArray(file.conversations)) {
    throw new Error("The file is not an export of this page.");
  }
  const found = file.conversations.map(checked);
  if (found.includes(null)) throw new Error("The file has a conversation that is damaged.");
  return found.map((conversation) => ({ ...conversation, id: crypto.randomUUID() }));
}

function readText(text) {
  return checked(parsed(text));
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

// A conversation with everything that the page relies on, or null.
function checked(given) {
  if (typeof given?.id !== "string" || !Array.isArray(given.nodes)) return null;
  const seen = new Set();
  const nodes = [];
  for (const { id, parent, role, text, facts } of given.nodes.map(Object)) {
    const fits =
      typeof id === "string" &&
      !seen.has(id) &&
      (parent === null || seen.has(parent)) &&
      (role === "user" || role === "assistant") &&
      typeof text === "string";
    if (!fits) return null;
    seen.add(id);
    nodes.push({ id, parent, role, text, facts: checkedFacts(facts ?? {}) });
  }
  const number = (value) => (Number.isFinite(value) ? value : 0);
  return {
    id: given.id,
    created: number(given.created),
    updated: number(given.updated),
    settings: checkedSettings(given.settings ?? {}),
    nodes,
    chosen: { ...given.chosen },
  };
}

function checkedFacts(given) {
  const facts = {};
  for (const name of ["tokens", "rate", "wait", "prompt", "cached"]) {
    if (Number.isFinite(given[name])) facts[name] = given[name];
  }
  for (const name of ["model", "miss", "end"]) {
    if (typeof given[name] === "string") facts[name] = given[name];
  }
  return facts;
}

function checkedSettings(given) {
  const settings = { ...DEFAULTS };
  for (const [name, value] of Object.entries(DEFAULTS)) {
    const kind = name === "seed" ? "number" : typeof value;
    if (typeof given[name] === kind) settings[name] = given[name];
  }
  return settings;
}
