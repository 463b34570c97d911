"use strict";
/* One state, one function that changes it, and a function for each part of the page that draws what the state says. */
const started = performance.now();
const at = (id) => document.getElementById(id);
window.addEventListener("error", (event) => { document.documentElement.dataset.error = event.message; });
const data = JSON.parse(at("data").textContent);
const LEVELS = 254;

/* ---- values */

const KINDS = { u1: Uint8Array, i4: Int32Array, f4: Float32Array };

/* An array as it was packed: bytes are numbers with the low byte first, as in every browser. */
function array(told) {
  if (told.values_) return told;
  const bytes = Uint8Array.from(atob(told.data), (c) => c.charCodeAt(0));
  told.values_ = new KINDS[told.kind](bytes.buffer);
  told.data = null;
  return told;
}

/* The numbers of an array at all but its last index. */
function row(told, ...index) {
  const { shape, values_ } = array(told);
  let place = 0;
  index.forEach((n, dim) => { place = place * shape[dim] + n; });
  const size = shape.slice(index.length).reduce((a, b) => a * b, 1);
  return values_.subarray(place * size, (place + 1) * size);
}

const number = (value) => Number.isNaN(value) ? "none" : Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(3);
const weight = (level, most) => level > LEVELS ? NaN : level / LEVELS * most;
const share = (value) => Number.isNaN(value) ? "none" : `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
const word = (id) => data.words[id] ?? `#${id}`;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/* ---- what is chosen */

const state = { pass: data.passes.length - 1, example: 0, layer: 0, attention: 0, map: 0, head: 0, query: Infinity, key: 0, row: Infinity };
let of = "token";
let hovered = null; /* the cell of the pattern that the pointer is on: shown, and not chosen */
const within = (value, size) => Math.max(0, Math.min(Number.isFinite(value) ? value : size - 1, size - 1));
const pass = () => data.passes[state.pass];
const layer = () => data.layers[state.layer];
const block = () => layer().attentions[state.attention];
const pattern = () => block() === undefined ? { why: "This layer has no attention." } : pass().patterns[block()];

/* The tokens of a stream, from the beginning of the text to the end of the pass; nothing where it has numbers. */
const text = (stream) => stream === null || stream === undefined ? null : pass().tokens[stream]?.[state.example] ?? null;
const start = (stream) => stream === null || stream === undefined ? 0 : pass().starts[stream] ?? 0;

/* What the positions of a pass are called, as far as the text has as many. */
function ownLabels(stream, count) {
  const tokens = text(stream), from = start(stream);
  const fits = tokens && tokens.length - from === count;
  return Array.from({ length: count }, (_, n) => fits ? tokens[from + n] : `${from + n}`);
}

function keyLabels(stream, count) {
  const tokens = text(stream);
  return Array.from({ length: count }, (_, n) => tokens && tokens.length === count ? tokens[n] : `${n}`);
}

/* The pattern that is chosen with what stands at its rows and columns; windows have positions of their own. */
function chosen() {
  const told = pattern();
  if (told.why) return told;
  const [maps, heads, queries, keys] = told.shape, about = data.attentions[block()];
  const windows = maps !== pass().examples;
  const index = windows ? within(state.map, maps) : within(state.example, maps);
  const numbers = (count) => Array.from({ length: count }, (_, n) => `${n}`);
  return {
    maps, heads, queries, keys, windows, index, most: told.most, told,
    rows: windows ? numbers(queries) : ownLabels(about.own, queries),
    columns: windows ? numbers(keys) : keyLabels(about.keys, keys),
  };
}

/* How many positions the layer's stream has in this pass. */
function positions() {
  const told = pass().norms[state.layer], found = chosen();
  if (!told.why && told.stream.resid_pre) return told.stream.resid_pre.shape[1];
  return found.why ? pass().tokens[layer().stream ?? 0]?.[state.example]?.length ?? 1 : found.queries;
}

/* Take what is new, keep all within what there is, and draw. */
function choose(changes) {
  const before = { ...state };
  hovered = null;
  Object.assign(state, changes);
  state.pass = within(state.pass, data.passes.length);
  state.example = within(state.example, pass().examples);
  state.layer = within(state.layer, data.layers.length);
  state.attention = within(state.attention, layer().attentions.length);
  const found = chosen();
  if (!found.why) {
    state.map = within(state.map, found.maps);
    state.head = within(state.head, found.heads);
    state.key = within(state.key, found.keys);
  }
  if (!Number.isFinite(state.query)) state.query = pass().last[state.example] ?? Infinity;  // no padding
  state.query = within(state.query, positions());
  if (!pass().lens.why) state.row = within(state.row, pass().lens.rows.length);
  draw(before, found);
  remember();
}

