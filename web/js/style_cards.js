// Pictures of styles with their names, as elements of the page. Names, descriptions and pictures come from strangers' files: they
// become text nodes, attributes and data URIs that model_styles.js has checked, never markup.

import { element } from "./dom.js";

const SHEET = new URL("./style_cards.css", import.meta.url).href;
const LONGEST_TIP = 600;

document.head.append(element("link", { rel: "stylesheet", href: SHEET }));

// A text without the marks that turn the direction of what follows them: a name must not look like another one.
export const shown = (text) => text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

// The picture of a style; its first letter where it has none.
export function picture(style) {
  if (style.thumbnail) return element("img", { class: "dmm-thumbnail", src: style.thumbnail, alt: "", draggable: "false" });
  const letter = [...shown(style.name).trim()][0] ?? "?";
  return element("span", { class: "dmm-thumbnail dmm-letter", "aria-hidden": "true" }, letter);
}

export const nameOf = (style) => element("span", { class: "dmm-title", dir: "auto" }, shown(style.name));

// What hovering over a style tells.
export function tip(style) {
  const text = shown(style.description ? `${style.name}: ${style.description}` : style.name);
  return text.length > LONGEST_TIP ? `${text.slice(0, LONGEST_TIP)}\u2026` : text;
}

// A row of small cards, or of names alone where no style has a picture.
export function strip(styles, label) {
  const pictures = styles.some((style) => style.thumbnail);
  const cards = styles.map((style) =>
    element("div", { class: "dmm-card", role: "listitem", title: tip(style) }, ...(pictures ? [picture(style)] : []), nameOf(style)),
  );
  return element("div", { class: pictures ? "dmm-strip" : "dmm-strip dmm-names", role: "list", "aria-label": label }, ...cards);
}
