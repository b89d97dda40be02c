// The page of `weightsmith look`. Names come from files that nobody has checked: text is only ever set as text.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const FAR = 0.05; // seconds between two questions about a computation, at first
const LARGE = 2 ** 28; // bytes of a tensor that is only read when the reader says so
const DEEPEST = 64; // levels of the tree; what is deeper is one name
const BROAD = 768; // shorter side of a matrix whose singular values are computed unasked

// Words and figures

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function drawn(tag, attributes = {}, text = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}

const whole = (value) => value.toLocaleString("en");
const plural = (count, word) => `${whole(count)} ${word}${count === 1 ? "" : "s"}`;

function figure(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-4 ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
  return text.replace("e+", "e").replaceAll("-", "−");
}

function share(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0 || value === 1) return `${100 * value}%`;
  return value < 0.001 ? "<0.1%" : value > 0.999 ? ">99.9%" : `${(100 * value).toFixed(1)}%`;
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (value >= 999.95 && unit < units.length - 1) [value, unit] = [value / 1000, unit + 1];
  return unit ? `${value.toFixed(1)} ${units[unit]}` : `${value} B`;
}

/** What cannot be seen, or turns text around, as an escape: names must look like what they are. */
const seen = (name) =>
  name.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

/** The same of a text of several lines. */
const seenLines = (text) => text.split(/(\r?\n|\t)/).map((part, index) => (index % 2 ? part : seen(part))).join("");

/** No longer than a row or a title can show: its beginning and its end. */
const cut = (name) => (name.length > 400 ? `${name.slice(0, 250)}…${name.slice(-120)}` : name);

/** A name that may be broken after its dots. */
const breakable = (name) => cut(name).split(/(?<=\.)/).flatMap((part, index) => (index ? [make("wbr"), part] : [part]));

// Asking the server

class Refused extends Error {}

// The token: the browser keeps it for this port alone, which cannot be said of a cookie.
const PLACE = "weightsmith-look";
let token = "";

/** Takes the token, or a ticket for it, out of the address; without one, what was kept. */
async function enter() {
  const word = new URLSearchParams(location.search).get("token");
  try {
    token = localStorage.getItem(PLACE) || "";
  } catch {} // a browser that keeps nothing: the token lasts until the page is loaded again
  if (word === null) return;
  history.replaceState(null, "", location.pathname + location.hash);
  const response = await fetch("api/enter", { method: "POST", body: word, credentials: "omit" });
  if (!response.ok) {
    if (token) return; // the address was used before, from this browser
    banner("This address is used up or not good. Open the one that weightsmith look has printed.");
    throw new Refused("not let in");
  }
  token = (await response.json()).token;
  try {
    localStorage.setItem(PLACE, token);
  } catch {}
}

const bearing = () => ({ headers: { Authorization: `Bearer ${token}` }, credentials: "omit" });

async function asked(path, parameters, signal) {
  const query = new URLSearchParams(parameters);
  let response;
  try {
    response = await fetch(`api/${path}?${query}`, { signal, ...bearing() });
  } catch (error) {
    if (error.name !== "AbortError") banner("The server does not answer. Start weightsmith look again.");
    throw error;
  }
  if (response.status === 403) {
    banner("This page is no longer let in. Open the address that weightsmith look has printed.");
    throw new Refused("not let in");
  }
  banner("");
  const data = await response.json();
  if (response.status >= 400) throw new Refused(data.error || `status ${response.status}`);
  return [response.status, data];
}

function cancel(job) {
  if (!job) return;
  const body = JSON.stringify({ job });
  fetch("api/cancel", { method: "POST", body, keepalive: true, ...bearing() }).catch(() => {});
}

const later = (seconds, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    if (signal) signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });

/** The answer of a computation; `tell` hears how far it is. Called off when the signal says so. */
async function computed(parameters, signal, tell) {
  let job = null;
  let pause = FAR;
  try {
    for (;;) {
      const [status, data] = await asked("tensor", parameters, signal);
      if (status === 200) return data;
      job = data.job;
      tell(data);
      await later(pause, signal);
      signal.throwIfAborted();
      pause = Math.min(1.5 * pause, 0.5);
    }
  } catch (error) {
    if (signal.aborted) cancel(job);
    throw error;
  }
}

function banner(text) {
  if ($("banner").textContent !== text) $("banner").textContent = text;
  $("banner").hidden = !text;
}

// What is looked at

const state = { checkpoints: [], of: 0, against: -1, tensors: [], lists: new Map(), known: new Map(), survey: null };

async function listOf(index) {
  if (!state.lists.has(index)) {
    const loading = asked("tensors", { of: index }).then(([, data]) =>
      data.rows.map(([name, kind, shape, tied], number) => {
        const parameters = shape.reduce((a, b) => a * b, 1);
        const dtype = data.dtypes[kind];
        const size = parameters * dtype.bytes;
        return { name, number, shape, tied, dtype: dtype.name, countable: dtype.countable, parameters, bytes: size };
      }),
    );
    loading.catch(() => state.lists.delete(index));
    state.lists.set(index, loading);
  }
  return state.lists.get(index);
}

/** The tensors of the checkpoint, then those that only the other has. */
async function load() {
  const [of, against] = [state.of, state.against];
  const own = await listOf(of);
  const other = against >= 0 ? await listOf(against) : [];
  if (of !== state.of || against !== state.against) return;
  const names = new Map(own.map((tensor) => [tensor.name, tensor]));
  const theirs = new Map(other.map((tensor) => [tensor.name, tensor]));
  state.tensors = own.map((tensor) => ({ ...tensor, other: theirs.get(tensor.name) || null, only: "" }));
  for (const tensor of other) {
    if (!names.has(tensor.name)) state.tensors.push({ ...tensor, other: null, only: "second" });
  }
  if (against >= 0) for (const tensor of state.tensors) if (!tensor.other && !tensor.only) tensor.only = "first";
  state.root = grown(state.tensors);
  state.loaded = surveyKey();
  if (state.root.kids.length <= 6) for (const kid of state.root.kids) tree.open.add(kid.key);
  gather();
}

const comparing = () => state.against >= 0;
const surveyKey = () => (comparing() ? `${state.of} ${state.against}` : `${state.of}`);
const figures = () => state.known.get(surveyKey()) || new Map();

// The tree

