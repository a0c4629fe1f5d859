// Elements on a node that are no part of the workflow: neither queued nor saved with it.

// Put an element on a node, as its last widget. kind: the host's name of the widget's type; options: of addDOMWidget, height among them.
export function addUnsaved(node, name, kind, element, { height, ...options }) {
  const widget = node.addDOMWidget(name, kind, element, {
    serialize: false, // not sent to the server ...
    getMinHeight: height,
    getMaxHeight: height,
    ...options,
  });
  widget.serialize = false; // ... and not saved
  return widget;
}

// A small button in the host's colours; what else there is to its style goes into `style`.
export function smallButton(label, style = {}) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  Object.assign(button.style, {
    font: "11px sans-serif",
    color: "var(--input-text)",
    background: "var(--comfy-input-bg)",
    border: "1px solid var(--border-color)",
    borderRadius: "4px",
    cursor: "pointer",
    ...style,
  });
  return button;
}

// Make a node as large as what is on it needs, if it is smaller.
export function makeRoom(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}
