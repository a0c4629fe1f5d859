// The text form of styles, read as dmm_core/style_value.py reads it, so that a wrong name is seen before a run. No page and no
// host is needed here: tests/core/test_style_text.py runs this file and the Python one on the same texts.

export const NO_STYLE = "none";

// What Python's str.isspace and its regular expressions count as space; JavaScript's own \s differs a little.
const SPACE = String.raw`[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]`;
const NUMBER = String.raw`[+-]?(?:\p{Nd}+\.?\p{Nd}*|\.\p{Nd}+)(?:[eE][+-]?\p{Nd}+)?`;
const regex = (text) => new RegExp(text.replaceAll("~", SPACE).replaceAll("#", NUMBER), "su");
const TIME = regex("^~*(#)~*%~*(?:-~*(#)~*%~*)?:(.*)$");
const WEIGHT = regex("^(.*):~*(#)~*$");
const EDGES = regex("^~*(.*?)~*$");
const ONE_SPACE = regex("^~$");

export const strip = (text) => EDGES.exec(text)[1];

// "0.5" or "٠.٥", as Python's float reads them.
function toNumber(text) {
  return Number(text.replace(/\p{Nd}/gu, digitOf));
}

function digitOf(letter) {
  const code = letter.codePointAt(0);
  let zero = code; // Unicode keeps the ten digits of a script together, from 0 on
  while (/^\p{Nd}$/u.test(String.fromCodePoint(zero - 1))) zero -= 1;
  return String((code - zero) % 10);
}

// A number for people, with at most six digits.
const short = (number) => (Number.isFinite(number) ? String(Number(number.toPrecision(6))) : number > 0 ? "inf" : "-inf");

// --- reading ----------------------------------------------------------------------------------------------------------

// A text at its separators, except inside quotes; a quote counts at the start of a name only (the cat's eye).
export function split(text, separators) {
  const pieces = [""];
  let quote = "";
  let fresh = true;
  for (const letter of text) {
    if (quote) {
      if (letter === quote) quote = "";
    } else if (fresh && `"'`.includes(letter)) {
      quote = letter;
    } else if (separators.includes(letter)) {
      pieces.push("");
      fresh = true;
      continue;
    }
    if (!ONE_SPACE.test(letter)) fresh = ",;:".includes(letter);
    pieces[pieces.length - 1] += letter;
  }
  if (quote) throw new Error(`a quote ${quote} is opened and not closed in '${strip(text)}'`);
  return pieces;
}

const unquote = (name) =>
  name.length >= 2 && name[0] === name.at(-1) && `"'`.includes(name[0]) ? name.slice(1, -1) : name;

// "ink:0.7, pen:0.3" -> Map of name to share; the shares sum to 1.
export function parseShares(text) {
  const shares = new Map();
  for (const entry of split(text, ",")) {
    if (!strip(entry)) throw new Error(`a style's name is missing in '${strip(text)}': write names with commas between them`);
    const weighted = WEIGHT.exec(entry);
    const name = unquote(strip(weighted ? weighted[1] : entry));
    if (!name) throw new Error(`a style's name is missing in '${strip(entry)}': write it as name:0.5`);
    if (shares.has(name)) throw new Error(`style '${name}' is given twice in '${strip(text)}': add its shares up`);
    shares.set(name, weighted ? toNumber(weighted[2]) : 1);
  }
  for (const [name, share] of shares) {
    if (!Number.isFinite(share)) throw new Error(`the share of style '${name}' is ${short(share)}: it must be a number`);
  }
  const total = [...shares.values()].reduce((a, b) => a + b, 0);
  if (total <= 1e-9) {
    const names = [...shares.keys()].join(", ");
    throw new Error(
      `the shares of ${names} sum to ${short(total)}: a blend needs a sum above 0 (write '${NO_STYLE}' for no style)`,
    );
  }
  return new Map([...shares].map(([name, share]) => [name, share / total]));
}

const percent = (share) => `${Math.round(100 * share)}%`;

