// Under Load DMM Model and Add DMM Styles to Model: the styles in the chosen file, before anything has run.

import { app } from "../../../scripts/app.js";
import { element } from "./dom.js";
import { onBeatOf } from "./heartbeat.js";
import { fileOf, isLoader } from "./model_styles.js";
import { addUnsaved, makeRoom } from "./node_widgets.js";
import { shown, strip } from "./style_cards.js";
import { say } from "./words.js";

const WIDGET = "dmm_cards";
const MARGIN = 4;
const TALLEST = 320; // pixels; a model with very many styles scrolls
const LINE = 16;

function content(file) {
  if (!file) return element("div", { class: "dmm-note" }, "\u2026");
  if (file.error) return element("div", { class: "dmm-note", title: shown(file.error) }, shown(file.error));
  if (!file.styles.length) return element("div", { class: "dmm-note", title: say("A plain checkpoint.") }, say("No styles: fine as a teacher or base."));
  return strip(file.styles, say("Styles in this file"));
}

function addCards(node) {
  const frame = element("div", { class: "dmm-frame" });
  let inner = null;
  let before;
  let tall = LINE;

  const height = () => tall + 2 * MARGIN;
  addUnsaved(node, WIDGET, "dmm_cards", frame, { height, margin: MARGIN, hideOnZoom: false });

  function refresh() {
    const file = fileOf(node);
    if (!inner || file !== before) {
      before = file;
      inner = content(file);
      frame.replaceChildren(inner);
    }
    const wanted = Math.min(TALLEST, inner.offsetHeight); // 0 while it is not on the page
    if (wanted && wanted !== tall) {
      tall = wanted;
      makeRoom(node);
      node.setDirtyCanvas(true, true);
    }
  }
  return refresh;
}

app.registerExtension({
  name: "comfyui-dmm.LoaderCards",

  nodeCreated(node) {
    if (!isLoader(node)) return;
    onBeatOf(node, addCards(node));
  },
});
