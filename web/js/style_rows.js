// A row under every style field: a button that opens the cards of the connected model's styles, and beside it what the field's text
// means to that model. A name that the model does not know is marked at once, before a run.

import { app } from "../../../scripts/app.js";
import { element } from "./dom.js";
import { onBeatOf } from "./heartbeat.js";
import { modelStyles, NO_STYLE, onlyModelStyles, setting } from "./model_styles.js";
import { addUnsaved, makeRoom } from "./node_widgets.js";
import { picture, shown } from "./style_cards.js";
import { namesOfField, problem } from "./style_check.js";
import { FIELDS, write } from "./style_fields.js";
import { openPanel } from "./style_panel.js";
import { findStyle } from "./style_text.js";
import { say } from "./words.js";

const HEIGHT = 22;
const MARGIN = 4;
const RED = "#ff4444";

function addRow(node, field, kind) {
  const label = Object.keys(FIELDS[node.comfyClass]).length > 1 ? say("Choose a style: {field}", { field }) : say("Choose a style");
  const icon = element("span", { "aria-hidden": "true" });
  const button = element("button", { type: "button", title: label, "aria-label": label, "aria-haspopup": "dialog", "aria-expanded": "false" });
  button.append(icon, say("Styles"));
  const said = element("span", { dir: "auto" });
  const row = element("div", { class: "dmm-row" }, button, said);
  button.onclick = () => open(node, field, kind, button, label);
  for (const kindOf of ["pointerdown", "mousedown", "dblclick"]) button.addEventListener(kindOf, (event) => event.stopPropagation());

  const height = () => HEIGHT + 2 * MARGIN;
  const widget = addUnsaved(node, `dmm_${field}`, "dmm_style_row", row, { height, margin: MARGIN, hideOnZoom: false });
  const { widgets } = node;
  widgets.splice(widgets.indexOf(widget), 1);
  const text = widgets.find((other) => other.name === field);
  widgets.splice(widgets.indexOf(text) + 1, 0, widget);
  outlineWhenWrong(text, () => row.classList.contains("dmm-wrong"));
  return { node, field, kind, text, row, button, icon, said, before: "" };
}

// The border that the canvas draws around a field.
function outlineWhenWrong(widget, isWrong) {
  const proto = Object.getPrototypeOf(widget);
  const usual = () => Reflect.get(proto, "outline_color", widget);
  if (usual() === undefined) return; // a field that is an element, or a host that draws it in another way
  Object.defineProperty(widget, "outline_color", { configurable: true, get: () => (isWrong() ? RED : usual()) });
}

function open(node, field, kind, button, label) {
  const known = modelStyles(node) ?? onlyModelStyles();
  const none = kind === "style" || node.comfyClass === "DMMStyleSelector" ? [{ name: NO_STYLE, description: say("No style.") }] : [];
  const note = {
    note: !known
      ? say("It cannot be told which styles there are: connect a model, or type a name.")
      : !known.length && say("This model has no styles: it is a plain checkpoint."),
  };
  openPanel({
    button,
    label,
    kind,
    styles: known?.length ? [...known, ...none] : [],
    ...(known?.length ? {} : note),
    read: () => setting(node, field) ?? "",
    write: (change) => write(node, field, change),
  });
}

// --- what a row says --------------------------------------------------------------------------------------------------

function state({ node, field, kind }) {
  const text = setting(node, field);
  if (text === undefined) return { linked: true, what: say("from the link") };
  const known = modelStyles(node);
  if (!known) return { what: "" };
  const names = known.map((style) => style.name);
  const wrong = problem(kind, String(text), names);
  if (wrong) return { wrong: true, ...wrong };
  if (!known.length) return { what: say("this model has no styles"), why: say("A plain checkpoint.") };
  const used = namesOfField(kind, String(text)).map((name) => findStyle(names, name));
  const styles = used.map((name) => known.find((style) => style.name === name)).filter(Boolean);
  const what = styles.length === 1 ? (styles[0].description ?? "") : "";
  return { what, why: what, style: styles[0] };
}

function refresh(entry) {
  const { linked = false, wrong = false, what, why = "", style } = state(entry);
  const now = JSON.stringify([linked, wrong, what, why, style?.name, style?.thumbnail?.length]);
  if (now === entry.before) return;
  entry.before = now;
  entry.button.disabled = linked;
  entry.row.classList.toggle("dmm-wrong", wrong);
  entry.said.textContent = shown(what);
  entry.said.title = shown(why);
  entry.icon.replaceChildren(style?.thumbnail ? picture(style) : "\u25a6");
  const area = entry.text.element ?? entry.text.inputEl; // of a field with several lines
  if (area) {
    area.style.outline = wrong ? `1px solid ${RED}` : "";
    area.title = wrong ? shown(why) : "";
  }
  entry.node.setDirtyCanvas(true);
}

// --- on the nodes -----------------------------------------------------------------------------------------------------

// The rows of a node stand between its inputs, and older pages save values by their place, with holes for what is not saved: the
// graphs of other versions have none.
function saveWithoutHoles(node) {
  const before = node.onSerialize;
  node.onSerialize = function (data) {
    before?.call(this, data);
    const saved = (widget) => widget.serialize !== false;
    if (!data.widgets_values || data.widgets_values.length <= this.widgets.filter(saved).length) return; // no holes
    data.widgets_values = [...data.widgets_values].filter((_, i) => saved(this.widgets[i])).map((value) => value ?? null);
  };
}

app.registerExtension({
  name: "comfyui-dmm.StyleRows",

  nodeCreated(node) {
    const fields = Object.entries(FIELDS[node.comfyClass] ?? {});
    const rows = fields.filter(([field]) => node.widgets?.some((widget) => widget.name === field)).map(([field, kind]) => addRow(node, field, kind));
    if (!rows.length) return;
    saveWithoutHoles(node);
    onBeatOf(node, () => rows.forEach(refresh));
    makeRoom(node);
  },
});