function grown(tensors) {
  const root = { name: "", path: "", kids: new Map(), tensor: null, depth: -1 };
  for (const tensor of tensors) {
    let node = root;
    const parts = tensor.name.split(".");
    if (parts.length > DEEPEST) parts.push(parts.splice(DEEPEST - 1).join("."));
    for (const [index, part] of parts.entries()) {
      const mark = index === parts.length - 1 ? "=" : "."; // a tensor and a branch may share a name
      const key = mark + part;
      if (!node.kids.has(key)) {
        const path = parts.slice(0, index + 1).join(".");
        node.kids.set(key, { name: part, path, key: mark + path, kids: new Map(), tensor: null });
      }
      node = node.kids.get(key);
    }
    node.tensor = tensor;
  }
  finish(root);
  return root;
}

/** Joins branches that have one branch, and adds up what is under each. */
function finish(node) {
  node.kids = [...node.kids.values()];
  for (let index = 0; index < node.kids.length; index++) {
    let kid = node.kids[index];
    while (!kid.tensor && kid.kids.size === 1) {
      const [only] = kid.kids.values();
      only.name = `${kid.name}.${only.name}`;
      kid = only;
    }
    node.kids[index] = kid;
    kid.parent = node;
    finish(kid);
  }
  const own = node.tensor;
  const counted = own && own.tied < 0;
  node.tensors = own ? 1 : 0;
  node.parameters = counted ? own.parameters : 0;
  node.bytes = counted ? own.bytes : 0;
  node.dtypes = new Map(own ? [[own.dtype, counted ? own.parameters : 0]] : []);
  for (const kid of node.kids) {
    node.tensors += kid.tensors;
    node.parameters += kid.parameters;
    node.bytes += kid.bytes;
    for (const [dtype, count] of kid.dtypes) node.dtypes.set(dtype, (node.dtypes.get(dtype) || 0) + count);
  }
}

/** Adds the known figures up the tree: squared norms, or the sums of a comparison. */
function gather(node = state.root, found = figures()) {
  const own = node.tensor;
  node.known = 0;
  node.sums = [0, 0, 0, 0, 0, 0, 0];
  node.broken = 0; // values that are not finite
  node.status = "";
  if (own) {
    const row = own.only === "second" ? null : found.get(own.number);
    node.status = own.only ? `only in ${own.only}` : row && comparing() ? row[1] : "";
    if (row) {
      node.known = 1;
      if (comparing()) node.sums = row.slice(2).map((sum) => sum ?? Infinity);
      else if (row[1] === null) node.known = 0;
      else node.sums[0] = row[1] * row[1];
      if (!comparing()) node.broken = row[2];
    }
  }
  for (const kid of node.kids) {
    gather(kid, found);
    node.known += kid.known;
    if (kid.tensor && kid.tensor.tied >= 0) continue; // counted at its first name
    node.broken += kid.broken;
    for (let i = 0; i < 7; i++) node.sums[i] = i === 4 ? Math.max(node.sums[4], kid.sums[4]) : node.sums[i] + kid.sums[i];
  }
}

/** The norm, or the distance ||b - a|| / ||a||, of a node; null where it is not known. */
function measure(node) {
  if (!node.known) return null;
  const [aa, , , dd, , , count] = node.sums;
  if (!comparing()) return Math.sqrt(aa);
  if (node.status === "shape" || !count) return null;
  return dd === 0 ? 0 : aa ? Math.sqrt(dd / aa) : Infinity;
}

const natural = new Intl.Collator("en", { numeric: true });
const ORDERS = {
  file: null,
  name: (a, b) => natural.compare(a.name, b.name),
  size: (a, b) => b.bytes - a.bytes,
  norm: (a, b) => (measure(b) ?? -1) - (measure(a) ?? -1),
  change: (a, b) => odd(b) - odd(a) || (measure(b) ?? -1) - (measure(a) ?? -1),
};
const odd = (node) => (node.status.startsWith("only") || node.status === "shape" ? 1 : 0);

/** A test of names, or an error in words. */
function fitting(words) {
  const text = words.trim();
  if (!text) return () => true;
  if (text.startsWith("re:")) {
    const expression = new RegExp(text.slice(3));
    return (name) => expression.test(name);
  }
  if (/[*?]/.test(text)) {
    const escaped = text.replace(/[.+^${}()|\\]/g, "\\$&").replaceAll("*", ".*").replaceAll("?", ".").replaceAll("[!", "[^");
    const expression = new RegExp(`^${escaped}$`, "s");
    return (name) => expression.test(name);
  }
  const parts = text.toLowerCase().split(/\s+/);
  return (name) => parts.every((part) => name.toLowerCase().includes(part));
}

// The rows that are to be seen

const tree = {
  box: $("tree"), space: make("div", { className: "space", role: "none" }), rows: [], open: new Set(), shut: new Set(), active: 0, height: 30,
  shown: new Map(), fits: 0,
};
tree.box.append(tree.space);

/** Whether what a search has found stands open of itself. */
const unfolds = () => $("search").value.trim() !== "" && tree.fits <= 500;

/** Which rows there are, after anything that decides it has changed. */
function arrange() {
  if (!state.root) return;
  let test;
  $("search").setCustomValidity("");
  try {
    test = fitting($("search").value);
  } catch (error) {
    $("search").setCustomValidity(error.message);
    $("status").textContent = `No expression: ${error.message}`;
    return;
  }
  const kept = tree.rows[tree.active];
  const order = ORDERS[$("sort").value];
  const rows = [];
  tree.fits = 0;
  const count = (node) => {
    let found = node.tensor && test(node.tensor.name) ? 1 : 0;
    for (const kid of node.kids) found += count(kid);
    node.fits = found;
    return found;
  };
  tree.fits = count(state.root);
  if ($("shape").value === "list") {
    const leaves = [];
    const collect = (node) => {
      if (node.tensor && test(node.tensor.name)) leaves.push(node);
      node.kids.forEach(collect);
    };
    collect(state.root);
    if (order) leaves.sort($("sort").value === "name" ? (a, b) => natural.compare(a.path, b.path) : order);
    for (const [index, node] of leaves.entries()) {
      rows.push({ node, depth: 0, place: index + 1, siblings: leaves.length, open: null, name: node.path });
    }
  } else {
    const unfolded = unfolds();
    const visit = (node, depth) => {
      const kids = node.kids.filter((kid) => kid.fits);
      if (order) kids.sort(order);
      for (const [index, kid] of kids.entries()) {
        const open = kid.kids.length ? (unfolded ? !tree.shut.has(kid.key) : tree.open.has(kid.key)) : null;
        rows.push({ node: kid, depth, place: index + 1, siblings: kids.length, open, name: kid.name });
        if (open) visit(kid, depth + 1);
      }
    };
    visit(state.root, 0);
  }
  tree.rows = rows;
  const again = kept ? rows.findIndex((row) => row.node.key === kept.node.key) : -1;
  tree.active = again >= 0 ? again : Math.min(tree.active, Math.max(rows.length - 1, 0));
  tree.space.style.height = `${rows.length * tree.height}px`;
  for (const element of tree.shown.values()) element.remove();
  tree.shown.clear();
  paint();
  say();
}

