// The panel in which a style is chosen: cards with picture, name and description. A click or Enter takes a style; "add" blends it
// with what is there, in a share that a slider sets. It writes the text that one would have typed.

import { element } from "./dom.js";
import { nameOf, picture, shown, tip } from "./style_cards.js";
import { namesOfField } from "./style_check.js";
import { NO_STYLE, quoteName, strip, withLine, withShare, withStyle } from "./style_text.js";
import { say } from "./words.js";

const MANY = 8; // styles from which on there is a field to search them
const EDGE = 8; // pixels from the panel to the window's edge

// How each kind of field takes a style, and whether one takes several in a row there, and whether it blends.
const KINDS = {
  name: { take: (_, style) => style.name },
  style: { take: (_, style) => quoteName(style.name), blends: true },
  lines: { take: (text, style) => withLine(text, quoteName(style.name)), blends: true, several: true },
  names: { take: (text, style) => withName(text, style.name), several: true },
};

const withName = (text, name) => (namesOfField("names", text).includes(name) ? text : withStyle(text, quoteName(name)));

// The last line of a text changed.
function inLastLine(text, change) {
  const lines = text.trimEnd().split("\n");
  return [...lines.slice(0, -1), change(lines.at(-1))].join("\n");
}

let close = () => {}; // the open panel, if there is one
let panels = 0;

