// The inputs of our nodes that take styles, and how they are written to.

import { app } from "../../../scripts/app.js";

// Node -> input -> what it takes, one of the kinds in style_check.js.
export const FIELDS = {
  DMMStyleSelector: { style: "name" },
  DMMEditStyle: { style: "name" },
  DMMApplyStyle: { style: "style" },
  DMMStyleForPrompt: { style: "style" },
  DMMNameBlend: { style: "style" },
  DMMStyle: { text: "style" },
  DMMBlendStyles: { first: "style", second: "style" },
  DMMStyleSchedule: { first: "style", then: "style" },
  DMMRegion: { style: "style" },
  DMMStyleMix: { background: "style" },
  DMMStyleSheet: { styles: "lines" },
  DMMStyleTravel: { stops: "lines" },
  DMMForgetStyle: { styles: "names" },
};

// Change a field's text, as a step of its own for undo. change: old text -> new text.
export function write(node, field, change) {
  const widget = node.widgets.find((other) => other.name === field);
  app.canvas.emitBeforeChange();
  widget.value = change(widget.value);
  widget.callback?.(widget.value);
  app.canvas.emitAfterChange();
  node.setDirtyCanvas(true, true);
}