function say() {
  const all = state.tensors.length;
  const parts = [tree.fits === all ? plural(all, "tensor") : `${whole(tree.fits)} of ${plural(all, "tensor")} fit`];
  const survey = state.survey;
  if (survey && survey.total) {
    const verb = comparing() ? "compared" : "read";
    parts.push(survey.whole ? `all ${verb}` : `${verb} ${bytes(survey.read)} of ${bytes(survey.total)}`);
  }
  const text = parts.join("; ");
  if ($("status").textContent !== text) $("status").textContent = text;
}

/** Draws the rows in sight, and those just beyond. */
function paint() {
  tree.height = matchMedia("(max-width: 48rem)").matches ? 40 : 30;
  const space = `${tree.rows.length * tree.height}px`;
  if (tree.space.style.height !== space) tree.space.style.height = space;
  const first = Math.max(Math.floor(tree.box.scrollTop / tree.height) - 8, 0);
  const last = Math.min(Math.ceil((tree.box.scrollTop + tree.box.clientHeight) / tree.height) + 8, tree.rows.length);
  for (const [index, element] of tree.shown) {
    if (index < first || index >= last) {
      element.remove();
      tree.shown.delete(index);
    }
  }
  for (let index = first; index < last; index++) {
    if (!tree.shown.has(index)) {
      const element = rowOf(tree.rows[index], index);
      // In the order of the rows, as a screen reader goes through them.
      const next = tree.shown.get(index + 1);
      tree.box.insertBefore(element, next || null);
      tree.shown.set(index, element);
    }
    const element = tree.shown.get(index);
    element.style.transform = `translateY(${index * tree.height}px)`;
    element.classList.toggle("active", index === tree.active);
    const current = tree.rows[index].node.key === state.selected;
    element.classList.toggle("current", current);
    element.setAttribute("aria-selected", current);
  }
  const active = tree.shown.get(tree.active);
  if (active) tree.box.setAttribute("aria-activedescendant", active.id);
  else tree.box.removeAttribute("aria-activedescendant");
}

function rowOf(row, index) {
  const node = row.node;
  const tensor = node.tensor;
  const name = make("span", { className: "name" });
  name.style.paddingLeft = `${Math.min(row.depth, 12) * 0.85}rem`;
  const twist = row.open === null ? "" : row.open ? "▾" : "▸";
  name.append(make("span", { className: "twist", "aria-hidden": "true" }, twist), make("span", { className: "part" }, cut(seen(row.name))));
  if (!tensor) name.append(make("span", { className: "count" }, whole(node.tensors)));
  const value = measure(node);
  const amount = make("span", { className: "figure" });
  const status = { "only in first": "1st only", "only in second": "2nd only", shape: "other shape" }[node.status];
  if (status || node.status === "same") amount.append(status || node.status);
  else if (value !== null) {
    if (comparing() && value > 0) {
      const bar = make("span", { className: "bar" });
      bar.style.width = `${Math.max(Math.min((Math.log10(value) + 6) / 6, 1), 0.03) * 100}%`;
      amount.append(bar);
    }
    amount.append(make("span", {}, (node.known < node.tensors ? "~ " : "") + figure(value, 3)));
  }
  if (node.broken) amount.append(make("span", { className: "wrong", title: `${plural(node.broken, "value")} not finite` }, " NaN"));
  const shape = tensor ? `${short(tensor.dtype)} ${tensor.shape.join("×") || "scalar"}` : [...node.dtypes.keys()].map(short).join(", ");
  const element = make(
    "div",
    { className: "row", role: "treeitem", id: `row-${index}`, title: cut(seen(node.path)) },
    name,
    make("span", { className: "meta wide" }, shape),
    make("span", { className: "meta" }, tensor && tensor.tied >= 0 ? "tied" : bytes(node.bytes)),
    amount,
  );
  element.setAttribute("aria-level", row.depth + 1);
  element.setAttribute("aria-posinset", row.place);
  element.setAttribute("aria-setsize", row.siblings);
  if (row.open !== null) element.setAttribute("aria-expanded", row.open);
  element.addEventListener("click", (event) => {
    tree.active = index;
    if (row.open !== null && (event.target.className === "twist" || node.key === state.selected || !row.open)) toggle(row);
    select(node);
  });
  return element;
}

const short = (dtype) => dtype.replace("bfloat", "bf").replace("float", "f").replace("uint", "u").replace(/^int/, "i");

function toggle(row) {
  if (row.open === null) return;
  const set = unfolds() ? tree.shut : tree.open;
  if (set.has(row.node.key)) set.delete(row.node.key);
  else set.add(row.node.key);
  arrange();
}

function reveal() {
  const top = tree.active * tree.height;
  if (top < tree.box.scrollTop) tree.box.scrollTop = top;
  const bottom = top + tree.height - tree.box.clientHeight;
  if (bottom > tree.box.scrollTop) tree.box.scrollTop = bottom;
  paint();
}

function move(to) {
  tree.active = Math.max(Math.min(to, tree.rows.length - 1), 0);
  reveal();
}

tree.box.addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
new ResizeObserver(() => paint()).observe(tree.box);
tree.box.addEventListener("keydown", (event) => {
  const row = tree.rows[tree.active];
  if (!row || event.ctrlKey || event.metaKey || event.altKey) return;
  const page = Math.max(Math.floor(tree.box.clientHeight / tree.height) - 1, 1);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -tree.rows.length, End: tree.rows.length };
  if (event.key in moves) move(tree.active + moves[event.key]);
  else if (event.key === "ArrowRight") {
    if (row.open === false) toggle(row);
    else if (row.open) move(tree.active + 1);
  } else if (event.key === "ArrowLeft") {
    if (row.open) toggle(row);
    else {
      let above = tree.active;
      while (above > 0 && tree.rows[above].depth >= row.depth) above--;
      if (tree.rows[above].depth < row.depth) move(above);
    }
  } else if (event.key === "Enter" || event.key === " ") {
    if (row.open !== null && row.node.key === state.selected) toggle(row);
    select(row.node);
    if (event.key === "Enter" && row.node.tensor) $("details").focus();
  } else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("search").focus();
  }
  if (event.key === "Escape" && document.activeElement === $("search")) tree.box.focus();
});