// Open the panel of a field. button: where the focus returns to; label: for screen readers; styles: to choose from; note: instead of
// them; read: gives the field's text; write: takes a function from the old text to the new one.
export function openPanel({ button, label, kind, styles, note, read, write }) {
  close();
  const { take, blends, several } = KINDS[kind];
  const id = `dmm-panel-${++panels}`;
  const options = []; // {style, card}
  let active = 0;
  let added = null; // {style, text}: the style that was blended in last, and the text before

  const list = element("div", { class: "dmm-list", role: "listbox", tabindex: "0", "aria-label": label, "aria-multiselectable": kind !== "name" });
  const search = element("input", { type: "search", placeholder: say("Search styles"), "aria-label": say("Search styles"), "aria-controls": `${id}-list` });
  const share = element("input", { type: "range", min: "5", max: "95", step: "5", value: "50", "aria-label": say("Share of the added style") });
  const percent = element("span", {});
  const add = element("button", { type: "button", onclick: () => blend(options[active]?.style) });
  const text = element("div", { class: "dmm-said", role: "status" });
  list.id = `${id}-list`;
  const panel = element("div", { class: "dmm-panel", role: "dialog", "aria-modal": "true", "aria-label": label });
  if (styles.length > MANY) panel.append(search);
  panel.append(note ? element("div", { class: "dmm-note" }, note) : list);
  if (blends && !note) panel.append(element("div", { class: "dmm-foot" }, add, share, percent));
  panel.append(text);

  // --- the cards ---

  function fill() {
    const wanted = search.value.trim().toLowerCase();
    const found = styles.filter(({ name, description = "" }) => `${name}\n${description}`.toLowerCase().includes(wanted));
    options.length = 0;
    found.forEach((style, i) => options.push({ style, card: card(style, i) }));
    list.replaceChildren(...options.map((option) => option.card));
    active = Math.max(0, Math.min(active, options.length - 1));
    mark();
  }

  function card(style, i) {
    const usable = kind === "name" || quoteName(style.name) !== null;
    const made = element(
      "div",
      {
        class: "dmm-option",
        id: `${id}-${i}`,
        role: "option",
        title: usable ? tip(style) : say("Its name holds both kinds of quotes and cannot be written in a text: rename the style."),
        "aria-disabled": !usable && "true",
        onclick: () => choose(i),
      },
      picture(style),
      nameOf(style),
    );
    if (style.description) made.append(element("span", { class: "dmm-about", dir: "auto" }, shown(style.description)));
    if (blends && usable && style.name !== NO_STYLE) {
      const plus = element("span", { class: "dmm-plus", "aria-hidden": "true", title: say("Add to the blend") }, say("+ add"));
      plus.onclick = (event) => {
        event.stopPropagation();
        active = i;
        blend(style);
      };
      made.append(plus);
    }
    return made;
  }

  function mark() {
    const chosen = namesOfField(kind, read());
    options.forEach(({ style, card: made }, i) => {
      made.classList.toggle("dmm-active", i === active);
      made.setAttribute("aria-selected", String(chosen.includes(style.name)));
    });
    const now = options[active];
    for (const field of [list, search]) {
      if (now) field.setAttribute("aria-activedescendant", now.card.id);
      else field.removeAttribute("aria-activedescendant");
    }
    now?.card.scrollIntoView({ block: "nearest" });
    add.textContent = now ? say("Add {name}", { name: shown(now.style.name) }) : say("Add");
    add.disabled = !now || now.style.name === NO_STYLE || quoteName(now.style.name) === null;
    percent.textContent = `${share.value}%`;
    text.textContent = shown(read());
  }

  // --- what they do ---

  function choose(i) {
    const { style, card: made } = options[i] ?? {};
    if (!style || made.getAttribute("aria-disabled")) return;
    active = i;
    added = null;
    write((before) => take(before, style));
    if (several) mark();
    else close();
  }

  function blend(style) {
    if (!blends || !style || style.name === NO_STYLE || quoteName(style.name) === null) return;
    added = { style, text: read() };
    blendAgain();
  }

  function blendAgain() {
    if (added) {
      const into = (before) => withShare(before, added.style.name, Number(share.value) / 100);
      write(() => (kind === "lines" && strip(added.text) ? inLastLine(added.text, into) : into(added.text)));
    }
    mark();
  }

  // --- keyboard, focus and place ---

  const columns = () => options.filter((option) => option.card.offsetTop === options[0].card.offsetTop).length;

  function move(event) {
    const steps = { ArrowUp: -columns(), ArrowDown: columns(), ArrowLeft: -1, ArrowRight: 1, Home: -options.length, End: options.length };
    const inText = event.target === search && search.value && !["ArrowUp", "ArrowDown"].includes(event.key);
    if (!(event.key in steps) || inText || ![list, search].includes(event.target)) return false;
    const next = active + steps[event.key];
    const jump = ["Home", "End"].includes(event.key);
    if (jump || (next >= 0 && next < options.length)) active = Math.max(0, Math.min(next, options.length - 1));
    mark();
    return true;
  }

  function keys(event) {
    event.stopPropagation(); // none of these are the canvas's
    const inside = [...panel.querySelectorAll("input, button:enabled, [tabindex='0']")];
    const onCards = [list, search].includes(event.target);
    if (event.key === "Escape") close();
    else if (event.key === "Enter" && onCards && event.shiftKey) blend(options[active]?.style);
    else if ((event.key === "Enter" || (event.key === " " && event.target === list)) && onCards) choose(active);
    else if (event.key === "Tab" && inside.length) {
      const at = inside.indexOf(document.activeElement) + (event.shiftKey ? -1 : 1);
      inside.at(at % inside.length).focus();
    } else if (!move(event)) return;
    event.preventDefault();
  }

  function outside(event) {
    if (!panel.contains(event.target)) close(false);
  }

  function put() {
    const field = button.getBoundingClientRect();
    const { width, height } = panel.getBoundingClientRect();
    const below = field.bottom + 4 + height <= window.innerHeight - EDGE;
    const top = below ? field.bottom + 4 : Math.max(EDGE, field.top - 4 - height);
    panel.style.left = `${Math.max(EDGE, Math.min(field.left, window.innerWidth - EDGE - width))}px`;
    panel.style.top = `${Math.min(top, Math.max(EDGE, window.innerHeight - EDGE - height))}px`;
  }

  close = (focus = true) => {
    close = () => {};
    document.removeEventListener("pointerdown", outside, true);
    button.setAttribute("aria-expanded", "false");
    panel.remove();
    if (focus) button.focus();
  };

  panel.addEventListener("keydown", keys);
  search.addEventListener("input", () => {
    active = 0;
    fill();
  });
  share.addEventListener("input", blendAgain);
  document.addEventListener("pointerdown", outside, true);
  document.body.append(panel);
  button.setAttribute("aria-expanded", "true");
  const chosen = namesOfField(kind, read());
  active = Math.max(0, styles.findIndex((style) => chosen.includes(style.name)));
  fill();
  put();
  const first = panel.querySelector("input[type=search]") ?? (note ? panel : list);
  if (first === panel) panel.setAttribute("tabindex", "-1");
  first.focus({ preventScroll: true });
}
