// Help for the text fields that take styles: "Choose style" and "Add style" in the menu that a right click on a node opens.
//
// The fields stay what they are; the menu only writes into them. Names come from strangers' model files: they go to the host's
// menu as plain strings, which it shows as text (it would read an entry's "content" as HTML).

import { app } from "../../../scripts/app.js";
import { NO_STYLE, onlyStyles, setting, stylesFor } from "./model_styles.js";

const FIELDS = {
  DMMApplyStyle: ["style"],
  DMMStyleForPrompt: ["style"],
  DMMNameBlend: ["style"],
  DMMStyle: ["text"],
  DMMBlendStyles: ["first", "second"],
  DMMStyleSchedule: ["first", "then"],
  DMMRegion: ["style"],
  DMMStyleMix: ["background"],
};
const LINE_FIELDS = { DMMStyleSheet: "styles", DMMStyleTravel: "stops" }; // a style per line

// --- text -------------------------------------------------------------------------------------------------------------

const NUMBER = String.raw`[+-]?(\p{Nd}+\.?\p{Nd}*|\.\p{Nd}+)([eE][+-]?\p{Nd}+)?`;
const WEIGHTED = new RegExp(String.raw`^.*:\s*${NUMBER}\s*$`, "su");

// A style's name as the server reads it back (quote_name in dmm_core/style_value.py); null if no text can hold it.
export function quoteName(name) {
  const plain = !/[,;%\n"']|^\s|\s$/.test(name) && !WEIGHTED.test(name);
  if (plain) return name;
  const quote = ['"', "'"].find((q) => !name.includes(q));
  return quote ? `${quote}${name}${quote}` : null;
}

const isEmpty = (text) => !text.trim() || text.trim() === NO_STYLE;

// A text with one more style: blended with the last one, or where the text ends before a name.
export function withStyle(text, style) {
  if (isEmpty(text)) return style;
  const waits = /[,;]$|%\s*:$/.test(text.trimEnd());
  return `${text.trimEnd()}${waits ? " " : ", "}${style}`;
}

const withLine = (text, style) => (text.trim() ? `${text.trimEnd()}\n${style}` : style);

// --- the menu ---------------------------------------------------------------------------------------------------------

function menuItems(node) {
  const lines = LINE_FIELDS[node.comfyClass];
  const fields = lines ? [lines] : (FIELDS[node.comfyClass] ?? []);
  const names = (stylesFor(node) ?? onlyStyles())?.filter((name) => quoteName(name));
  const items = fields.flatMap((field) => {
    const text = setting(node, field);
    if (text === undefined) return []; // a link decides
    const end = fields.length > 1 ? `: ${field}` : "";
    if (lines) return [entry(node, field, "Add style", names, withLine)];
    const choose = entry(node, field, `Choose style${end}`, names && [...names, NO_STYLE], (_, style) => style);
    return isEmpty(text) ? [choose] : [choose, entry(node, field, `Add style${end}`, names, withStyle)];
  });
  return items.length ? [null, ...items] : [];
}

function entry(node, field, content, names, change) {
  if (!names?.length) return { content: `${content} (no model with styles is connected)`, disabled: true };
  const callback = (name) => write(node, field, (text) => change(text, quoteName(name)));
  return {
    content,
    has_submenu: true,
    callback: (_value, _options, event, parentMenu) => void new LiteGraph.ContextMenu(names, { event, parentMenu, callback }),
  };
}

function write(node, field, change) {
  const widget = node.widgets.find((other) => other.name === field);
  app.canvas.emitBeforeChange(); // a step of its own for undo
  widget.value = change(widget.value);
  widget.callback?.(widget.value);
  app.canvas.emitAfterChange();
  node.setDirtyCanvas(true, true);
}

app.registerExtension({ name: "comfyui-dmm.StyleMenu", getNodeMenuItems: menuItems });