// Where we are: in the address, so that going back and loading again work

function select(node) {
  const words = new URLSearchParams({ of: state.of });
  if (comparing()) words.set("against", state.against);
  if (node) words.set("at", node.key);
  const address = `#${words}`;
  if (location.hash === address) follow();
  else location.hash = address;
}

let turns = 0;

async function follow() {
  const words = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (/^\d{1,4}$/.test(words.get(name) || "") ? Number(words.get(name)) : -1);
  const of = Math.max(number("of"), 0) < state.checkpoints.length ? Math.max(number("of"), 0) : 0;
  let against = number("against") < state.checkpoints.length ? number("against") : -1;
  if (against === of) against = -1;
  [state.of, state.against] = [of, against];
  const turn = ++turns;
  const changed = state.loaded !== surveyKey();
  if (changed) {
    leave();
    stopSurvey();
    choices();
    await load();
    if (turn !== turns) return;
    survey(false);
  }
  const key = words.get("at");
  const node = key === null ? null : find(state.root, key);
  state.selected = node ? node.key : null;
  document.body.classList.toggle("inside", node !== null);
  if (changed) arrange();
  if (node) bring(node);
  paint();
  show(node);
}

/** Opens what is above a node, and scrolls to it, unless it is in sight or hidden by the search. */
function bring(node) {
  const place = () => tree.rows.findIndex((row) => row.node === node);
  if (place() < 0) {
    for (let above = node.parent; above; above = above.parent) {
      tree.open.add(above.key);
      tree.shut.delete(above.key);
    }
    arrange();
  }
  const found = place();
  if (found < 0 || found === tree.active) return;
  tree.active = found;
  reveal();
}

function find(root, key) {
  const stack = [root];
  while (stack.length) {
    const node = stack.pop();
    if (node.key === key) return node;
    stack.push(...node.kids);
  }
  return null;
}

function choices() {
  const several = state.checkpoints.length > 1;
  $("of").replaceChildren(...state.checkpoints.map((one, index) => new Option(seen(one.title), index)));
  $("of").value = state.of;
  $("against-label").hidden = !several;
  $("against").replaceChildren(
    new Option("nothing", -1),
    ...state.checkpoints.map((one, index) => [one, index]).filter(([, index]) => index !== state.of)
      .map(([one, index]) => new Option(seen(one.title), index)),
  );
  $("against").value = state.against;
  $("figure-head").textContent = comparing() ? "change" : "norm";
  for (const option of $("sort").options) {
    if (option.value === "norm") option.disabled = option.hidden = comparing();
    if (option.value === "change") option.disabled = option.hidden = !comparing();
  }
  if ($("sort").selectedOptions[0].disabled) $("sort").value = "file";
}

// Surveys: a figure of every tensor, read in the background

function stopSurvey() {
  if (state.survey) {
    state.survey.stop.abort();
    if (!state.survey.whole) cancel(state.survey.job);
  }
  state.survey = null;
}

/** Fetches what is known; with `go` has the rest computed. */
async function survey(go) {
  stopSurvey();
  const key = surveyKey();
  const stop = new AbortController();
  const mine = (state.survey = { stop, job: null, read: 0, total: 0, whole: false, going: go });
  if (!state.known.has(key)) state.known.set(key, new Map());
  const found = state.known.get(key);
  const parameters = { of: state.of, go: go ? 1 : 0 };
  if (comparing()) parameters.against = state.against;
  let pause = 0.15;
  let failure = "";
  try {
    for (;;) {
      const [, data] = await asked("survey", { ...parameters, since: found.size }, stop.signal);
      for (const row of data.rows) found.set(row[0], row);
      Object.assign(mine, { job: data.job, read: data.read, total: data.total, whole: data.whole });
      if (data.rows.length) {
        gather();
        arrange();
        freshen();
      }
      meter(mine);
      if (mine.whole || (!go && !data.rows.length)) break;
      await later(data.rows.length ? Math.max(0.15, state.tensors.length / 5e4) : (pause = Math.min(1.3 * pause, 1)), stop.signal);
      stop.signal.throwIfAborted();
    }
  } catch (error) {
    if (stop.signal.aborted) return;
    failure = error.message;
  }
  mine.going = false;
  meter(mine);
  if (failure) $("status").textContent = seen(failure);
}

function meter(mine) {
  if (mine !== state.survey) return;
  const { whole: all, going, read, total } = mine;
  $("meter").hidden = !going || all;
  $("meter").value = total ? read / total : 0;
  $("survey").textContent = going && !all ? "Stop" : comparing() ? "Compare all" : "Read all norms";
  $("survey").disabled = all;
  say();
}

// Details

let leaving = new AbortController(); // of what the details show now

function leave() {
  leaving.abort();
  leaving = new AbortController();
  redraws = [];
}

let freshen = () => {}; // puts new figures into what is shown

function show(node) {
  leave();
  freshen = () => {};
  const content = make("div");
  if (!node) overview(content);
  else if (node.tensor) tensorPage(content, node);
  else branchPage(content, node);
  $("content").replaceChildren(content);
  $("details").scrollTop = 0;
  document.title = node ? `${cut(seen(node.path))} – weightsmith look` : "weightsmith look";
}

function facts(pairs) {
  const list = make("dl");
  for (const [word, value, broad] of pairs) {
    if (value !== null) list.append(make("div", { className: broad ? "broad" : "" }, make("dt", {}, word), make("dd", {}, value)));
  }
  return list;
}

function heading(text, ...controls) {
  return make("h3", {}, make("span", {}, text), ...controls);
}

/** A row of radio buttons. */
let picks = 0;
function pick(label, options, value, changed) {
  const name = `pick-${++picks}`;
  const field = make("fieldset", { className: "pick" }, make("legend", {}, label));
  for (const [key, text] of options) {
    const input = make("input", { type: "radio", name, value: key, checked: key === value });
    input.addEventListener("change", () => changed(key));
    field.append(make("label", {}, input, text));
  }
  return field;
}