const SAVED = ["pass", "example", "layer", "attention", "map", "head", "query", "key", "row"];

function remember() {
  const told = SAVED.filter((name) => Number.isFinite(state[name])).map((name) => `${name}=${state[name]}`).join("&");
  try {
    if (location.protocol !== "about:") history.replaceState(null, "", `#${told}`);
  } catch { /* a page in a frame has no address of its own */ }
}

function recalled() {
  const told = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries(SAVED.filter((name) => /^\d+$/.test(told.get(name) ?? "")).map((name) => [name, Number(told.get(name))]));
}

/* ---- drawing */

let first = true, lensOf = "";

function draw(before, found) {
  const changed = (...names) => first || names.some((name) => state[name] !== before[name]);
  const focused = ["tokens", "layers", "heads", "lens"].find((id) => at(id).contains(document.activeElement));
  if (changed("pass", "example")) drawChoices();
  drawTokens(found);
  drawLayers();
  if (changed("pass", "example", "layer", "attention", "map", "head")) drawHeads(found);
  drawPattern(found);
  if (changed("pass", "example", "layer", "query")) drawMemories();
  drawLens();
  if (changed("layer")) drawProofs();
  first = false;
  if (focused) at(focused).querySelector('[tabindex="0"]')?.focus({ preventScroll: true });
  for (const id of ["tokens", "layers", "heads", "lens"]) show(at(id));
}

/* Scroll what is chosen into its own box, and not the page. */
function show(part) {
  const one = part.querySelector('[aria-selected="true"]'), box = part.closest(".scroll") ?? part;
  if (!one || box.scrollHeight <= box.clientHeight && box.scrollWidth <= box.clientWidth) return;
  const inner = one.getBoundingClientRect(), outer = box.getBoundingClientRect(), [edge, top] = part.id === "lens" ? [70, 28] : [0, 28];
  if (inner.top < outer.top + top) box.scrollTop -= outer.top + top - inner.top;
  if (inner.bottom > outer.bottom) box.scrollTop += inner.bottom - outer.bottom + 4;
  if (part.id !== "lens") return;
  if (inner.left < outer.left + edge) box.scrollLeft -= outer.left + edge - inner.left;
  if (inner.right > outer.right) box.scrollLeft += inner.right - outer.right + 4;
}

function options(select, labels, value) {
  select.replaceChildren(...labels.map((label, n) => make("option", { value: n }, label)));
  select.value = value;
  select.parentElement.hidden = labels.length < 2;
}

const names = (count) => Array.from({ length: count }, (_, n) => `${n}`);

function drawChoices() {
  options(at("pass"), data.passes.map((one) => `${one.number}`), state.pass);
  options(at("example"), names(pass().examples), state.example);
}

const heat = (value) => `rgba(${style("--heat")}, ${Math.sqrt(Math.min(1, Math.max(0, value)))})`;
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* The text: what the query sees of it, in colours. */
function drawTokens(found) {
  const about = block() === undefined ? null : data.attentions[block()];
  const own = ownLabels(layer().stream, positions());
  const self = about && about.own === about.keys && !found.why && !found.windows;
  const query = hovered?.query ?? state.query, from = start(layer().stream);
  const weights = found.why ? null : row(found.told, found.index, state.head, within(query, found.queries));
  const fits = self && found.keys === own.length + from;
  const base = `rgb(${style("--heat")})`;
  const past = (text(layer().stream) ?? []).slice(0, from);
  at("tokens").replaceChildren(...[...past, ...own].map((token, k) => {
    const n = k - past.length, place = past.length ? k : from + n;
    const level = fits && place < found.keys ? weight(weights[place], found.most) : null;
    const title = level === null ? `${place}` : `${place}, weight ${number(level)}`;
    const choice = { role: "option", "aria-selected": n === query, tabindex: n === query ? 0 : -1, "data-n": n };
    const node = make("span", { class: n < 0 ? "token past" : "token", title, ...(n < 0 ? {} : choice) }, token);
    if (level) node.style.background = `color-mix(in srgb, ${base} ${(60 * Math.sqrt(Math.min(1, level))).toFixed(0)}%, transparent)`;
    return node;
  }));
  at("strip-note").textContent = self
    ? `Chosen is the query; colours are what head ${state.head} of layer ${layer().name} takes of each token for it.`
    : "Chosen is the token that the parts below speak of.";
}

