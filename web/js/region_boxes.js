// Boxes on a canvas: their list as text, where a pointer hits them, moving, resizing, snapping, order, undo. No DOM and no host.
//
// All sides are shares of the canvas, from its left upper corner. The list is that of dmm_core/region_list.py; a box is any object
// with x, y, w and h, and functions that change one give a copy that keeps its other keys.

export const SMALLEST = 0.01;
export const GRID = 0.05;
export const STEP = 0.01; // of the arrow keys
const LARGEST = 3;
const ON_CANVAS = 0.01; // of a box, at least, so that it can be found again

const round = (share, places = 4) => Math.round(share * 10 ** places) / 10 ** places + 0; // no -0
const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

// --- text -------------------------------------------------------------------------------------------------------------

// {regions, error}: the list, or why it cannot be shown. The server checks more (values of the other keys).
export function readRegions(text) {
  if (!text.trim()) return { regions: [], error: null };
  let list;
  try {
    list = JSON.parse(text);
  } catch (error) {
    return { regions: [], error: `This is not JSON: ${error.message}` };
  }
  if (!Array.isArray(list)) return { regions: [], error: "This is not a list: write [ ... ]" };
  for (const [i, region] of list.entries()) {
    const sides = ["x", "y", "w", "h"].filter((side) => !Number.isFinite(region?.[side]));
    if (sides.length) return { regions: [], error: `Region ${i + 1} lacks ${sides.join(", ")}, as numbers` };
    if (region.w <= 0 || region.h <= 0) return { regions: [], error: `Region ${i + 1} has no area: w and h must be above 0` };
    for (const key of ["style", "prompt", "negative"])
      if (typeof (region[key] ?? "") !== "string") return { regions: [], error: `The ${key} of region ${i + 1} is no text` };
  }
  return { regions: list, error: null };
}

// One region a line; "" for none.
export function writeRegions(regions) {
  return regions.length ? `[\n${regions.map((region) => JSON.stringify(region)).join(",\n")}\n]` : "";
}

// --- boxes ------------------------------------------------------------------------------------------------------------

export const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];

// Where a handle of a box is, as [x, y].
export function handlePoint(box, handle) {
  const along = (start, length, low, high) => start + length * (handle.includes(low) ? 0 : handle.includes(high) ? 1 : 0.5);
  return [along(box.x, box.w, "w", "e"), along(box.y, box.h, "n", "s")];
}

const holds = (box, x, y) => x >= box.x && x <= box.x + box.w && y >= box.y && y <= box.y + box.h;

// {index, part} under a point: a handle of the selected box, else "move" for the topmost box; null for none. The last box of a list
// lies on top. reach: {x, y}, how far off a handle may be hit.
export function hit(boxes, selected, x, y, reach) {
  const box = boxes[selected];
  if (box) {
    const near = ([hx, hy]) => Math.abs(x - hx) <= reach.x && Math.abs(y - hy) <= reach.y;
    const corners = [...HANDLES].sort((a, b) => b.length - a.length); // a corner wins where handles of a small box meet
    const part = corners.find((handle) => near(handlePoint(box, handle)));
    if (part) return { index: selected, part };
    if (holds(box, x, y)) return { index: selected, part: "move" };
  }
  for (let index = boxes.length - 1; index >= 0; index--) if (holds(boxes[index], x, y)) return { index, part: "move" };
  return null;
}

// Of usable size, rounded, and never quite off the canvas.
export function kept(box, places = 4) {
  const w = clamp(round(box.w, places), SMALLEST, LARGEST);
  const h = clamp(round(box.h, places), SMALLEST, LARGEST);
  const x = clamp(round(box.x, places), round(ON_CANVAS - w, places), 1 - ON_CANVAS);
  const y = clamp(round(box.y, places), round(ON_CANVAS - h, places), 1 - ON_CANVAS);
  return { ...box, x, y, w, h };
}

// A box after its part, a handle or "move", went by (dx, dy); an edge stops before the one across.
export function dragged(box, part, dx, dy) {
  if (part === "move") return { ...box, x: box.x + dx, y: box.y + dy };
  let { x, y, w, h } = box;
  if (part.includes("w")) [x, w] = [Math.min(x + dx, x + w - SMALLEST), Math.max(w - dx, SMALLEST)];
  if (part.includes("e")) w = Math.max(w + dx, SMALLEST);
  if (part.includes("n")) [y, h] = [Math.min(y + dy, y + h - SMALLEST), Math.max(h - dy, SMALLEST)];
  if (part.includes("s")) h = Math.max(h + dy, SMALLEST);
  return { ...box, x, y, w, h };
}

// The box between two points, in any order.
export const between = (x0, y0, x1, y1) => ({
  x: Math.min(x0, x1),
  y: Math.min(y0, y1),
  w: Math.max(Math.abs(x1 - x0), SMALLEST),
  h: Math.max(Math.abs(y1 - y0), SMALLEST),
});

// --- snapping ---------------------------------------------------------------------------------------------------------