function overview(content) {
  const one = state.checkpoints[state.of];
  const dtypes = Object.entries(one.dtypes).map(([name, count]) => `${name} ${share(one.parameters ? count / one.parameters : 1)}`);
  content.append(
    make("h2", {}, seen(one.title)),
    facts([
      ["tensors", whole(one.tensors)],
      ["parameters", whole(one.parameters)],
      ["size", bytes(one.bytes)],
      ["dtypes", dtypes.join(", ") || "–"],
    ]),
    make("p", { className: "note" }, "Choose a tensor. Arrow keys move in the tree, Enter opens, / searches."),
  );
  if (comparing()) content.append(comparison(state.root));
  const made = make("pre", { tabIndex: 0 }, "…");
  content.append(heading("Where it comes from"), made);
  asked("lineage", { of: state.of }, leaving.signal)
    .then(([, data]) => (made.textContent = data.lines.map(seen).join("\n")))
    .catch((error) => (made.textContent = seen(error.message)));
  const words = Object.entries(one.metadata).filter(([name]) => name !== "weightsmith.lineage"); // shown above
  if (words.length) content.append(heading("Words in the file"), facts(words.map(([name, value]) => [seen(name), seen(value), true])));
  if (one.files.length) {
    const text = make("pre", { tabIndex: 0, hidden: true });
    const note = make("p", { className: "note", role: "status" });
    const list = make("ul");
    for (const [index, file] of one.files.entries()) {
      const open = () =>
        asked("file", { of: state.of, file: index }, leaving.signal)
          .then(([, data]) => {
            const part = data.shown < data.bytes ? `, the first ${bytes(data.shown)}` : "";
            note.textContent = `${seen(data.name)}: ${bytes(data.bytes)}${data.is_text ? part : ", no text"}`;
            text.hidden = !data.is_text;
            text.textContent = seenLines(data.text);
          })
          .catch((error) => (note.textContent = seen(error.message)));
      list.append(make("li", {}, make("button", { type: "button", className: "linked", onclick: open }, seen(file.name)), ` ${bytes(file.bytes)}`));
    }
    content.append(heading("Files beside the tensors"), list, note, text);
  }
}

function branchPage(content, node) {
  const dtypes = [...node.dtypes].map(([name, count]) => `${name} ${share(node.parameters ? count / node.parameters : 1)}`);
  content.append(
    make("h2", {}, ...breakable(seen(node.path))),
    facts([
      ["tensors", whole(node.tensors)],
      ["parameters", whole(node.parameters)],
      ["size", bytes(node.bytes)],
      ["dtypes", dtypes.join(", ")],
    ]),
  );
  if (comparing()) content.append(comparison(node));
  else {
    const norm = make("div");
    const fill = () => norm.replaceChildren(facts([["norm of those read", node.known ? `${figure(measure(node))} (${whole(node.known)} of ${whole(node.tensors)})` : "–", true]]));
    fill();
    freshen = fill;
    content.append(norm);
  }
}

/** What has changed under a node, and where most. */
function comparison(node) {
  const box = make("div");
  const fill = () => {
    const leaves = [];
    const collect = (one) => (one.tensor && leaves.push(one), one.kids.forEach(collect));
    collect(node);
    const counts = new Map();
    for (const leaf of leaves) counts.set(leaf.status || "not compared yet", (counts.get(leaf.status || "not compared yet") || 0) + 1);
    const [aa, bb, ab, , largest, changed, count] = node.sums;
    const scale = Math.sqrt(aa) * Math.sqrt(bb);
    const most = leaves.filter((leaf) => measure(leaf)).sort(ORDERS.change).slice(0, 12);
    box.replaceChildren(
      heading("Change"),
      make("p", { className: "note" }, [...counts].map(([status, number]) => `${whole(number)} ${status}`).join(", ")),
      node.known
        ? facts([
            ["relative change", figure(measure(node))],
            ["cosine", scale ? (ab / scale).toFixed(6) : "–"],
            ["largest", figure(largest)],
            ["values changed", share(count ? changed / count : 0)],
          ])
        : make("p", { className: "note" }, "“Compare all” reads both and fills this in."),
    );
    if (most.length) {
      const table = make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "most changed"), make("th", { scope: "col" }, "change"))));
      const body = make("tbody");
      for (const leaf of most) {
        const link = make("button", { type: "button", className: "linked", onclick: () => select(leaf) }, cut(seen(leaf.path)));
        body.append(make("tr", {}, make("td", {}, link), make("td", {}, figure(measure(leaf)))));
      }
      table.append(body);
      box.append(make("div", { className: "scroll" }, table));
    }
  };
  fill();
  freshen = fill;
  return box;
}

function tensorPage(content, node) {
  const tensor = node.tensor;
  const second = tensor.only === "second";
  const home = second ? state.against : state.of;
  content.append(make("h2", {}, ...breakable(seen(tensor.name))));
  const pairs = [
    ["shape", tensor.shape.length ? `[${tensor.shape.map(whole).join(", ")}]` : "[] (a single value)"],
    ["dtype", tensor.dtype],
    ["parameters", whole(tensor.parameters)],
    ["size", bytes(tensor.bytes)],
  ];
  if (tensor.only) pairs.push(["found", `only in ${seen(state.checkpoints[home].title)}`, true]);
  if (tensor.other && (tensor.other.dtype !== tensor.dtype || String(tensor.other.shape) !== String(tensor.shape))) {
    pairs.push(["in the other", `${tensor.other.dtype} [${tensor.other.shape.map(whole).join(", ")}]`, true]);
  }
  content.append(facts(pairs));
  const alike = ties(tensor);
  if (alike.length) {
    const list = make("p", { className: "note" }, "The same tensor as ");
    alike.slice(0, 20).forEach((one, index) => {
      if (index) list.append(", ");
      list.append(make("button", { type: "button", className: "linked", onclick: () => select(find(state.root, `=${one.name}`)) }, cut(seen(one.name))));
    });
    content.append(list);
  }
  if (!tensor.parameters) {
    content.append(make("p", { className: "note" }, "It has no values."));
    return;
  }
  const parts = make("div");
  const other = tensor.other;
  const comparable = other && String(other.shape) === String(tensor.shape) && other.countable && tensor.countable;
  const sides = {
    a: { of: home, tensor: tensor.number },
    b: tensor.other && { of: state.against, tensor: tensor.other.number },
    change: comparable && { of: state.of, tensor: tensor.number, against: state.against },
  };
  const view = (side) => {
    leave();
    parts.replaceChildren();
    if (side === "change") changePart(parts, sides.change);
    values(parts, sides[side], tensor, side === "change");
  };
  const options = [["a", "first"], ["b", "second"], ["change", "change"]].filter(([key]) => sides[key]);
  const start = comparable ? "change" : "a";
  if (options.length > 1) content.append(pick("Which values", options, start, view));
  content.append(parts);
  view(start);
}

