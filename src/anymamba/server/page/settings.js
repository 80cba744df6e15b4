// The settings: how answers are chosen, the server's key, light or dark.

import {
  apiKey, lastSettings, theme, writeApiKey, writeLastSettings, writeTheme,
} from "./storage.js";

const dialog = document.querySelector("#settings");
const form = dialog.querySelector("form");
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

// Ask for settings; `changed` gets the conversation's new ones, `unlocked` is called for a new key.
export function askSettings(conversation, model, changed, unlocked) {
  const { settings } = conversation;
  for (const name of ["system", ...NUMBERS]) form.elements[name].value = settings[name] ?? "";
  form.elements.key.value = apiKey();
  form.elements.theme.value = theme();
  form.elements.system.disabled = model !== null && !model?.has_chat_template;
  form.querySelector("#no-system").hidden = !form.elements.system.disabled;
  dialog.returnValue = "";
  dialog.onclose = () => {
    if (dialog.returnValue !== "keep") return showTheme();
    keepKeyAndTheme(unlocked);
    const number = (name) => (form.elements[name].value === "" ? null : form.elements[name].valueAsNumber);
    const given = Object.fromEntries(NUMBERS.map((name) => [name, number(name)]));
    changed({ ...settings, ...given, system: form.elements.system.value });
  };
  dialog.showModal();
}

export function focusOnKey() {
  form.elements.key.focus();
}

export function rememberSettings(settings) {
  writeLastSettings({ ...lastSettings(), ...settings });
}

export function showTheme(name = theme()) {
  document.documentElement.dataset.theme = name;
}

function keepKeyAndTheme(unlocked) {
  writeTheme(form.elements.theme.value);
  showTheme();
  const key = form.elements.key.value.trim();
  const isNew = key !== apiKey();
  writeApiKey(key);
  if (isNew) unlocked();
}

// The theme shows at once, and is kept with the rest.
form.addEventListener("change", (event) => {
  if (event.target.name === "theme") showTheme(event.target.value);
});
dialog.querySelector("#cancel-settings").addEventListener("click", () => dialog.close("cancel"));