const COLUMNS = ["resid_pre", "resid_mid", "resid_post"];

function normOf(told) {
  const values = row(told, state.example);
  return of === "mean" ? values.reduce((a, b) => a + b, 0) / values.length : values[within(state.query, values.length)];
}

function drawLayers() {
  const every = pass().norms.map((told) => told.why ? told : {
    stream: COLUMNS.map((name) => told.stream[name] ? normOf(told.stream[name]) : null),
    writes: told.writes.map((one) => ({ kinds: one.kinds, norm: normOf(one.norm) })),
  });
  const columns = Math.max(0, ...every.map((one) => one.why ? 0 : one.writes.length));
  const kinds = names(columns).map((_, n) => [...new Set(every.flatMap((one) => one.writes?.[n]?.kinds ?? []))].join(" + ") || "write");
  const most = (values) => Math.max(1e-30, ...values.filter((value) => Number.isFinite(value)));
  const tops = [most(every.flatMap((one) => one.stream ?? [])), most(every.flatMap((one) => one.writes?.map((w) => w.norm) ?? []))];
  const cell = (value, top, colour) => {
    if (value === null || value === undefined) return make("td", {}, "–");
    const bar = make("span", { class: "bar" });
    bar.style.cssText = `width:${Math.max(0, Math.min(100, 100 * value / top)).toFixed(1)}%;background:var(${colour})`;
    return make("td", {}, number(value), bar);
  };
  const rows = every.map((one, n) => {
    const cells = one.why ? [make("td", { class: "why", colspan: 3 + columns }, one.why)] : [
      ...one.stream.map((value) => cell(value, tops[0], "--stream")),
      ...names(columns).map((_, k) => cell(one.writes[k]?.norm, tops[1], `--${one.writes[k]?.kinds[0] ?? "stream"}`))];
    return make("tr", { "aria-selected": n === state.layer, tabindex: n === state.layer ? 0 : -1, "data-n": n, title: data.layers[n].kind,
      "aria-label": `layer ${data.layers[n].name}: ${data.layers[n].kind}` }, make("th", { scope: "row" }, data.layers[n].name), ...cells);
  });
  const heads = ["layer", ...COLUMNS, ...kinds.map((kind) => `${kind} writes`)].map((name) => make("th", { scope: "col" }, name));
  at("layers").replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
}

/* A pattern with one pixel a weight. */
function pixels(canvas, levels, queries, keys) {
  const ink = style("--heat").split(",").map(Number);
  canvas.width = keys;
  canvas.height = queries;
  const context = canvas.getContext("2d"), image = context.createImageData(keys, queries);
  levels.forEach((level, n) => {
    image.data.set(level > LEVELS ? [150, 150, 150, 90] : [...ink, 255 * Math.sqrt(level / LEVELS)], 4 * n);
  });
  context.putImageData(image, 0, 0);
}

function drawHeads(found) {
  const blocks = layer().attentions.map((n) => data.attentions[n]);
  options(at("layer"), data.layers.map((one) => one.name), state.layer);
  options(at("attention"), blocks.map((one, n) => `${n}: ${one.kind}, ${one.scope}`), state.attention);
  options(at("map"), found.windows ? names(found.maps) : [], state.map);
  at("heads-title").textContent = `Heads of layer ${layer().name}`;
  const about = blocks[state.attention];
  at("heads-note").textContent = about ? `${about.scope}: ${about.kind}-attention, ${about.size}; ${about.proof}` : "";
  at("pattern-box").hidden = at("pattern-title").hidden = at("legend").parentElement.hidden = at("strongest").hidden = Boolean(found.why);
  if (found.why) return at("heads").replaceChildren(make("p", { class: "why" }, found.why));
  at("heads").replaceChildren(...names(found.heads).map((name, n) => {
    const canvas = make("canvas", { "aria-hidden": true });
    pixels(canvas, row(found.told, found.index, n), found.queries, found.keys);
    return make("div", { class: "head", role: "option", "aria-selected": n === state.head, tabindex: n === state.head ? 0 : -1,
      "data-n": n, "aria-label": `head ${n}` }, canvas, make("span", {}, `head ${n}`));
  }));
  at("legend").replaceChildren(...[0, 0.01, 0.1, 0.5, 1].flatMap((value) => {
    const box = make("i");
    box.style.background = heat(value);
    return [box, `${value}`];
  }));
}