function ties(tensor) {
  if (tensor.only === "second") return [];
  const first = tensor.tied >= 0 ? tensor.tied : tensor.number;
  return state.tensors.filter((one) => one.only !== "second" && one.number !== tensor.number && (one.number === first || one.tied === first));
}

/** Shows that something is computed; then what `draw` makes of the answer. */
function panel(parts, title, parameters, unasked, draw, waiting = "") {
  const box = make("section");
  const head = heading(title);
  const body = make("div");
  box.append(head, body);
  parts.append(box);
  const signal = leaving.signal;
  const begin = async () => {
    const stop = new AbortController();
    signal.addEventListener("abort", () => stop.abort(), { once: true });
    const word = make("span", {}, "…");
    const bar = make("progress", { max: 1, "aria-label": `${title}: how far` });
    const off = make("button", { type: "button", onclick: () => stop.abort() }, "Stop");
    const work = make("div", { className: "work" });
    body.replaceChildren(work);
    const patience = setTimeout(() => work.append(bar, word, off), 250); // what is quick needs no words
    try {
      const data = await computed(parameters, stop.signal, (told) => {
        if (told.state === "waiting") word.textContent = told.before ? `${told.before} before it` : "waiting";
        else word.textContent = told.label || "computing";
        if (told.total && told.done < told.total) bar.value = told.done / told.total;
        else bar.removeAttribute("value");
      });
      if (!signal.aborted) draw(body, data, head);
    } catch (error) {
      if (!signal.aborted) offer(stop.signal.aborted ? "Stopped." : seen(error.message), stop.signal.aborted);
    } finally {
      clearTimeout(patience);
    }
  };
  const offer = (text, quiet) => {
    const again = make("button", { type: "button", onclick: begin }, `Compute`);
    again.setAttribute("aria-label", `Compute: ${title}`);
    body.replaceChildren(make("div", { className: quiet ? "work" : "work wrong" }, again, make("span", {}, text)));
  };
  if (unasked) begin();
  else offer(waiting, true);
}

function values(parts, parameters, tensor, isChange) {
  const small = tensor.bytes <= LARGE;
  const large = `It reads ${bytes(tensor.bytes)}.`;
  panel(parts, isChange ? "Figures of the change" : "Figures", { ...parameters, kind: "figures" }, small, (body, data) => {
    figuresPart(body, data, tensor);
  }, large);
  if (tensor.shape.length > 1 && tensor.countable && /float/.test(tensor.dtype)) {
    const lower = Math.min(tensor.shape[0], tensor.parameters / tensor.shape[0]);
    panel(parts, "Singular values", { ...parameters, kind: "spectrum" }, small && lower <= BROAD, spectrumPart,
      `Takes about ${whole(lower)}³ steps, and cannot be stopped half way.`);
  }
  panel(parts, "Picture", { ...parameters, kind: "picture" }, small, picturePart, large);
}

function changePart(parts, parameters) {
  panel(parts, "Change", { ...parameters, kind: "change" }, true, (body, data) => {
    body.replaceChildren(
      facts([
        ["status", data.status],
        ["relative change", figure(data.distance === null ? Infinity : data.distance)],
        ["cosine", data.cosine === null ? "–" : data.cosine.toFixed(6)],
        ["largest", figure(data.largest)],
        ["values changed", share(data.changed)],
        ["signs flipped", share(data.flipped)],
        ["became zero", share(data.to_zero)],
        ["were zero", share(data.from_zero)],
      ]),
    );
  });
}

function figuresPart(body, data, tensor) {
  body.replaceChildren();
  const stats = data.statistics;
  if (!stats) {
    body.append(make("p", { className: "note" }, "Values of this dtype are no numbers by themselves."));
    return;
  }
  body.append(
    facts([
      ["norm", figure(stats.norm)],
      ["mean", figure(stats.mean)],
      ["deviation", figure(stats.std)],
      ["least", figure(stats.min)],
      ["largest", figure(stats.max)],
      ["zeros", share(stats.zeros)],
      ["NaN", whole(stats.nan)],
      ["infinite", whole(stats.inf)],
    ]),
  );
  if (!data.histogram) return;
  const plot = make("div", { className: "plot" });
  let [axis, scale] = ["values", "linear"];
  const draw = () => plot.replaceChildren(...histogram(data.histogram, axis, scale, tensor));
  body.append(
    make("h3", {}, make("span", {}, "Histogram"),
      pick("Over", [["values", "values"], ["magnitudes", "magnitudes"]], axis, (key) => ((axis = key), draw())),
      pick("Counts", [["linear", "linear"], ["log", "log"]], scale, (key) => ((scale = key), draw()))),
    plot,
  );
  redraws.push(draw);
  draw();
}

// Drawings

const AREA = { width: 640, height: 220, left: 52, right: 10, top: 10, bottom: 34 };
let redraws = []; // drawings in sight, to be made again for another width

/** As wide as there is room, so that letters keep their size. */
function fit() {
  const before = AREA.width;
  AREA.width = Math.max(Math.min($("content").clientWidth, 704), 280);
  return AREA.width !== before;
}

new ResizeObserver(() => {
  if (fit()) for (const redraw of redraws) redraw();
}).observe($("content"));

function frame(label) {
  const svg = drawn("svg", { viewBox: `0 0 ${AREA.width} ${AREA.height}`, role: "img", "aria-label": label });
  svg.append(
    drawn("line", { class: "axis", x1: AREA.left, x2: AREA.width - AREA.right, y1: AREA.height - AREA.bottom, y2: AREA.height - AREA.bottom }),
  );
  return svg;
}

/** Places on an axis from `low` to `high`, in round steps. */
function ticks(low, high, most) {
  if (!(high > low)) return [low];
  if (!Number.isFinite(high - low)) return [low, high];
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough) || 10 * power;
  const places = [];
  const first = Math.ceil(low / step - 1e-9);
  for (let index = 0; index <= 2 * most; index++) {
    const place = (first + index) * step; // the same again where the axis is shorter than numbers resolve
    if (place <= high + step * 1e-9 && place !== places[places.length - 1]) places.push(place);
  }
  return places;
}