// A style from its text -> {first: Map of shares, then: [{start, end, shares}, ...]}, times from 0 to 1. Throws an Error for what
// the server would refuse too.
export function parseStyle(text) {
  const segments = split(text, ";\n").filter(strip);
  if (!segments.length) {
    throw new Error("the style is empty: write a name, such as ink, or shares, such as ink:0.7, pen:0.3");
  }
  let first = null;
  const then = [];
  segments.forEach((segment, number) => {
    const timed = TIME.exec(segment);
    if (!timed) {
      const said = strip(segment);
      if (number) throw new Error(`'${said}' lacks the moment it begins at: write it as 50%: ${said}`);
      first = parseShares(segment);
      return;
    }
    const start = toNumber(timed[1]) / 100;
    const end = timed[2] === undefined ? start : toNumber(timed[2]) / 100;
    if (!(0 <= start && start <= end && end <= 1)) {
      throw new Error(`'${strip(segment)}' does not begin and end between 0% and 100%`);
    }
    const shares = parseShares(timed[3]);
    if (!first && end === 0) first = shares;
    else then.push({ start, end, shares });
  });
  let before = 0;
  for (const { start, end } of then) {
    if (start < before) {
      throw new Error(
        `a change of style from ${percent(start)} to ${percent(end)} is not between ${percent(before)}, where the one before ` +
          "ends, and 100%: give the changes in the order of the steps",
      );
    }
    before = end;
  }
  return { first: first ?? new Map([[NO_STYLE, 1]]), then };
}

// Every name in a text.
export function namesIn(text) {
  const { first, then } = parseStyle(text);
  return [...new Set([first, ...then.map((change) => change.shares)].flatMap((shares) => [...shares.keys()]))];
}

// --- names ------------------------------------------------------------------------------------------------------------

// As Python's casefold, for the letters that people use.
const fold = (name) => strip(name).toUpperCase().toLowerCase().replaceAll("\u03c2", "\u03c3");

// The style of a model that a user means (find_style in dmm_core/style_value.py); undefined if there is none, or more than one.
export function findStyle(known, wanted) {
  if (known.includes(wanted)) return wanted;
  const alike = known.filter((name) => fold(name) === fold(wanted));
  if (alike.length) return alike.length === 1 ? alike[0] : undefined;
  const index = /^[0-9]{1,4}$/.test(strip(wanted)) ? Number(strip(wanted)) : Infinity;
  const isNumber = (name) => /^\p{Nd}+$/u.test(strip(name));
  return known.some(isNumber) ? undefined : known[index];
}

// A style's name as the server reads it back (quote_name in dmm_core/style_value.py); null if no text can hold it.
export function quoteName(name) {
  if (!/[,;%\n"']/.test(name) && name === strip(name) && !WEIGHT.test(name)) return name;
  const quote = ['"', "'"].find((q) => !name.includes(q));
  return quote ? `${quote}${name}${quote}` : null;
}

// --- writing ----------------------------------------------------------------------------------------------------------

export const isEmpty = (text) => !strip(text) || strip(text) === NO_STYLE;

// A text with one more style: blended with the last one, or where the text ends before a name. style: quoted where needed.
export function withStyle(text, style) {
  if (isEmpty(text)) return style;
  const waits = /[,;]$|%\s*:$/.test(text.trimEnd());
  return `${text.trimEnd()}${waits ? " " : ", "}${style}`;
}

// A text with one more line.
export const withLine = (text, style) => (strip(text) ? `${text.trimEnd()}\n${style}` : style);

// A text whose last style has `share` (0..1) of the style called `name` in it, and the rest of what it was in the old proportions.
export function withShare(text, name, share) {
  if (isEmpty(text)) return quoteName(name);
  let pieces, shares, time;
  try {
    pieces = split(text, ";\n").filter(strip);
    const timed = TIME.exec(pieces.at(-1));
    shares = parseShares(timed ? timed[3] : pieces.at(-1));
    time = timed ? pieces.at(-1).slice(0, pieces.at(-1).length - timed[3].length) : "";
  } catch {
    return withStyle(text, quoteName(name)); // what the user has written stays, and is marked as it was
  }
  shares.delete(name);
  const rest = [...shares.values()].reduce((a, b) => a + b, 0);
  const parts = rest > 1e-9 ? [...shares].map(([other, part]) => [other, ((1 - share) * part) / rest]) : [];
  parts.push([name, parts.length ? share : 1]);
  const written = parts.length === 1 ? quoteName(name) : parts.map(([n, p]) => `${quoteName(n)}:${Number(p.toPrecision(3))}`).join(", ");
  const before = pieces.slice(0, -1).map((piece) => piece.trim());
  return [...before, `${time.trim()}${time ? " " : ""}${written}`].join("; ");
}