let cell = 1, margins = [0, 0];

function drawPattern(found) {
  if (found.why) return at("told").textContent = "";
  const { query, key } = hovered ?? { query: within(state.query, found.queries), key: state.key };
  const levels = row(found.told, found.index, state.head);
  const canvas = at("pattern"), wide = at("pattern-box").clientWidth || 360, ratio = window.devicePixelRatio || 1;
  const room = wide < 500 ? 0 : 96;
  cell = Math.max(1, Math.min(30, (wide - room) / found.keys, 640 / found.queries));
  cell = cell > 4 ? Math.floor(cell) : cell;
  const labelled = room && cell >= 9;
  margins = labelled ? [96, 84] : [0, 0];
  const [width, height] = [margins[0] + cell * found.keys + 1, margins[1] + cell * found.queries + 1];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.width = `${width}px`;
  const context = canvas.getContext("2d"), small = document.createElement("canvas");
  context.scale(ratio, ratio);
  pixels(small, levels, found.queries, found.keys);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, ...margins, cell * found.keys, cell * found.queries);
  context.strokeStyle = style("--line");
  context.strokeRect(margins[0] + .5, margins[1] + .5, cell * found.keys, cell * found.queries);
  context.strokeStyle = style("--focus");
  context.lineWidth = 1.5;
  context.strokeRect(margins[0], margins[1] + query * cell, cell * found.keys, cell);
  context.strokeRect(margins[0] + key * cell, margins[1] + query * cell, cell, cell);
  if (labelled) drawLabels(context, found, query, key);
  tell(found, query, key, levels);
}

function drawLabels(context, found, query, key) {
  context.font = `${Math.min(12, cell - 1)}px Helvetica, Arial, sans-serif`;
  context.textBaseline = "middle";
  const short = (label) => label.length > 13 ? `${label.slice(0, 12)}…` : label;
  context.textAlign = "right";
  found.rows.forEach((label, n) => {
    context.fillStyle = style(n === query ? "--focus" : "--soft");
    context.fillText(short(label), margins[0] - 5, margins[1] + (n + .5) * cell, margins[0] - 8);
  });
  context.textAlign = "left";
  found.columns.forEach((label, n) => {
    context.save();
    context.translate(margins[0] + (n + .5) * cell, margins[1] - 5);
    context.rotate(-Math.PI / 2);
    context.fillStyle = style(n === key ? "--focus" : "--soft");
    context.fillText(short(label), 0, 0, margins[1] - 8);
    context.restore();
  });
}

/* The pattern in words: the cell that is chosen, and the keys that the query takes most of. */
function tell(found, query, key, levels) {
  const weights = Array.from(levels.subarray(query * found.keys, (query + 1) * found.keys), (level) => weight(level, found.most));
  const label = (n) => `${n} “${found.columns[n]}”`;
  at("pattern-title").textContent = `Layer ${layer().name}, head ${state.head}: what each query takes of each key`;
  const from = found.windows ? 0 : start(data.attentions[block()].own);
  at("told").textContent = `query ${from + query} “${found.rows[query]}” takes ${number(weights[key])} of key ${label(key)}`;
  const order = weights.map((value, n) => [value, n]).filter(([value]) => value > 0).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, 5);
  at("strongest").textContent = `Most of: ${order.map(([value, n]) => `${label(n)} ${number(value)}`).join(", ") || "nothing"}`;
  at("pattern").setAttribute("aria-label", `Pattern of head ${state.head} in layer ${layer().name}`);
}

function words(ids, gains) {
  return Array.from(ids).flatMap((id, n) => [
    make("span", { class: "said" }, make("bdi", { class: "word" }, word(id)), " ", make("span", { class: "gain" }, gains(n))), " "]);
}