/** Whole powers of ten from `low` to `high`, at most so many. */
function powers(low, high, most) {
  const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
  const step = Math.max(Math.ceil((last - first + 1) / most), 1);
  const places = [];
  for (let k = last; k >= first; k -= step) places.push(10 ** k);
  return places.length ? places.reverse() : [high];
}

function across(svg, places, at, said = (value) => figure(value, 3)) {
  for (const place of places) {
    const x = at(place);
    svg.append(drawn("line", { class: "axis", x1: x, x2: x, y1: AREA.height - AREA.bottom, y2: AREA.height - AREA.bottom + 4 }));
    const anchor = x > AREA.width - 40 ? "end" : x < AREA.left + 20 ? "start" : "middle";
    svg.append(drawn("text", { x, y: AREA.height - AREA.bottom + 16, "text-anchor": anchor }, said(place)));
  }
}

function upward(svg, places, at) {
  for (const place of places) {
    const y = at(place);
    svg.append(drawn("line", { class: "axis", x1: AREA.left, x2: AREA.width - AREA.right, y1: y, y2: y }));
    svg.append(drawn("text", { x: AREA.left - 6, y: y + 4, "text-anchor": "end" }, compact(place)));
  }
}

const compact = (value) =>
  value >= 1e9 ? `${+(value / 1e9).toFixed(1)}G` : value >= 1e6 ? `${+(value / 1e6).toFixed(1)}M` : value >= 1e3 ? `${+(value / 1e3).toFixed(1)}k` : figure(value, 3);

function title(svg, text) {
  svg.append(drawn("text", { x: (AREA.left + AREA.width - AREA.right) / 2, y: AREA.height - 4, "text-anchor": "middle" }, text));
}

function histogram(found, axis, scale) {
  const isValues = axis === "values";
  const stacks = isValues ? [found.counts] : [found.positive, found.negative];
  const count = stacks[0].length;
  const tops = stacks[0].map((_, index) => stacks.reduce((sum, stack) => sum + stack[index], 0));
  const most = Math.max(...tops, 1);
  const base = AREA.height - AREA.bottom;
  const room = base - AREA.top;
  const up = (value) =>
    base - room * (scale === "log" ? (value <= 0 ? 0 : (Math.log10(value) + 0.3) / (Math.log10(most) + 0.3)) : value / most);
  const step = (AREA.width - AREA.left - AREA.right) / Math.max(count, 1);
  const peak = tops.indexOf(most);
  const where = isValues
    ? `about ${figure(found.low * (1 - (peak + 0.5) / count) + found.high * ((peak + 0.5) / count), 3)}`
    : `from 2^${found.first + peak} to 2^${found.first + peak + 1}`;
  const svg = frame(`Histogram of ${axis}: ${count} steps, most values (${whole(most)}) ${where}.`);
  upward(svg, scale === "log" ? powers(1, Math.max(most, 1), 4) : ticks(0, most, 4), up);
  for (let index = 0; index < count; index++) {
    if (!tops[index]) continue;
    const x = AREA.left + index * step;
    const wide = Math.max(step - (count < 60 ? 1 : 0.3), 0.5);
    if (isValues) {
      svg.append(drawn("rect", { class: "blue", x, y: up(tops[index]), width: wide, height: base - up(tops[index]) }));
    } else {
      const [plus, minus] = [found.positive[index], found.negative[index]];
      for (const [value, offset, colour] of [[plus, 0, "blue"], [minus, wide / 2, "violet"]]) {
        if (value) svg.append(drawn("rect", { class: colour, x: x + offset, y: up(value), width: wide / 2, height: base - up(value) }));
      }
    }
  }
  const notes = [];
  if (isValues) {
    const unit = Number.isFinite(found.high - found.low) ? 1 : 0.25; // the largest values lie too far apart to say
    const span = found.high * unit - found.low * unit;
    const at = (value) =>
      AREA.left + (span > 0 ? (value * unit - found.low * unit) / span : 0.5) * step * count;
    across(svg, ticks(found.low, found.high, AREA.width / 90), at);
    title(svg, "value");
    if (found.below) notes.push(`${plural(found.below, "value")} further below`);
    if (found.above) notes.push(`${plural(found.above, "value")} further above`);
  } else {
    const every = Math.max(Math.ceil(count / (AREA.width / 70)), 1);
    const places = stacks[0].map((_, index) => index).filter((index) => index % every === 0);
    across(svg, places, (index) => AREA.left + index * step, (index) => `2^${found.first + index}`.replace("-", "−"));
    title(svg, "magnitude");
    if (found.zeros) notes.push(`${plural(found.zeros, "zero")} not shown`);
  }
  const legend = make("p", { className: "legend" });
  if (!isValues) {
    legend.append(
      make("span", {}, make("span", { className: "key blue" }), "positive"),
      make("span", {}, make("span", { className: "key violet" }), "negative"),
    );
  }
  if (notes.length) legend.append(make("span", {}, notes.join(", ")));
  return [svg, legend];
}

function spectrumPart(body, data, head) {
  body.replaceChildren();
  const found = data.spectrum;
  if (!found) {
    body.append(make("p", { className: "note" }, `There are none: ${data.why}.`));
    return;
  }
  const plot = make("div", { className: "plot" });
  let scale = "linear";
  const draw = () => plot.replaceChildren(spectrumPlot(found, scale));
  body.append(
    facts([
      ["effective rank", figure(found.effective_rank)],
      ["stable rank", figure(found.stable_rank)],
      ["of", whole(found.full_rank)],
      ["largest", figure(found.values[0])],
    ]),
    plot,
  );
  for (const old of head.querySelectorAll("fieldset")) old.remove();
  head.append(pick("Singular values", [["linear", "linear"], ["log", "log"]], scale, (key) => ((scale = key), draw())));
  redraws.push(draw);
  draw();
}

