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

// Make a node as large as what is on it needs, if it is smaller.
export function makeRoom(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}
