// The settings of the selected region of a list, as fields: its style, strength, edge, weight and prompts.

import { element } from "./dom.js";
import { NO_STYLE } from "./model_styles.js";
import { say } from "./words.js";

const WORDS = { fall_off: ["feather", "gaussian"], paint_on: ["own crop", "whole canvas"] }; // what a box says, clear and ticked
let count = 0;

export class RegionFields {
  inputs = {};

  // change: called with the region's changed keys; {} where what was typed is nothing.
  constructor(change) {
    this.change = change;
    const field = (key, label, attributes) => {
      const input = element("input", { ...attributes, onchange: () => this.typed(key), "data-field": key });
      this.inputs[key] = input;
      return element("label", { class: `dmm-field dmm-${key}`, title: attributes.title }, label, input);
    };
    this.names = element("datalist", { id: `dmm-styles-${++count}` });
    this.element = element(
      "div",
      { class: "dmm-fields", role: "group", "aria-label": say("The selected region") },
      field("style", say("style"), {
        type: "text",
        title: say("A name, shares (ink:0.7, pen:0.3) or a schedule"),
        list: this.names.id,
      }),
      field("strength", say("strength"), { type: "number", min: 0, max: 4, step: 0.05, title: say("Of the style; 0 is no style") }),
      field("feather", say("feather"), { type: "number", min: 0, max: 1, step: 0.01, title: say("Soft edge, as a share of the canvas's shorter side") }),
      field("weight", say("weight"), { type: "number", min: 0.01, max: 100, step: 0.05, title: say("Against overlapping regions") }),
      field("prompt", say("prompt"), { type: "text", title: say("Its own prompt (connect clip); empty: that of positive") }),
      field("negative", say("negative"), { type: "text", title: say("Its own negative prompt (connect clip); empty: that of negative") }),
      field("fall_off", say("gaussian"), { type: "checkbox", title: say("A soft hill over the whole box, instead of a soft edge") }),
      field("paint_on", say("whole canvas"), {
        type: "checkbox",
        title: say("The prompt is painted everywhere and the box cut out of it, instead of a small canvas of its own"),
      }),
      this.names,
    );
  }

  typed(key) {
    const { [key]: input } = this.inputs;
    if (input.type === "checkbox") return this.change({ [key]: WORDS[key][Number(input.checked)] });
    if (input.type === "text") return this.change({ [key]: input.value.trim() || (key === "style" ? NO_STYLE : "") });
    const number = input.valueAsNumber;
    this.change(Number.isFinite(number) ? { [key]: Math.min(Math.max(number, Number(input.min)), Number(input.max)) } : {});
  }

  // The region at ``index``, or none (undefined); styles: names as the style field takes them.
  show(region, index, enabled, styles) {
    const values = { style: NO_STYLE, strength: 1, feather: 0.05, weight: 1, prompt: "", negative: "", ...region };
    this.element.classList.toggle("dmm-off", !region);
    for (const [key, input] of Object.entries(this.inputs)) {
      input.disabled = !region || !enabled;
      if (input.type === "checkbox") input.checked = values[key] === WORDS[key][1];
      else if (document.activeElement !== input || this.index !== index) input.value = region ? values[key] : "";
    }
    this.index = index;
    if (this.listed === JSON.stringify(styles)) return;
    this.listed = JSON.stringify(styles);
    this.names.replaceChildren(...styles.map((name) => element("option", { value: name })));
  }
}
