// The canvas of Style Mix, a list of regions, and of Style Region, its one box: drawn, moved, resized, reordered, duplicated,
// deleted, undone, with mouse, touch or keys.
//
// The list is the text of the node's input region_list and nothing else: it is queued and saved as text, and stays a text field
// without this file. Style Region's box is its numbers x, y, width and height. Style names and prompts come from strangers' files
// and graphs: they are text, never markup. What can have the focus is an <input>, because the host leaves Ctrl+Z alone there.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import * as boxes from "./region_boxes.js";
import { after, canvasSize } from "./canvas_size.js";
import { onBeat } from "./heartbeat.js";
import { NO_STYLE, onlyStyles, origin, setting, stylesFor } from "./model_styles.js";
import { quoteName } from "./style_menu.js";

const WIDGET = "DMM_REGION_LIST";
const CANVAS = "dmm_canvas"; // the widget of Style Region, the server's report, and the node's property: shown or not
const ASPECT = "dmm_aspect"; // the node's property: "3:2", or none for the graph's
const MARGIN = 4; // pixels that the host leaves around the element of a widget, on each side
const BAR = 24;
const HEIGHTS = { list: 394, one: 230, text: 100 };
const NEAR = { mouse: 7, pen: 10, touch: 18 }; // pixels within which a handle is hit
const SNAP = 6; // pixels

const canvases = new Set();