function drawMemories() {
  const own = ownLabels(layer().stream, positions()), rows = [], notes = [];
  for (const n of layer().mlps) {
    const told = pass().mlps[n], about = data.mlps[n], said = data.promoted[n];
    notes.push(`${about.scope}: ${about.size}; ${about.proof}.${said.why ? ` ${said.why}` : ""}`);
    if (told.why) {
      rows.push(make("tr", {}, make("td", { class: "why", colspan: 3 }, told.why)));
      continue;
    }
    const place = within(state.query, told.units.shape[1]);
    const units = row(told.units, state.example, place), values = row(told.values, state.example, place);
    const most = Math.max(1e-30, ...values.map(Math.abs));
    units.forEach((unit, k) => {
      const bar = make("span", { class: "bar" });
      bar.style.cssText = `width:${(100 * Math.abs(values[k]) / most).toFixed(1)}%;background:var(--memory)`;
      const key = said.why ? -1 : array(said.keys).values_.indexOf(values[k] < 0 ? -1 - unit : unit);
      const cells = key < 0 ? ["–"] : words(row(said.words, key), (m) => `+${number(row(said.gains, key)[m])}`);
      rows.push(make("tr", {}, make("th", { scope: "row" }, `${unit}`), make("td", {}, number(values[k]), bar), make("td", { class: "words" }, ...cells)));
    });
  }
  at("memories-title").textContent = `Memories of layer ${layer().name} at “${own[within(state.query, own.length)]}”`;
  at("memories-note").textContent = notes.length ? `The largest coefficients, and the ${data.of} that each value, with the sign of its `
    + `coefficient, promotes: logits beside those of an empty stream. ${notes.join(" ")}` : "This layer has no memories.";
  const heads = ["memory", "coefficient", `${data.of} promoted`].map((name) => make("th", { scope: "col" }, name));
  at("memories").className = "bars";
  at("memories").replaceChildren(...(rows.length ? [make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)] : []));
}

/* The table is made once for each pass and example; a choice only moves a mark. */
function drawLens() {
  const told = pass().lens, which = `${state.pass} ${state.example}`;
  at("lens-note").textContent = told.why ? "" : `The most probable ${data.of === "words" ? "next word" : "class"} at each token if the stream ended after a layer, `
    + "through the model's own final norm and unembedding; the last row is what the model says. Softmax of the logits, in per cent.";
  at("lens-box").hidden = Boolean(told.why);
  if (told.why) {
    at("lens-told").textContent = told.why;
    return;
  }
  const columns = told.words.shape[2], last = data.passes[0].starts.length - 1;
  const own = told.whole ? ["the whole example"] : ownLabels(last, columns);
  if (lensOf !== which) makeLens(told, columns, own);
  lensOf = which;
  at("lens").querySelectorAll('td[tabindex="0"]').forEach((old) => { old.tabIndex = -1; old.removeAttribute("aria-selected"); });
  const column = within(state.query, columns), mark = at("lens").tBodies[0].rows[state.row]?.cells[column + 1];
  if (mark) { mark.tabIndex = 0; mark.setAttribute("aria-selected", true); }
  const ids = row(told.words, state.row, state.example, column), shares = row(told.shares, state.row, state.example, column);
  const place = /^\d/.test(told.rows[state.row]) ? `after layer ${told.rows[state.row]}` : told.rows[state.row].replace("before", "before layer");
  const where = told.whole ? "of the whole example" : `at ${start(last) + column} “${own[column]}”`;
  at("lens-told").replaceChildren(`${place}, ${where}: `, ...words(ids, (n) => share(shares[n])));
}

function makeLens(told, columns, own) {
  const label = (name) => make("th", { scope: "col", title: name }, make("div", { class: "column" }, make("bdi", { class: "word" }, name)));
  const base = `rgb(${style("--heat")})`;
  const rows = told.rows.map((name, r) => make("tr", {}, make("th", { scope: "row" }, name), ...names(columns).map((_, c) => {
    const id = row(told.words, r, state.example, c)[0], value = row(told.shares, r, state.example, c)[0];
    const node = make("td", { tabindex: -1, "data-row": r, "data-n": c }, make("bdi", { class: "word" }, word(id)), " ", make("small", {}, share(value)));
    node.style.background = `color-mix(in srgb, ${base} ${(55 * Math.min(1, value || 0)).toFixed(0)}%, transparent)`;
    return node;
  })));
  at("lens").replaceChildren(make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "layer"), ...own.map(label))), make("tbody", {}, ...rows));
}