function spectrumPlot(found, scale) {
  const base = AREA.height - AREA.bottom;
  const room = base - AREA.top;
  const most = found.values[0] || 1;
  const positive = found.values.filter((value) => value > 0);
  const least = Math.max(positive.length ? positive[positive.length - 1] : most / 10, most * 1e-8);
  const low = least < most ? least : most / 10;
  const up = (value) =>
    base - room * (scale === "log" ? Math.max(Math.log(Math.max(value, low) / low) / Math.log(most / low), 0) : value / most);
  const last = Math.max(found.full_rank, 2);
  const at = (place) => AREA.left + ((place - 1) / (last - 1)) * (AREA.width - AREA.left - AREA.right);
  const svg = frame(
    `Singular values: the largest ${figure(found.values[0])}, the least ${figure(found.values[found.values.length - 1])}, effective rank ${figure(found.effective_rank)} of ${found.full_rank}.`,
  );
  upward(svg, scale === "log" ? powers(low, most, 5) : ticks(0, most, 4), up);
  across(svg, ticks(1, last, AREA.width / 80).map(Math.round).filter((place, index, all) => place >= 1 && place !== all[index - 1]), at, whole);
  title(svg, "place");
  const points = found.places.map((place, index) => `${at(place).toFixed(1)},${up(found.values[index]).toFixed(1)}`);
  svg.append(drawn("polyline", { class: "line", points: points.join(" ") }));
  if (points.length === 1) svg.append(drawn("circle", { class: "blue", cx: at(1), cy: up(most), r: 4 }));
  return svg;
}

function unpacked(text) {
  const raw = atob(text);
  const buffer = new DataView(new ArrayBuffer(raw.length));
  for (let index = 0; index < raw.length; index++) buffer.setUint8(index, raw.charCodeAt(index));
  return Float32Array.from({ length: raw.length / 4 }, (_, index) => buffer.getFloat32(4 * index, true));
}

const dark = matchMedia("(prefers-color-scheme: dark)");

/** Blue below zero, orange above, the paper's colour between; for `rms` from the paper to blue. */
function colour(share, isMean) {
  const paper = dark.matches ? [20, 23, 26] : [255, 255, 255];
  const blue = dark.matches ? [108, 176, 255] : [11, 98, 196];
  const orange = dark.matches ? [240, 163, 94] : [190, 90, 0];
  const end = isMean && share > 0 ? orange : blue;
  const amount = Math.min(Math.abs(share), 1);
  return end.map((value, index) => Math.round(paper[index] + amount * (value - paper[index])));
}

function picturePart(body, data, head) {
  body.replaceChildren();
  const found = data.picture;
  if (!found) {
    body.append(make("p", { className: "note" }, "Values of this dtype are no numbers by themselves."));
    return;
  }
  const cells = { mean: unpacked(found.mean), rms: unpacked(found.rms) };
  const canvas = make("canvas", { width: found.width, height: found.height, role: "img" });
  canvas.style.height = `${Math.max(Math.min(found.height * 4, 340), 24)}px`;
  const legend = make("p", { className: "legend" });
  const draw = (kind) => {
    const own = cells[kind];
    const sizes = [...own].filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
    const end = sizes[Math.floor(0.995 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
    const context = canvas.getContext("2d");
    const image = context.createImageData(found.width, found.height);
    for (let index = 0; index < own.length; index++) {
      const shade = Number.isNaN(own[index]) ? [128, 128, 128] : colour(own[index] / end, kind === "mean");
      image.data.set([...shade, 255], 4 * index);
    }
    context.putImageData(image, 0, 0);
    canvas.setAttribute("aria-label",
      `Picture of ${found.rows} rows and ${found.columns} columns in ${found.height} by ${found.width} cells: ` +
      `${kind === "mean" ? "means" : "root mean squares"}, most of them up to ${figure(end, 3)} in size.`);
    const scale = make("canvas", { className: "scale", width: 64, height: 1, "aria-hidden": "true" });
    const strip = scale.getContext("2d").createImageData(64, 1);
    for (let index = 0; index < 64; index++) {
      strip.data.set([...colour(kind === "mean" ? (index - 31.5) / 31.5 : index / 63, kind === "mean"), 255], 4 * index);
    }
    scale.getContext("2d").putImageData(strip, 0, 0);
    legend.replaceChildren(
      make("span", {}, kind === "mean" ? `${figure(-end, 3)}` : "0"), scale, make("span", {}, figure(end, 3)),
      make("span", {}, `${plural(found.rows, "row")} down, ${plural(found.columns, "column")} across; ` +
        `a cell is ${whole(Math.ceil(found.rows / found.height))} × ${whole(Math.ceil(found.columns / found.width))} values`),
      found.nonfinite ? make("span", { className: "wrong" }, `${plural(found.nonfinite, "value")} not finite`) : "",
    );
  };
  let kind = "rms";
  const control = pick("Cells show", [["rms", "size"], ["mean", "mean"]], kind, (key) => draw((kind = key)));
  for (const old of head.querySelectorAll("fieldset")) old.remove();
  head.append(control);
  const repaint = () => draw(kind);
  dark.addEventListener("change", repaint);
  leaving.signal.addEventListener("abort", () => dark.removeEventListener("change", repaint), { once: true });
  body.append(make("div", { className: "map" }, canvas), legend);
  draw(kind);
}

// Begin

$("search").addEventListener("input", () => {
  tree.shut.clear();
  tree.box.scrollTop = 0;
  tree.active = 0;
  arrange();
});
for (const id of ["sort", "shape"]) $(id).addEventListener("change", () => ((tree.box.scrollTop = 0), arrange()));
$("of").addEventListener("change", () => {
  const of = Number($("of").value);
  location.hash = `#${new URLSearchParams({ of, ...(comparing() && state.against !== of ? { against: state.against } : {}) })}`;
});
$("against").addEventListener("change", () => {
  const words = new URLSearchParams(location.hash.slice(1));
  words.set("of", state.of);
  words.delete("against");
  if (Number($("against").value) >= 0) words.set("against", $("against").value);
  location.hash = `#${words}`;
});
$("survey").addEventListener("click", () => {
  if (state.survey && state.survey.going) {
    const { read, total } = state.survey;
    stopSurvey();
    state.survey = { stop: new AbortController(), job: null, read, total, whole: false, going: false };
    meter(state.survey);
  } else survey(true);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says where we are, and would say so no more
  $("details").focus();
});
$("back").addEventListener("click", () => {
  select(null);
  tree.box.focus();
});
window.addEventListener("hashchange", () => follow().catch(failed));
window.addEventListener("pagehide", () => {
  leave();
  stopSurvey();
});

function failed(error) {
  if (error.name !== "AbortError") $("status").textContent = seen(error.message);
}

async function begin() {
  await enter();
  const [, data] = await asked("checkpoints", {});
  state.checkpoints = data.checkpoints;
  if (!location.hash && state.checkpoints.length === 2) history.replaceState(null, "", "#of=0&against=1");
  await follow();
}

begin().catch(failed);
