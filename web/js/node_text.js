// Shows what this pack's nodes report when they have run: the styles in a file, where a model was saved, how well it learnt.
// The words may come from strangers' model files: they are text, never markup.

import { app } from "../../../scripts/app.js";

const REPORT = "dmm_report";
const LINE = 15; // pixels, of a 10 pixel font
const LETTER = 6.1;
const PADDING = 8; // of the text, above and below together
const SCROLL_BAR = 14;

function show(node, text) {
  const widget = node.widgets?.find((other) => other.name === REPORT) ?? addReport(node);
  widget.value = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true);
}

function addReport(node) {
  const element = document.createElement("pre");
  Object.assign(element.style, {
    margin: "0",
    padding: "4px 8px",
    overflow: "auto",
    font: `10px/${LINE}px monospace`,
    color: "var(--input-text)",
    background: "var(--comfy-input-bg)",
    borderRadius: "4px",
    userSelect: "text",
  });

  function setValue(text) {
    element.textContent = text;
    element.style.whiteSpace = isTable() ? "pre" : "pre-wrap"; // a table scrolls, sentences wrap
  }
  const isTable = () => /\S {2,}\S/.test(element.textContent);

  function height() {
    const room = isTable() ? Infinity : Math.max(1, (node.size[0] - 60) / LETTER);
    const lines = element.textContent.split("\n").map((line) => Math.max(1, Math.ceil(line.length / room)));
    const margins = 2 * (widget?.margin ?? 10); // the host's, around the element
    return LINE * lines.reduce((a, b) => a + b) + PADDING + margins + (isTable() ? SCROLL_BAR : 0);
  }
  const widget = node.addDOMWidget(REPORT, "dmm_report", element, {
    serialize: false, // not sent to the server ...
    getValue: () => element.textContent,
    setValue,
    getMinHeight: height,
    getMaxHeight: height,
  });
  widget.serialize = false; // ... and not saved
  return widget;
}

app.registerExtension({
  name: "comfyui-dmm.NodeText",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("DMM")) return;
    const executed = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      executed?.call(this, output);
      if (output?.text) show(this, output.text.join("\n"));
    };
  },
});