function drawProofs() {
  const one = layer(), parts = [...one.attentions.map((n) => data.attentions[n]), ...one.mlps.map((n) => data.mlps[n])];
  const rows = parts.flatMap((part) => [make("dt", {}, `${part.scope}: ${part.size}`), make("dd", {}, part.proof)]);
  const unproven = data.unproven ? [make("dt", {}, "Not certified"), make("dd", {}, data.unproven)] : [];
  const mixers = data.mixers.flatMap((part) => [make("dt", {}, `${part.scope}: ${part.size}`), make("dd", {}, part.proof)]);
  const streams = data.streams.flatMap((stream) => [make("dt", {}, "Stream"), make("dd", {}, stream)]);
  at("proof-title").textContent = `What is proven of layer ${one.name}, and of the whole`;
  at("proofs").replaceChildren(...unproven, ...rows, ...mixers, ...streams);
  at("rejected").querySelector("summary").textContent = `${data.rejected.length} candidates that are not claimed`;
  at("rejected").querySelector("ul").replaceChildren(...data.rejected.map((reason) => make("li", {}, reason)));
  at("rejected").hidden = !data.rejected.length;
}

/* ---- hands: the pointer and the keys */

const numbered = (event) => event.target.closest("[data-n]");
const across = () => Math.max(1, getComputedStyle(at("heads")).gridTemplateColumns.split(" ").length);

at("tokens").addEventListener("click", (event) => { const one = numbered(event); if (one) choose({ query: Number(one.dataset.n) }); });
at("layers").addEventListener("click", (event) => { const one = numbered(event); if (one) toLayer(Number(one.dataset.n)); });
at("heads").addEventListener("click", (event) => { const one = numbered(event); if (one) choose({ head: Number(one.dataset.n) }); });
at("lens").addEventListener("click", (event) => { const one = numbered(event); if (one) toLens(Number(one.dataset.row), Number(one.dataset.n)); });

function toLayer(n) {
  const place = pass().lens.why ? -1 : pass().lens.layers.indexOf(n);
  choose(place < 0 ? { layer: n } : { layer: n, row: place });
}

function toLens(place, query) {
  const to = pass().lens.layers[within(place, pass().lens.rows.length)];
  choose({ row: place, ...(pass().lens.whole ? {} : { query }), ...(to === null ? {} : { layer: to }) });
}

function pointed(event) {
  const box = at("pattern").getBoundingClientRect(), found = chosen();
  if (found.why) return null;
  const scale = at("pattern").offsetWidth ? box.width / at("pattern").offsetWidth : 1;
  const key = Math.floor(((event.clientX - box.left) / scale - margins[0]) / cell);
  const query = Math.floor(((event.clientY - box.top) / scale - margins[1]) / cell);
  return key >= 0 && query >= 0 && key < found.keys && query < found.queries ? { query, key } : null;
}

function hover(to) {
  if (to?.query === hovered?.query && to?.key === hovered?.key) return;
  hovered = to;
  const found = chosen();
  drawTokens(found);
  drawPattern(found);
}

at("pattern").addEventListener("pointermove", (event) => hover(pointed(event)));
at("pattern").addEventListener("pointerleave", () => hover(null));
at("pattern").addEventListener("pointerdown", (event) => { const to = pointed(event); if (to) choose(to); });

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-Infinity, 0], End: [Infinity, 0] };
const stepped = (value, step) => step === -Infinity ? 0 : step === Infinity ? Infinity : Math.max(0, value + step);

function onKeys(id, move) {
  at(id).addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    move(...step);
  });
}

onKeys("tokens", (x, y) => choose({ query: stepped(state.query, x || y) }));
onKeys("layers", (x, y) => toLayer(within(stepped(state.layer, x || y), data.layers.length)));
onKeys("heads", (x, y) => choose({ head: stepped(state.head, x || y * across()) }));
onKeys("pattern", (x, y) => choose({ query: stepped(state.query, y), key: stepped(state.key, x) }));
onKeys("lens", (x, y) => toLens(within(stepped(state.row, y), pass().lens.rows.length), stepped(state.query, x)));

for (const name of ["pass", "example", "attention", "map"]) {
  at(name).addEventListener("change", (event) => choose({ [name]: Number(event.target.value) }));
}
at("layer").addEventListener("change", (event) => toLayer(Number(event.target.value)));
at("of").addEventListener("change", (event) => { of = event.target.value; drawLayers(); });
window.addEventListener("hashchange", () => choose(recalled()));
window.addEventListener("resize", () => drawPattern(chosen()));
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { lensOf = ""; first = true; choose({}); });

at("model").textContent = data.model;
at("summary").textContent = data.summary;
choose(recalled());
document.documentElement.dataset.ready = (performance.now() - started).toFixed(0);
