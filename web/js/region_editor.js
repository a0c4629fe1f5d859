// The editor of a list of regions, or of one box: drawn, moved, resized, reordered, duplicated, deleted, undone, with mouse, touch or keys.
//
// What it edits is a text (region_boxes.js), which its source reads and writes (region_sources.js). Style names and prompts come from
// strangers' files and graphs: they are text, never markup. What can have the focus is an <input>, because the host leaves Ctrl+Z alone
// there.

import { app } from "../../../scripts/app.js";
import * as boxes from "./region_boxes.js";
import { canvasSize } from "./canvas_size.js";
import { element } from "./dom.js";
import { onBeat } from "./heartbeat.js";
import { NO_STYLE, onlyStyles, stylesFor } from "./model_styles.js";
import { RegionFields } from "./region_fields.js";
import { quoteName } from "./style_menu.js";
import { say } from "./words.js";

export const SHOWN = "dmm_canvas"; // the node's property: whether the canvas is shown
const ASPECT = "dmm_aspect"; // the node's property: "3:2", or none for the graph's
export const MARGIN = 4; // pixels that the host leaves around the element of a widget, on each side
const BAR = 24;
const HEIGHTS = { list: 394, one: 230, text: 100 };
const NEAR = { mouse: 7, pen: 10, touch: 18 }; // pixels within which a handle is hit
const SNAP = 6; // pixels

export const canvases = new Set(); // all that there are

const percent = (share) => `${Math.round(share * 1000) / 10}%`;

// source: {single, read() -> text, write(text), locked() -> why it cannot be edited, or ""; name(region) -> [style, prompt],
// ghosts() -> boxes that are shown and not edited}
export class RegionCanvas {
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
      element("input", { type: "button", value: label, title, onclick: action, "aria-label": title, "data-action": key });
    const list = this.single
      ? []
      : [
          button("add", "+", say("Add a region"), () => this.add()),
          button("duplicate", say("copy"), say("Duplicate (Ctrl+D)"), () => this.duplicate()),
          button("columns", "\u25eb", say("Split into two columns (|)"), () => this.split("x")),
          button("rows", "\u229f", say("Split into two rows (-)"), () => this.split("y")),
          button("delete", "\u2715", say("Delete (Delete)"), () => this.delete()),
          button("back", "\u2193", say("One down in the order (Page Down)"), () => this.reorder(-1)),
          button("front", "\u2191", say("One up in the order (Page Up)"), () => this.reorder(1)),
        ];
    this.opener = button("open", this.single ? say("Draw the box") : say("Draw regions"), say("Show the canvas"), () => this.setOpen(!this.open));
    this.aspect = element("input", {
      class: "dmm-aspect",
      placeholder: say("auto"),
      title: say("Sides of the canvas, such as 3:2; empty: as the latent behind this node"),
      onchange: () => this.setAspect(this.aspect.value),
      "aria-label": say("Sides of the canvas"),
      "data-action": "aspect",
    });
    this.tools = element(
      "div",
      { class: "dmm-tools", role: "toolbar", "aria-label": say("Canvas") },
      ...list,
      button("undo", "\u21b6", say("Undo (Ctrl+Z)"), () => this.undo()),
      button("redo", "\u21b7", say("Redo (Ctrl+Shift+Z)"), () => this.redo()),
      this.aspect,
      button("picture", "\u25a3", say("Show or hide the picture"), () => this.togglePicture()),
      ...(this.single ? [] : [button("text", "{ }", say("Show the list as text"), () => this.toggleText())]),
    );
    this.image = element("img", { class: "dmm-picture", alt: "", draggable: "false", onload: () => this.layout() });
    this.image.hidden = true;
    this.ghostLayer = element("div", { class: "dmm-layer" });
    this.boxLayer = element("div", { class: "dmm-layer" });
    this.handleLayer = element("div", { class: "dmm-layer" });
    const hatches = ["top", "bottom", "left", "right"].map((side) => element("div", { class: `dmm-hatch dmm-${side}` }));
    this.paper = element("div", { class: "dmm-paper" }, this.image, this.ghostLayer, this.boxLayer, ...hatches, this.handleLayer);
    const keys = say("Arrows move it, Shift and arrows resize it, Delete deletes it.");
    this.stage = element("div", {
      class: "dmm-stage",
      title: this.single
        ? say("Drag the box, its edges, or draw a new one. Alt: no snapping.")
        : say("Drag on free space to draw a region, on a region to move it. Shift: draw over regions. Alt: no snapping."),
      role: "group",
      "aria-label": `${this.single ? say("The box on the canvas.") : say("Regions on the canvas.")} ${keys}`,
    });
    this.stage.append(this.paper);
    this.status = element("div", { class: "dmm-status", role: "status" });
    this.fields = this.single ? null : new RegionFields((changes) => this.setFields(changes));
    this.text = element("textarea", {
      class: "dmm-text",
      spellcheck: "false",
      onchange: () => this.typed(),
      "aria-label": say("The list of regions as JSON"),
    });
    this.body = element("div", { class: "dmm-body" }, this.tools, this.stage, this.status, this.fields?.element ?? "", this.text);
    this.root = element("div", { class: "dmm-canvas" }, this.opener, this.body);
    this.listen();
    new ResizeObserver(() => this.layout()).observe(this.stage);
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

  // As a style field takes them.
  styleNames() {
    return (stylesFor(this.node) ?? onlyStyles() ?? []).map(quoteName).filter(Boolean);
  }