function make(tag, properties = {}, ...children) {
  const { attributes = {}, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const percent = (share) => `${Math.round(share * 1000) / 10}%`;

// --- the canvas -------------------------------------------------------------------------------------------------------

// source: {single, read() -> text, write(text), locked() -> why it cannot be edited, or ""; name(region) -> [style, prompt],
// ghosts() -> boxes that are shown and not edited}
class RegionCanvas {
  regions = [];
  error = null;
  selected = -1;
  history = new boxes.History();
  drag = null;
  report = [];
  picture = { own: null, graph: null };
  showsText = false;
  hidesPicture = false;

  constructor(node, source) {
    this.node = node;
    this.source = source;
    this.build();
    this.load(source.read());
    this.stop = onBeat(() => this.look());
    canvases.add(this);
  }

  remove() {
    this.stop();
    canvases.delete(this);
  }

  get single() {
    return this.source.single;
  }

  // --- elements

  build() {
    const button = (key, label, title, action) =>
      make("input", {
        type: "button",
        value: label,
        title,
        onclick: action,
        attributes: { "aria-label": title, "data-action": key },
      });
    const list = this.single
      ? []
      : [
          button("add", "+", "Add a region", () => this.add()),
          button("duplicate", "copy", "Duplicate (Ctrl+D)", () => this.duplicate()),
          button("columns", "\u25eb", "Split into two columns (|)", () => this.split("x")),
          button("rows", "\u229f", "Split into two rows (-)", () => this.split("y")),
          button("delete", "\u2715", "Delete (Delete)", () => this.delete()),
          button("back", "\u2193", "One down in the order (Page Down)", () => this.reorder(-1)),
          button("front", "\u2191", "One up in the order (Page Up)", () => this.reorder(1)),
        ];
    this.opener = button("open", this.single ? "Draw the box" : "Draw regions", "Show the canvas", () => this.setOpen(!this.open));
    this.aspect = make("input", {
      className: "dmm-aspect",
      placeholder: "auto",
      title: "Sides of the canvas, such as 3:2; empty: as the latent behind this node",
      onchange: () => this.setAspect(this.aspect.value),
      attributes: { "aria-label": "Sides of the canvas", "data-action": "aspect" },
    });
    this.tools = make(
      "div",
      { className: "dmm-tools", attributes: { role: "toolbar", "aria-label": "Canvas" } },
      ...list,
      button("undo", "\u21b6", "Undo (Ctrl+Z)", () => this.undo()),
      button("redo", "\u21b7", "Redo (Ctrl+Shift+Z)", () => this.redo()),
      this.aspect,
      button("picture", "\u25a3", "Show or hide the picture", () => this.togglePicture()),
      ...(this.single ? [] : [button("text", "{ }", "Show the list as text", () => this.toggleText())]),
    );
    this.image = make("img", { className: "dmm-picture", alt: "", draggable: false, onload: () => this.layout() });
    this.image.hidden = true;
    this.ghostLayer = make("div", { className: "dmm-layer" });
    this.boxLayer = make("div", { className: "dmm-layer" });
    this.handleLayer = make("div", { className: "dmm-layer" });
    const hatches = ["top", "bottom", "left", "right"].map((side) => make("div", { className: `dmm-hatch dmm-${side}` }));
    this.paper = make("div", { className: "dmm-paper" }, this.image, this.ghostLayer, this.boxLayer, ...hatches, this.handleLayer);
    const keys = "Arrows move it, Shift and arrows resize it, Delete deletes it.";
    this.stage = make("div", {
      className: "dmm-stage",
      title: this.single
        ? "Drag the box, its edges, or draw a new one. Alt: no snapping."
        : "Drag on free space to draw a region, on a region to move it. Shift: draw over regions. Alt: no snapping.",
      attributes: { role: "group", "aria-label": this.single ? `The box on the canvas. ${keys}` : `Regions on the canvas. ${keys}` },
    });
    this.stage.append(this.paper);
    this.status = make("div", { className: "dmm-status", attributes: { role: "status" } });
    this.fields = this.single ? make("div") : this.buildFields();
    this.text = make("textarea", {
      className: "dmm-text",
      spellcheck: false,
      onchange: () => this.typed(),
      attributes: { "aria-label": "The list of regions as JSON" },
    });
    this.body = make("div", { className: "dmm-body" }, this.tools, this.stage, this.status, this.fields, this.text);
    this.root = make("div", { className: "dmm-canvas" }, this.opener, this.body);
    this.listen();
    new ResizeObserver(() => this.layout()).observe(this.stage);
  }

  buildFields() {
    const field = (key, label, properties) => {
      const input = make("input", { ...properties, onchange: () => this.setField(key), attributes: { "data-field": key } });
      this.inputs[key] = input;
      return make("label", { className: `dmm-field dmm-${key}`, title: properties.title }, label, input);
    };
    this.inputs = {};
    this.names = make("datalist", { id: `dmm-styles-${++RegionCanvas.count}` });
    const fields = make(
      "div",
      { className: "dmm-fields", attributes: { role: "group", "aria-label": "The selected region" } },
      field("style", "style", { type: "text", title: "A name, shares (ink:0.7, pen:0.3) or a schedule" }),
      field("strength", "strength", { type: "number", min: 0, max: 4, step: 0.05, title: "Of the style; 0 is no style" }),
      field("feather", "feather", { type: "number", min: 0, max: 1, step: 0.01, title: "Soft edge, as a share of the canvas's shorter side" }),
      field("weight", "weight", { type: "number", min: 0.01, max: 100, step: 0.05, title: "Against overlapping regions" }),
      field("prompt", "prompt", { type: "text", title: "Its own prompt (connect clip); empty: that of positive" }),
      field("negative", "negative", { type: "text", title: "Its own negative prompt (connect clip); empty: that of negative" }),
      field("fall_off", "gaussian", { type: "checkbox", title: "A soft hill over the whole box, instead of a soft edge" }),
      field("paint_on", "whole canvas", {
        type: "checkbox",
        title: "The prompt is painted everywhere and the box cut out of it, instead of a small canvas of its own",
      }),
      this.names,
    );
    this.inputs.style.setAttribute("list", this.names.id);
    return fields;
  }

  // --- state

  get value() {
    return this.current;
  }

  // The text as it now is outside; it starts a history of its own.
  load(text) {
    if (text === this.current) return;
    this.history = new boxes.History();
    this.take(text);
    this.renderSoon();
  }

  show(text) {
    this.take(text);
    this.render();
  }

  take(text) {
    this.current = text;
    ({ regions: this.regions, error: this.error } = boxes.readRegions(text));
    if (this.single && this.regions.length) this.selected = 0;
    this.selected = Math.min(this.selected, this.regions.length - 1);
  }

  // Not while the host is at work on the graph: half a graph cannot be read.
  renderSoon() {
    setTimeout(() => this.render());
  }

  // A change by the user, a step of its own for undo, here and in the graph.
  commit(regions, kind = "") {
    this.store(boxes.writeRegions(regions), kind);
  }

  store(text, kind = "") {
    if (text === this.current) return this.render();
    this.history.record(this.current, kind);
    this.write(text);
  }

  write(text) {
    this.report = [];
    app.canvas?.emitBeforeChange();
    this.show(text);
    this.source.write(text);
    app.canvas?.emitAfterChange();
    this.node.setDirtyCanvas(true, true);
  }

  // The region at ``index`` with a new box or other keys.
  change(index, changes, kind = "") {
    const places = this.single ? 2 : 4;
    this.commit(
      this.regions.map((region, i) => (i === index ? boxes.kept({ ...region, ...changes }, places) : region)),
      kind,
    );
  }

  editable() {
    return !this.error && !this.source.locked();
  }

  // --- what the user does

  newRegion(box) {
    const last = this.regions[this.selected] ?? this.regions.at(-1);
    const names = (stylesFor(this.node) ?? onlyStyles() ?? []).map(quoteName).filter(Boolean);
    const style = last?.style ?? names[0] ?? NO_STYLE;
    return boxes.kept({ style, ...box, strength: 1, feather: last?.feather ?? 0.05 });
  }

  add() {
    if (!this.editable()) return;
    const aside = (this.regions.length % 5) * boxes.GRID;
    this.selected = this.regions.length;
    this.commit([...this.regions, this.newRegion({ x: 0.25 + aside, y: 0.25 + aside, w: 0.5, h: 0.5 })]);
    this.focus();
  }

  duplicate() {
    if (this.single || !this.editable() || this.selected < 0) return;
    const copies = boxes.duplicated(this.regions, this.selected);
    this.selected = copies.length - 1;
    this.commit(copies);
    this.focus();
  }

  // The chosen region, or the whole canvas while there is none, in two halves.
  split(way) {
    if (this.single || !this.editable() || (this.selected < 0 && this.regions.length)) return;
    const whole = this.regions.length ? this.regions : [this.newRegion({ x: 0, y: 0, w: 1, h: 1 })];
    this.selected = Math.max(this.selected, 0);
    this.commit(boxes.halved(whole, this.selected, way));
    this.focus();
  }

  delete() {
    if (this.single || !this.editable() || this.selected < 0) return;
    const gone = this.selected;
    this.selected = Math.min(gone, this.regions.length - 2);
    this.commit(this.regions.filter((_, i) => i !== gone));
    this.focus();
  }

  reorder(by) {
    if (this.single || !this.editable() || this.selected < 0) return;
    const order = boxes.reordered(this.regions, this.selected, this.selected + by);
    if (order === this.regions) return;
    this.selected += by;
    this.commit(order);
    this.focus();
  }

  undo() {
    const text = this.history.undo(this.current);
    if (text !== undefined) this.write(text);
    this.focus();
  }

  redo() {
    const text = this.history.redo(this.current);
    if (text !== undefined) this.write(text);
    this.focus();
  }

  typed() {
    if (!this.source.locked()) this.store(this.text.value);
  }

  setField(key) {
    const { [key]: input } = this.inputs;
    if (!this.editable() || this.selected < 0) return;
    const region = { ...this.regions[this.selected] };
    if (input.type === "number") {
      if (!Number.isFinite(input.valueAsNumber)) return this.render();
      region[key] = Math.min(Math.max(input.valueAsNumber, Number(input.min)), Number(input.max));
    } else if (input.type === "checkbox") {
      const words = { fall_off: ["feather", "gaussian"], paint_on: ["own crop", "whole canvas"] }[key];
      region[key] = words[Number(input.checked)];
    } else region[key] = input.value.trim() || (key === "style" ? NO_STYLE : "");
    this.commit(this.regions.map((other, i) => (i === this.selected ? region : other)));
  }

  setAspect(text) {
    const [width, height] = text.split(/[:x/]/).map(Number);
    if (width > 0 && height > 0) this.node.properties[ASPECT] = `${width}:${height}`;
    else delete this.node.properties[ASPECT];
    this.render();
  }

  togglePicture() {
    this.hidesPicture = !this.hidesPicture;
    this.render();
  }

  toggleText() {
    this.showsText = !this.showsText;
    this.render();
    this.fit();
  }

  // --- pointer

  listen() {
    // What happens here is not the graph's: not the host's shortcuts, nor dragging the node. Running and saving still work.
    for (const type of ["pointerdown", "mousedown", "dblclick", "keyup", "keypress", "copy", "cut", "paste"])
      this.root.addEventListener(type, (event) => event.stopPropagation());
    this.root.addEventListener("keydown", (event) => this.keyDown(event));
    this.stage.addEventListener("mousedown", (event) => event.preventDefault()); // the focus goes where pointerDown puts it
    this.stage.addEventListener("pointerdown", (event) => this.pointerDown(event));
    this.stage.addEventListener("pointermove", (event) => this.pointerMove(event));
    this.stage.addEventListener("pointerup", (event) => this.pointerUp(event));
    this.stage.addEventListener("pointercancel", () => this.endDrag());
    this.stage.addEventListener("dragstart", (event) => event.preventDefault());
  }

  // Where an event is, in shares of the canvas, and how much of it ``pixels`` of the screen are.
  place(event) {
    const frame = this.paper.getBoundingClientRect();
    const reach = (pixels) => ({ x: pixels / frame.width, y: pixels / frame.height });
    return { x: (event.clientX - frame.left) / frame.width, y: (event.clientY - frame.top) / frame.height, reach };
  }

  hit(event) {
    const { x, y, reach } = this.place(event);
    if (event.shiftKey) return null;
    return boxes.hit(this.regions, this.selected, x, y, reach(NEAR[event.pointerType] ?? NEAR.mouse));
  }

  pointerDown(event) {
    if (event.button !== 0 || !event.isPrimary || !this.editable()) return;
    const { x, y } = this.place(event);
    const at = this.hit(event) ?? { index: this.single ? 0 : this.regions.length, part: "draw" };
    if (at.part !== "draw" || this.single) this.select(at.index);
    this.drag = { ...at, x, y, before: this.regions, box: this.regions[at.index], moved: false };
    this.stage.setPointerCapture(event.pointerId);
    event.preventDefault();
  }

  pointerMove(event) {
    const { drag } = this;
    if (!drag) {
      const at = this.editable() ? this.hit(event) : null;
      this.stage.style.cursor = !at ? "crosshair" : at.part === "move" ? "move" : `${at.part}-resize`;
      return;
    }
    const { x, y, reach } = this.place(event);
    const [nearX, nearY] = [reach(3).x, reach(3).y];
    if (!drag.moved && Math.abs(x - drag.x) < nearX && Math.abs(y - drag.y) < nearY) return;
    drag.moved = true;
    const snap = !(event.altKey || event.ctrlKey || event.metaKey);
    const others = drag.before.filter((_, i) => i !== drag.index);
    const lines = boxes.snapLines([...others, ...this.source.ghosts()]);
    let box;
    if (drag.part === "draw") {
      const ends = [
        [drag.x, drag.y],
        [x, y],
      ].map(([px, py]) => (snap ? boxes.snappedPoint(px, py, lines, reach(SNAP)) : [px, py]));
      box = boxes.between(...ends.flat());
    } else {
      box = boxes.dragged(drag.box, drag.part, x - drag.x, y - drag.y);
      if (snap) box = boxes.snapped(box, drag.part, lines, reach(SNAP));
    }
    const { x: left, y: top, w, h } = boxes.kept(box, this.single ? 2 : 4);
    drag.new ??= drag.box ?? this.newRegion({ x: left, y: top, w, h });
    drag.now = { ...drag.new, x: left, y: top, w, h };
    this.regions = drag.before.map((region, i) => (i === drag.index ? drag.now : region));
    this.render();
  }

  pointerUp() {
    const { drag } = this;
    const { now, moved, index } = drag ?? {};
    this.endDrag();
    if (!drag) return;
    if (!moved) {
      if (drag.part === "draw" && !this.single) this.select(-1);
      return;
    }
    this.selected = index;
    this.commit(index < this.regions.length ? this.regions.map((region, i) => (i === index ? now : region)) : [...this.regions, now]);
    this.focus();
  }

  endDrag() {
    if (this.drag) this.regions = this.drag.before;
    this.drag = null;
    this.render();
  }

  select(index) {
    this.selected = index;
    this.render();
    this.focus();
  }

  focus() {
    // Without a box the focus stays here all the same: the next key would be the graph's.
    const box = this.boxLayer.children[this.selected]?.querySelector("input");
    (box ?? this.tools.querySelector("input")).focus({ preventScroll: true });
  }

  // --- keys

  keyDown(event) {
    const command = event.ctrlKey || event.metaKey;
    if (command && ["Enter", "s"].includes(event.key)) {
      event.target.dispatchEvent(new Event("change")); // run, save: with what is being typed
      return;
    }
    event.stopPropagation();
    const typing = event.target.matches("textarea, input:not([type=button])");
    if (typing) {
      if (event.key === "Enter" && event.target.tagName === "INPUT") event.target.blur();
      return;
    }
    const onBox = this.boxLayer.contains(event.target);
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const done = command ? this.commandKey(key, event.shiftKey) : onBox && this.boxKey(key, event.shiftKey);
    if (done) event.preventDefault();
  }

  commandKey(key, shift) {
    if (key === "z") shift ? this.redo() : this.undo();
    else if (key === "y") this.redo();
    else if (key === "d") this.duplicate();
    else return "acvx".includes(key); // the page's selection and clipboard: nodes
    return true;
  }

  boxKey(key, shift) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    if (way && this.editable()) {
      const [dx, dy] = way.map((n) => n * boxes.STEP);
      const box = this.regions[this.selected];
      const changes = shift ? { w: box.w + dx, h: box.h + dy } : { x: box.x + dx, y: box.y + dy };
      this.change(this.selected, changes, `${shift ? "size" : "place"} ${this.selected}`);
    } else if (key === "Delete" || key === "Backspace") this.delete();
    else if (key === "|" || key === "-") this.split(key === "|" ? "x" : "y");
    else if (key === "PageUp") this.reorder(1);
    else if (key === "PageDown") this.reorder(-1);
    else if (key === "Enter" && !this.single) this.inputs.style.focus();
    else if (key === "Escape") this.endDrag();
    else return false;
    return true;
  }

  // --- drawing

  get open() {
    return Boolean(this.node.properties?.[CANVAS]);
  }

  setOpen(open) {
    this.node.properties[CANVAS] = open;
    this.render();
    this.fit();
  }

  height() {
    if (!this.open) return BAR + 2 * MARGIN;
    const text = this.textShown() ? HEIGHTS.text : 0;
    return BAR + (this.single ? HEIGHTS.one : HEIGHTS.list) + text + 2 * MARGIN;
  }

  textShown() {
    return !this.single && (this.showsText || Boolean(this.error));
  }

  // The node takes the room that its widgets now need.
  fit() {
    const height = this.node.computeSize()[1];
    this.node.setSize([Math.max(this.node.size[0], this.open ? 320 : 0), height]);
    this.node.setDirtyCanvas(true, true);
  }

  size() {
    const [width, height] = (this.node.properties?.[ASPECT] ?? "").split(":").map(Number);
    if (width > 0 && height > 0) return { width, height, pixels: null };
    const pixels = this.node.graph ? canvasSize(this.node) : null;
    if (pixels) return { ...pixels, pixels };
    const { naturalWidth, naturalHeight } = this.image;
    return { width: naturalWidth || 1, height: naturalHeight || 1, pixels: null };
  }

  layout() {
    const { width, height } = this.size();
    const room = [this.stage.clientWidth * 0.86, this.stage.clientHeight * 0.86];
    const scale = Math.max(Math.min(room[0] / width, room[1] / height), 0);
    Object.assign(this.paper.style, { width: `${width * scale}px`, height: `${height * scale}px` });
  }

  render() {
    const { open } = this;
    this.body.hidden = !open;
    const { pixels } = this.size();
    const troubles = this.troubles(pixels);
    const label = this.single ? "Draw the box" : "Draw regions";
    this.opener.value = `${troubles.length && !open ? "\u26a0 " : ""}${label} ${open ? "\u25b4" : "\u25be"}`;
    this.opener.title = [open ? "Hide the canvas" : "Show the canvas", ...(open ? [] : troubles)].join("\n");
    this.opener.setAttribute("aria-label", [label, ...(open ? [] : troubles)].join(", "));
    this.opener.setAttribute("aria-expanded", String(open));
    if (!open) return;
    const regions = this.drag?.part === "draw" && this.drag.now && !this.single ? [...this.regions, this.drag.now] : this.regions;
    this.renderBoxes(this.ghostLayer, this.source.ghosts(), pixels, true);
    this.renderBoxes(this.boxLayer, regions, pixels, false);
    this.renderHandles(this.regions[this.selected]);
    this.renderStatus(troubles);
    this.aspect.value = this.node.properties?.[ASPECT] ?? "";
    const picture = this.picture.own ?? this.picture.graph;
    if (picture && this.image.getAttribute("src") !== picture) this.image.src = picture;
    this.image.hidden = !picture || this.hidesPicture;
    if (!this.single) this.renderFields();
    this.text.hidden = !this.textShown();
    if (document.activeElement !== this.text || !this.error) this.text.value = this.current;
    this.layout();
  }

  renderBoxes(layer, regions, pixels, ghosts) {
    while (layer.children.length > regions.length) layer.lastChild.remove();
    while (layer.children.length < regions.length) layer.append(this.newBox(layer.children.length, ghosts));
    for (const [i, region] of regions.entries()) {
      const element = layer.children[i];
      const [style, prompt] = this.source.name(region);
      const warned = boxes.warnings(region, pixels);
      const { x, y, w, h } = region;
      Object.assign(element.style, { left: percent(x), top: percent(y), width: percent(w), height: percent(h) });
      element.style.setProperty("--dmm-hue", boxes.hue(style));
      const [name, words, mark, input] = element.children;
      name.textContent = this.single || ghosts ? style : `${i + 1} ${style}`;
      words.textContent = prompt.length > 80 ? `${prompt.slice(0, 79)}\u2026` : prompt;
      mark.hidden = !warned.length;
      element.classList.toggle("dmm-selected", !ghosts && i === this.selected);
      if (ghosts) continue;
      const place = `left ${percent(x)}, top ${percent(y)}, width ${percent(w)}, height ${percent(h)}`;
      const label = [this.single ? "Box" : `Region ${i + 1} of ${regions.length}`, style, prompt, place, ...warned];
      input.setAttribute("aria-label", label.filter(Boolean).join(", "));
      input.setAttribute("aria-pressed", String(i === this.selected));
    }
  }

  newBox(index, ghost) {
    const element = make(
      "div",
      { className: ghost ? "dmm-box dmm-ghost" : "dmm-box" },
      make("span", { className: "dmm-name" }),
      make("span", { className: "dmm-words" }),
      make("span", { className: "dmm-mark", textContent: "\u26a0", attributes: { "aria-hidden": "true" } }),
    );
    if (!ghost) {
      const keys = this.single ? "ArrowLeft Shift+ArrowLeft" : "ArrowLeft Shift+ArrowLeft Delete Control+D PageUp PageDown | -";
      const input = make("input", { type: "button", value: "", attributes: { "aria-keyshortcuts": keys } });
      input.addEventListener("focus", () => {
        if (this.selected === index) return;
        this.selected = index;
        this.render();
      });
      element.append(input);
    }
    return element;
  }

  renderHandles(box) {
    const shown = box && this.editable() ? boxes.HANDLES : [];
    while (this.handleLayer.children.length > shown.length) this.handleLayer.lastChild.remove();
    while (this.handleLayer.children.length < shown.length) this.handleLayer.append(make("div", { className: "dmm-handle" }));
    for (const [i, handle] of shown.entries()) {
      const [x, y] = boxes.handlePoint(box, handle);
      Object.assign(this.handleLayer.children[i].style, { left: percent(x), top: percent(y) });
    }
  }

  // What to look at, in words: a text that cannot be read, boxes that paint little, what the server said.
  troubles(pixels) {
    const own = this.regions.flatMap((region, i) =>
      boxes.warnings(region, pixels).map((text) => `${this.single ? "Box" : `Region ${i + 1}`}: ${text}`),
    );
    return [this.error, this.source.advice?.(this.regions), ...own, ...this.report].filter(Boolean);
  }

  renderStatus(troubles) {
    const box = this.regions[this.selected];
    const lines = [this.source.locked(), ...troubles].filter(Boolean);
    const place = box ? `x ${box.x}, y ${box.y}, ${box.w} \u00d7 ${box.h}` : "";
    const hint = this.regions.length ? "" : "Drag here to draw a region";
    const text = lines.length ? `\u26a0 ${lines.join("\n\u26a0 ")}` : place || hint;
    if (this.status.textContent !== text) this.status.textContent = text;
    this.status.title = text;
    this.status.classList.toggle("dmm-warned", lines.length > 0);
  }

  renderFields() {
    const region = this.regions[this.selected];
    const values = { style: NO_STYLE, strength: 1, feather: 0.05, weight: 1, prompt: "", negative: "", ...region };
    this.fields.classList.toggle("dmm-off", !region);
    for (const [key, input] of Object.entries(this.inputs)) {
      input.disabled = !region || !this.editable();
      if (document.activeElement === input && input.type !== "checkbox" && this.fieldOf === this.selected) continue;
      if (key === "fall_off") input.checked = values.fall_off === "gaussian";
      else if (key === "paint_on") input.checked = values.paint_on === "whole canvas";
      else input.value = region ? values[key] : "";
    }
    this.fieldOf = this.selected;
    const names = (stylesFor(this.node) ?? onlyStyles() ?? []).map(quoteName).filter(Boolean);
    if (this.listed === JSON.stringify(names)) return;
    this.listed = JSON.stringify(names);
    this.names.replaceChildren(...names.map((name) => make("option", { value: name })));
  }

  // --- the graph around it

  look() {
    if (!this.node.graph || this.drag) return;
    this.load(this.source.read());
    const seen = JSON.stringify([this.size(), this.source.ghosts(), this.source.locked(), this.source.sees?.(), stylesFor(this.node)]);
    if (seen === this.seen) return;
    this.seen = seen;
    this.render();
  }

  // What the server's node said after a run: nodes/region_canvas.py.
  executed({ warnings, picture }) {
    this.report = warnings;
    this.picture.own = picture && viewOf(picture);
    this.render();
  }
}

RegionCanvas.count = 0;

const viewOf = ({ filename, subfolder, type }) =>
  api.apiURL(`/view?${new URLSearchParams({ filename, subfolder: subfolder ?? "", type: type ?? "output" })}`);

// The last picture that the graph paints with these regions lies under them.
function painted({ detail: { node: id, output } }) {
  const picture = output?.images?.at(-1);
  if (!picture?.filename || !/\.(png|jpe?g|webp)$/i.test(picture.filename)) return;
  const last = String(id).split(":").at(-1);
  for (const canvas of canvases) {
    if (!canvas.node.graph || !after(canvas.node).some((node) => String(node.id) === last)) continue;
    canvas.picture.graph = viewOf(picture);
    canvas.render();
  }
}

// --- the two nodes ----------------------------------------------------------------------------------------------------

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

// The box of a Style Region in the graph, or null where a link or a mask decides.
function boxOf(node) {
  if (["mask", "bboxes"].some((name) => node.inputs?.find((input) => input.name === name)?.link != null)) return null;
  const [x, y, w, h] = ["x", "y", "width", "height"].map((name) => setting(node, name));
  return [x, y, w, h].every(Number.isFinite) ? { x, y, w, h, style: setting(node, "style") ?? "", node } : null;
}

function promptOf(node) {
  const input = node.inputs?.find((other) => other.name === "positive");
  const text = input?.link == null ? "" : setting(origin(node, input)?.node ?? {}, "text");
  return typeof text === "string" ? text : "";
}

function listSource(node, name) {
  let text = "";
  const linked = (input) => node.inputs?.find((other) => other.name === input)?.link != null;
  const ghosts = () => {
    const inputs = (node.graph && node.inputs?.filter((input) => input.name.startsWith("regions.") && input.link != null)) || [];
    const nodes = inputs.map((input) => origin(node, input)?.node).filter((other) => other?.comfyClass === "DMMRegion");
    return nodes.map(boxOf).filter(Boolean).map(({ node: other, ...box }) => ({ ...box, prompt: promptOf(other) }));
  };
  return {
    single: false,
    read: () => text,
    write(changed) {
      text = changed;
      widgetOf(node, name)?.callback?.(text);
    },
    set: (changed) => (text = changed),
    name: (region) => [region.style ?? NO_STYLE, region.prompt ?? ""],
    locked: () => (linked(name) ? "The list comes from a link" : linked("bboxes") ? "bboxes decide where these regions are" : ""),
    advice: (regions) =>
      regions.some((region) => region.prompt || region.negative) && !linked("clip") ? "Connect clip: regions have prompts of their own" : "",
    ghosts,
    sees: () => linked("clip"),
  };
}

function boxSource(node) {
  const names = { x: "x", y: "y", w: "width", h: "height" };
  return {
    single: true,
    read() {
      const share = (name) => Math.round(widgetOf(node, name)?.value * 1e4) / 1e4; // the host's own rounding leaves 0.5700000000000001
      const sides = Object.fromEntries(Object.entries(names).map(([side, name]) => [side, share(name)]));
      return boxes.writeRegions([sides]);
    },
    write(text) {
      const [box] = JSON.parse(text);
      for (const [side, name] of Object.entries(names)) {
        const widget = widgetOf(node, name);
        widget.value = box[side];
        widget.callback?.(box[side]);
      }
    },
    name: () => [setting(node, "style") ?? "", promptOf(node)],
    locked() {
      if (boxOf(node)) return "";
      const input = ["mask", "bboxes"].find((name) => node.inputs?.find((other) => other.name === name)?.link != null);
      return input ? `The place comes from ${input}` : "The place comes from a link";
    },
    ghosts: () => [],
    sees: () => [setting(node, "style"), promptOf(node)],
  };
}

function addCanvas(node, name, source, options) {
  node.properties ??= {};
  const canvas = new RegionCanvas(node, source);
  const widget = node.addDOMWidget(name, CANVAS, canvas.root, {
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => canvas.height(),
    ...options(canvas),
  });
  const removed = widget.onRemove;
  widget.onRemove = function () {
    canvas.remove();
    removed?.call(this);
  };
  node.dmmCanvas = canvas;
  return widget;
}

function regionList(node, inputName) {
  const source = listSource(node, inputName);
  const widget = addCanvas(node, inputName, source, (canvas) => ({
    getValue: () => source.read(),
    setValue(text) {
      source.set(typeof text === "string" ? text : "");
      canvas.load(source.read());
    },
  }));
  return { widget };
}

function addBox(node) {
  const widget = addCanvas(node, CANVAS, boxSource(node), () => ({ serialize: false, getValue: () => "", setValue() {} }));
  widget.serialize = false; // neither queued nor saved: the numbers are
}

// A node that the user adds has its canvas open. Graphs from before the canvas were laid out without it: there it is closed, unless
// the list has regions.
function added(node) {
  node.properties[CANVAS] = false;
  setTimeout(() => {
    if (!node.dmmCanvas.configured) node.dmmCanvas.setOpen(true);
  });
}

function opened(node, saved) {
  const canvas = node.dmmCanvas;
  canvas.configured = true;
  node.properties[CANVAS] = saved.properties?.[CANVAS] ?? (!canvas.single && Boolean(canvas.regions.length || canvas.error));
  canvas.renderSoon();
}

const STYLE = `
.dmm-canvas { display: flex; flex-direction: column; gap: 3px; width: 100%; height: 100%; min-height: 0; box-sizing: border-box;
  font: 11px/1.3 sans-serif; color: var(--input-text); }
.dmm-canvas [hidden] { display: none !important; }
.dmm-canvas input, .dmm-canvas textarea { font: inherit; color: var(--input-text); background: var(--comfy-input-bg);
  border: 1px solid var(--border-color); border-radius: 4px; box-sizing: border-box; min-width: 0; }
.dmm-canvas input[type=button] { cursor: pointer; }
.dmm-canvas > input { height: 24px; flex: none; width: 100%; }
.dmm-canvas :focus-visible { outline: 2px solid var(--p-primary-color, #4f9cff); outline-offset: 1px; }
.dmm-body { display: flex; flex-direction: column; gap: 3px; flex: 1; min-height: 0; }
.dmm-tools { display: flex; gap: 3px; flex: none; height: 22px; }
.dmm-tools input[type=button] { flex: 1 1 22px; padding: 0 2px; }
.dmm-tools [data-action=duplicate] { flex-basis: 36px; }
.dmm-tools .dmm-aspect { flex: 1 1 44px; width: 44px; padding: 0 4px; }
.dmm-stage { position: relative; flex: 1 1 140px; min-height: 80px; overflow: hidden; display: flex; align-items: center;
  justify-content: center; background: var(--comfy-menu-bg); border: 1px solid var(--border-color); border-radius: 4px;
  touch-action: none; user-select: none; cursor: crosshair; }
.dmm-paper { position: relative; flex: none; background: var(--comfy-input-bg); outline: 1px solid var(--input-text); }
.dmm-picture { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: fill; opacity: 0.75; pointer-events: none; }
.dmm-layer { position: absolute; inset: 0; pointer-events: none; }
.dmm-hatch { position: absolute; pointer-events: none;
  background: repeating-linear-gradient(45deg, rgb(0 0 0 / 0.55) 0 4px, rgb(128 128 128 / 0.35) 4px 8px); }
.dmm-top { left: -2000px; right: -2000px; bottom: 100%; height: 2000px; }
.dmm-bottom { left: -2000px; right: -2000px; top: 100%; height: 2000px; }
.dmm-left { right: 100%; width: 2000px; top: 0; bottom: 0; }
.dmm-right { left: 100%; width: 2000px; top: 0; bottom: 0; }
.dmm-box { position: absolute; box-sizing: border-box; overflow: hidden; padding: 1px 3px; display: flex; flex-direction: column;
  border: 2px solid hsl(var(--dmm-hue) 80% 60%); background: hsl(var(--dmm-hue) 80% 45% / 0.28); color: #fff;
  text-shadow: 0 0 2px #000, 0 0 3px #000; }
.dmm-box.dmm-selected { border-width: 3px; background: hsl(var(--dmm-hue) 80% 45% / 0.42); }
.dmm-box.dmm-ghost { border-style: dashed; opacity: 0.7; }
.dmm-box > input { position: absolute; inset: 0; width: 100%; height: 100%; padding: 0; background: none !important; border: none; }
.dmm-box > input:focus-visible { outline-offset: -5px; }
.dmm-name { font-weight: bold; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; flex: none; padding-right: 12px; }
.dmm-words { overflow: hidden; overflow-wrap: anywhere; }
.dmm-mark { position: absolute; top: 0; right: 2px; color: #ffcc33; }
.dmm-handle { position: absolute; width: 8px; height: 8px; margin: -4px; box-sizing: border-box; background: #fff;
  border: 1px solid #000; border-radius: 2px; }
.dmm-status { flex: none; min-height: 15px; max-height: 44px; overflow: auto; white-space: pre-line; }
.dmm-status.dmm-warned { color: #ffb833; }
.dmm-fields { display: flex; flex-wrap: wrap; gap: 3px 6px; flex: none; }
.dmm-fields.dmm-off { opacity: 0.5; }
.dmm-field { display: flex; gap: 3px; align-items: center; flex: 1 1 60px; height: 21px; white-space: nowrap; }
.dmm-field input { flex: 1; height: 20px; width: 40px; padding: 0 3px; }
.dmm-field input[type=checkbox] { flex: none; width: 14px; height: 14px; }
.dmm-style, .dmm-prompt, .dmm-negative { flex: 1 1 100%; }
.dmm-text { flex: 1 1 90px; min-height: 60px; resize: none; font: 10px/14px monospace; white-space: pre; }
`;

app.registerExtension({
  name: "comfyui-dmm.RegionCanvas",

  getCustomWidgets: () => ({ [WIDGET]: regionList }),

  setup() {
    document.head.append(make("style", { textContent: STYLE }));
    api.addEventListener("executed", painted);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === "DMMStyleMix") nodeData.input.optional.region_list[1].widgetType = WIDGET;
    if (nodeData.name !== "DMMStyleMix" && nodeData.name !== "DMMRegion") return;
    const { onExecuted, onConfigure } = nodeType.prototype;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      const [report] = output?.[CANVAS] ?? [];
      if (report) this.dmmCanvas?.executed(report);
    };
    nodeType.prototype.onConfigure = function (saved) {
      onConfigure?.call(this, saved);
      if (this.dmmCanvas) opened(this, saved);
    };
  },

  nodeCreated(node) {
    if (node.comfyClass === "DMMRegion") addBox(node);
    if (node.dmmCanvas) added(node);
  },
});
