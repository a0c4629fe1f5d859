// Shows what this pack's nodes report when they have run: the styles in a file, where a model was saved, how well it learnt; or, in red,
// why one stopped. The words may come from strangers' model files: they are text, never markup.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { nodeOf } from "./graph_nodes.js";
import { addUnsaved, makeRoom } from "./node_widgets.js";

const REPORT = "dmm_report";
const PROGRESS = "$$node-text-preview"; // the host's field for words during the work, which says "step 180 of 400" for ever after
const ours = (node) => node?.comfyClass?.startsWith("DMM");
const LINE = 15; // pixels, of a 10 pixel font
const LETTER = 6.1;
const PADDING = 8; // of the text, above and below together
const SCROLL_BAR = 14;
const MOST = 16; // lines; a longer report scrolls, so that the node does not cover those below it

function show(node, text, isError = false) {
  removeProgress(node);
  if (!text && !reportOf(node)) return;
  const widget = reportOf(node) ?? addReport(node);
  widget.value = text;
  widget.element.classList.toggle("dmm-error", isError);
  widget.element.style.boxShadow = isError ? "inset 3px 0 0 var(--error-text, #ff4444)" : "none";
  widget.element.setAttribute("role", isError ? "alert" : "status");
  makeRoom(node);
  node.setDirtyCanvas(true);
}

const reportOf = (node) => node.widgets?.find((other) => other.name === REPORT);

function removeProgress(node) {
  const index = node.widgets?.findIndex((other) => other.name === PROGRESS) ?? -1;
  if (index < 0) return;
  node.widgets[index].onRemove?.();
  node.widgets.splice(index, 1);
}

function failed({ detail: { node_id: id, exception_message: message } }) {
  const node = nodeOf(id);
  if (!ours(node)) return;
  show(node, message.trim(), true);
  app.extensionManager?.toast?.add({ severity: "error", summary: node.title, detail: message.trim(), life: 20_000 });
}

// An error belongs to the run it ended.
function done(id) {
  const node = id && nodeOf(id);
  if (ours(node) && reportOf(node)?.element.classList.contains("dmm-error")) show(node, "");
}

function addReport(node) {
  const element = document.createElement("pre");
  Object.assign(element.style, {
    margin: "0",
    padding: "4px 8px",
    overflow: "auto",
    boxSizing: "border-box",
    maxHeight: `${LINE * MOST + PADDING + SCROLL_BAR}px`,
    font: `10px/${LINE}px monospace`,
    color: "var(--input-text)",
    background: "var(--comfy-input-bg)",
    borderRadius: "4px",
    userSelect: "text",
  });
  // The host's sign that the wheel is the element's while it has the focus; else it zooms the graph. The keyboard scrolls it, too.
  element.dataset.captureWheel = "true";
  element.tabIndex = 0;

  function setValue(text) {
    element.textContent = text;
    element.style.whiteSpace = isTable() ? "pre" : "pre-wrap"; // a table scrolls, sentences wrap
  }
  const isTable = () => /\S {2,}\S/.test(element.textContent);

  function height() {
    if (!element.textContent) return 0;
    const room = isTable() ? Infinity : Math.max(1, (node.size[0] - 60) / LETTER);
    const lines = element.textContent.split("\n").map((line) => Math.max(1, Math.ceil(line.length / room)));
    const margins = 2 * (widget?.margin ?? 10); // the host's, around the element
    return LINE * Math.min(lines.reduce((a, b) => a + b), MOST) + PADDING + margins + (isTable() ? SCROLL_BAR : 0);
  }
  const widget = addUnsaved(node, REPORT, "dmm_report", element, { height, getValue: () => element.textContent, setValue });
  return widget;
}

app.registerExtension({
  name: "comfyui-dmm.NodeText",

  setup() {
    api.addEventListener("execution_error", failed);
    api.addEventListener("executing", ({ detail: id }) => done(id));
    api.addEventListener("execution_cached", ({ detail: { nodes } }) => nodes.forEach(done)); // set back to what ran before
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("DMM")) return;
    const executed = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      executed?.call(this, output);
      const said = output?.remarks ?? output?.text; // where cards show the styles, what they do not say
      if (said) show(this, said.join("\n"));
    };
  },
});