  // --- what the user does

  newRegion(box) {
    const last = this.regions[this.selected] ?? this.regions.at(-1);
    const style = last?.style ?? this.styleNames()[0] ?? NO_STYLE;
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

  // Of the selected region.
  setFields(changes) {
    if (!this.editable() || this.selected < 0 || !Object.keys(changes).length) return this.render();
    this.commit(this.regions.map((region, i) => (i === this.selected ? { ...region, ...changes } : region)));
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
    else if (key === "Enter" && !this.single) this.fields.inputs.style.focus();
    else if (key === "Escape") this.endDrag();
    else return false;
    return true;
  }

  // --- drawing

  get open() {
    return Boolean(this.node.properties?.[SHOWN]);
  }

  setOpen(open) {
    this.node.properties[SHOWN] = open;
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
    const label = this.single ? say("Draw the box") : say("Draw regions");
    this.opener.value = `${troubles.length && !open ? "\u26a0 " : ""}${label} ${open ? "\u25b4" : "\u25be"}`;
    this.opener.title = [open ? say("Hide the canvas") : say("Show the canvas"), ...(open ? [] : troubles)].join("\n");
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
    this.fields?.show(this.regions[this.selected], this.selected, this.editable(), this.styleNames());
    this.text.hidden = !this.textShown();
    if (document.activeElement !== this.text || !this.error) this.text.value = this.current;
    this.layout();
  }

  renderBoxes(layer, regions, pixels, ghosts) {
    while (layer.children.length > regions.length) layer.lastChild.remove();
    while (layer.children.length < regions.length) layer.append(this.newBox(layer.children.length, ghosts));
    for (const [i, region] of regions.entries()) {
      const shown = layer.children[i];
      const [style, prompt] = this.source.name(region);
      const warned = boxes.warnings(region, pixels);
      const { x, y, w, h } = region;
      Object.assign(shown.style, { left: percent(x), top: percent(y), width: percent(w), height: percent(h) });
      shown.style.setProperty("--dmm-hue", boxes.hue(style));
      const [name, words, mark, input] = shown.children;
      name.textContent = this.single || ghosts ? style : `${i + 1} ${style}`;
      words.textContent = prompt.length > 80 ? `${prompt.slice(0, 79)}\u2026` : prompt;
      mark.hidden = !warned.length;
      shown.classList.toggle("dmm-selected", !ghosts && i === this.selected);
      if (ghosts) continue;
      const place = `left ${percent(x)}, top ${percent(y)}, width ${percent(w)}, height ${percent(h)}`;
      const label = [this.single ? say("Box") : say("Region {number} of {count}", { number: i + 1, count: regions.length }), style, prompt, place, ...warned];
      input.setAttribute("aria-label", label.filter(Boolean).join(", "));
      input.setAttribute("aria-pressed", String(i === this.selected));
    }
  }

  newBox(index, ghost) {
    const box = element(
      "div",
      { class: ghost ? "dmm-box dmm-ghost" : "dmm-box" },
      element("span", { class: "dmm-name" }),
      element("span", { class: "dmm-words" }),
      element("span", { class: "dmm-mark", "aria-hidden": "true" }, "\u26a0"),
    );
    if (!ghost) {
      const keys = this.single ? "ArrowLeft Shift+ArrowLeft" : "ArrowLeft Shift+ArrowLeft Delete Control+D PageUp PageDown | -";
      const input = element("input", { type: "button", value: "", "aria-keyshortcuts": keys });
      input.addEventListener("focus", () => {
        if (this.selected === index) return;
        this.selected = index;
        this.render();
      });
      box.append(input);
    }
    return box;
  }

  renderHandles(box) {
    const shown = box && this.editable() ? boxes.HANDLES : [];
    while (this.handleLayer.children.length > shown.length) this.handleLayer.lastChild.remove();
    while (this.handleLayer.children.length < shown.length) this.handleLayer.append(element("div", { class: "dmm-handle" }));
    for (const [i, handle] of shown.entries()) {
      const [x, y] = boxes.handlePoint(box, handle);
      Object.assign(this.handleLayer.children[i].style, { left: percent(x), top: percent(y) });
    }
  }

  // What to look at, in words: a text that cannot be read, boxes that paint little, what the server said.
  troubles(pixels) {
    const own = this.regions.flatMap((region, i) =>
      boxes.warnings(region, pixels).map((text) => `${this.single ? say("Box") : say("Region {number}", { number: i + 1 })}: ${text}`),
    );
    return [this.error, this.source.advice?.(this.regions), ...own, ...this.report].filter(Boolean);
  }

  renderStatus(troubles) {
    const box = this.regions[this.selected];
    const lines = [this.source.locked(), ...troubles].filter(Boolean);
    const place = box ? `x ${box.x}, y ${box.y}, ${box.w} \u00d7 ${box.h}` : "";
    const hint = this.regions.length ? "" : say("Drag here to draw a region");
    const text = lines.length ? `\u26a0 ${lines.join("\n\u26a0 ")}` : place || hint;
    if (this.status.textContent !== text) this.status.textContent = text;
    this.status.title = text;
    this.status.classList.toggle("dmm-warned", lines.length > 0);
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

  // What the server's node said after a run (nodes/region_canvas.py), and the picture's URL.
  executed({ warnings, picture }) {
    this.report = warnings;
    this.picture.own = picture;
    this.render();
  }
}
