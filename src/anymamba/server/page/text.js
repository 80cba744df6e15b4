// A model's text as elements. All of it goes in as text nodes: nothing that it says becomes HTML.

import { button, element } from "./elements.js";
import { copyText } from "./notices.js";

// The blocks of a text: prose, and code between fences. The last fence may still be open.
export function blocks(text) {
  const found = [];
  let code = null;
  for (const line of text.split("\n")) {
    const fence = line.match(/^\s{0,3}```\s*([\w+#.-]*)\s*$/);
    if (code && fence && !fence[1]) {
      code = null;
    } else if (!code && fence) {
      code = { kind: "code", language: fence[1], lines: [] };
      found.push(code);
    } else if (code) {
      code.lines.push(line);
    } else if (found.at(-1)?.kind === "prose") {
      found.at(-1).lines.push(line);
    } else {
      found.push({ kind: "prose", language: "", lines: [line] });
    }
  }
  return found
    .map(({ lines, ...block }) => ({ ...block, text: trimmed(block.kind, lines.join("\n")) }))
    .filter((block) => block.kind === "code" || block.text);
}

const trimmed = (kind, text) => (kind === "code" ? text : text.replace(/^\n+|\s+$/g, ""));

// Show a text in a place. Blocks that have not changed stay as they are, so that a selection in
// them survives while the rest is still written.
export function showText(place, text, isMarkdown) {
  const wanted = isMarkdown ? blocks(text) : [{ kind: "plain", language: "", text }];
  wanted.forEach((block, i) => {
    const shown = place.children[i];
    const source = JSON.stringify(block);
    if (shown?.source === source) return;
    if (shown?.kind === block.kind && block.kind !== "prose") {
      shown.querySelector(".verbatim").textContent = block.text;
      shown.source = source;
      return;
    }
    const made = Object.assign(MAKERS[block.kind](block), { source, kind: block.kind });
    if (shown) shown.replaceWith(made);
    else place.append(made);
  });
  while (place.children.length > wanted.length) place.lastElementChild.remove();
}

const MAKERS = {
  plain: ({ text }) =>
    element("div", { class: "plain" }, element("span", { class: "verbatim" }, text)),
  prose: ({ text }) => element("p", { class: "prose" }, ...inline(text)),
  code: ({ language, text }) => {
    const code = element("code", { class: "verbatim" }, text);
    const copy = button("copy", "Copy code", () => copyText(code.textContent));
    const caption = element("figcaption", {}, element("span", {}, language || "code"), copy);
    return element("figure", { class: "code" }, caption, element("pre", {}, code));
  },
};

// `code` and **strong** within a line.
function* inline(text) {
  for (const part of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (/^`[^`]+`$/.test(part)) yield element("code", {}, part.slice(1, -1));
    else if (/^\*\*[^*]+\*\*$/.test(part)) yield element("strong", {}, part.slice(2, -2));
    else if (part) yield part;
  }
}