// Where edges snap to: the canvas's borders and middle, and the edges of the other boxes, as {x: [...], y: [...]}.
export function snapLines(others) {
  return {
    x: [0, 0.5, 1, ...others.flatMap((box) => [box.x, box.x + box.w])],
    y: [0, 0.5, 1, ...others.flatMap((box) => [box.y, box.y + box.h])],
  };
}

// The least way from any of the places to a line within reach, or, without one, from the first place to the grid.
function pull(places, lines, reach) {
  const ways = places.flatMap((place) => lines.map((line) => line - place)).filter((way) => Math.abs(way) <= reach);
  if (ways.length) return ways.reduce((a, b) => (Math.abs(b) < Math.abs(a) ? b : a));
  return Math.round(places[0] / GRID) * GRID - places[0];
}

// A dragged box with the edges that moved on lines or on the grid.
export function snapped(box, part, lines, reach) {
  const edges = { w: box.x, e: box.x + box.w, n: box.y, s: box.y + box.h };
  if (part === "move")
    return dragged(box, part, pull([edges.w, edges.e], lines.x, reach.x), pull([edges.n, edges.s], lines.y, reach.y));
  const dx = part.includes("w") || part.includes("e") ? pull([edges[part.includes("w") ? "w" : "e"]], lines.x, reach.x) : 0;
  const dy = part.includes("n") || part.includes("s") ? pull([edges[part.includes("n") ? "n" : "s"]], lines.y, reach.y) : 0;
  return dragged(box, part, dx, dy);
}

// A point on a line or on the grid.
export const snappedPoint = (x, y, lines, reach) => [x + pull([x], lines.x, reach.x), y + pull([y], lines.y, reach.y)];

// --- lists ------------------------------------------------------------------------------------------------------------

// The boxes with one of them at another place of the order; the same order when there is no such place.
export function reordered(boxes, from, to) {
  if (to < 0 || to >= boxes.length) return boxes;
  const rest = boxes.filter((_, i) => i !== from);
  return [...rest.slice(0, to), boxes[from], ...rest.slice(to)];
}

// With a copy of a box on top, a little aside.
export function duplicated(boxes, index) {
  const box = boxes[index];
  const aside = (start, length) => (start + length + GRID <= 1 ? GRID : start >= GRID ? -GRID : GRID);
  return [...boxes, kept({ ...box, x: box.x + aside(box.x, box.w), y: box.y + aside(box.y, box.h) })];
}

// With the two halves of a box in its place, side by side (way "x") or one above the other ("y"); the first keeps its place in the order.
export function halved(boxes, index, way) {
  const box = boxes[index];
  const side = way === "x" ? "w" : "h";
  const half = box[side] / 2;
  const halves = [
    { ...box, [side]: half },
    { ...box, [way]: box[way] + half, [side]: half },
  ];
  return [...boxes.slice(0, index), ...halves.map((one) => kept(one)), ...boxes.slice(index + 1)];
}

// --- what to look at --------------------------------------------------------------------------------------------------

// The share of a box that lies on the canvas.
export function inside(box) {
  const on = (start, length) => Math.max(Math.min(start + length, 1) - Math.max(start, 0), 0);
  return (on(box.x, box.w) * on(box.y, box.h)) / (box.w * box.h);
}

// Words about a box that paints less than it seems to, as dmm_core/region_check.py has them. size: {width, height} in pixels, or null.
export function warnings(box, size) {
  const found = [];
  if (inside(box) < 0.5) found.push(`${Math.round(100 * (1 - inside(box)))}% of it lies outside of the canvas`);
  const { width, height } = size ?? { width: 512, height: 512 };
  if ((box.w * width) / 8 < 2 || (box.h * height) / 8 < 2) found.push("it is thinner than two latents (16 pixels)");
  return found;
}

// The hue of a style, 0 to 359, the same everywhere.
export function hue(style) {
  let code = 7;
  for (const letter of style) code = (code * 31 + letter.codePointAt(0)) % 360007;
  return (code * 137) % 360;
}

// --- undo -------------------------------------------------------------------------------------------------------------

const TOGETHER = 800; // milliseconds within which changes of one kind are one step: a held arrow key

export class History {
  past = [];
  future = [];

  // A change is made: ``before`` is what it was. kind: "" for a step of its own.
  record(before, kind = "", now = Date.now()) {
    const last = this.past.at(-1);
    if (kind && last?.kind === kind && now - last.time < TOGETHER && !this.future.length) last.time = now;
    else this.past.push({ value: before, kind, time: now });
    this.future = [];
  }

  // The value before the last change, or undefined.
  undo(current) {
    if (!this.past.length) return undefined;
    this.future.push(current);
    const { value } = this.past.pop();
    if (this.past.length) this.past.at(-1).kind = ""; // what comes next is a step of its own
    return value;
  }

  redo(current) {
    if (!this.future.length) return undefined;
    this.past.push({ value: current, kind: "", time: 0 });
    return this.future.pop();
  }
}
