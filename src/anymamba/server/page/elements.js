// Elements made without HTML: names, attributes, and text that stays text.

const SVG = "http://www.w3.org/2000/svg";

// Strokes on a field of 24 by 24.
const ICONS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  settings: "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.5v5M8 13.5v5",
  send: "M12 19V6M6 12l6-6 6 6",
  stop: "M7.5 7.5h9v9h-9z",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  down: "M6 9.5l6 6 6-6",
  close: "M6 6l12 12M18 6L6 18",
  edit: "M5 19l1-4.5L15.5 5l3.5 3.5L9.5 18zM13 7.5l3.5 3.5",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19.5 4v4.5H15",
  branch: "M7 4.5v15M7 13c6 0 10-2 10-8.5M13.8 7.2L17 4l3.2 3.2",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  remove: "M5 7h14M10 7V4.5h4V7M7 7l.8 12.5h8.4L17 7",
};

export function element(name, attributes = {}, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...content);
  return made;
}

export function icon(name) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 24 24");
  picture.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", ICONS[name]);
  picture.append(line);
  return picture;
}

// A button that shows a picture, and whose name says what it does.
export function button(picture, name, click, attributes = {}) {
  const made = element("button", { type: "button", class: "icon", ...attributes }, icon(picture));
  rename(made, name);
  if (click) made.addEventListener("click", click);
  return made;
}

export function rename(made, name) {
  made.setAttribute("aria-label", name);
  made.title = name;
}
