"use strict";

// The only way in which the page makes elements: text goes in as text, so nothing that a model wrote can be markup.
function element(tag, { text, on = {}, data = {}, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) {
      made.setAttribute(name, value === true ? "" : String(value));
    }
  }
  for (const [name, value] of Object.entries(data)) made.dataset[name] = String(value);
  for (const [event, listener] of Object.entries(on)) made.addEventListener(event, listener);
  if (text !== undefined) made.textContent = String(text);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const SERIES_COLORS = 8;

function seriesColor(index) {
  return color(`--series-${index % SERIES_COLORS}`);
}

function labeled(label, control) {
  return element("label", { class: "control" }, element("span", { text: label }), control);
}

function select(options, chosen, onChange) {
  const made = element(
    "select",
    { on: { change: () => onChange(made.value) } },
    ...options.map(([value, label]) => element("option", { value, text: label })),
  );
  made.value = chosen;
  return made;
}

// Characters that would not be seen, or that turn the text around them: written as their number.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/u;

function appendVisible(parent, text) {
  for (const part of text.split(new RegExp(`(${UNSEEN.source})`, "u"))) {
    if (part.length === 1 && UNSEEN.test(part)) {
      const number = part.charCodeAt(0).toString(16).padStart(2, "0").toUpperCase();
      parent.append(element("span", { class: "unseen", title: `U+${number.padStart(4, "0")}`, text: number }));
    } else if (part) {
      parent.append(part);
    }
  }
  return parent;
}
