"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

// What survives a reload of a live page. A file opened from disk may have no storage: then nothing does.
const memory = {
  get(key, area = "sessionStorage") { try { return window[area].getItem("wake2vec " + key); } catch { return null; } },
  set(key, value, area = "sessionStorage") { try { window[area].setItem("wake2vec " + key, value); } catch { /* kept nowhere */ } },
};

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(tag, attributes, parent) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

function format(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en");
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(5)));
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

class Chart {
  constructor(figure, spec) {
    this.spec = spec;
    this.plot = figure.querySelector(".plot");
    this.values = figure.querySelector(".values");
    this.hidden = new Set();
    const xs = spec.series.flatMap((s) => s.x);
    this.full = [Math.min(...xs), Math.max(...xs)];
    if (this.full[0] === this.full[1]) this.full = [this.full[0] - 0.5, this.full[1] + 0.5];
    const kept = JSON.parse(memory.get("zoom " + spec.id) || "null");
    this.range = kept && kept[1] <= this.full[1] ? kept : [...this.full];
    this.marks = [...new Set(xs)].sort((a, b) => a - b);
    this.at = null;
    this.addLegend(figure.querySelector(".legend"));
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  addLegend(place) {
    this.spec.series.forEach((series, index) => {
      const button = element("button", { type: "button", class: series.role, "aria-pressed": "true" }, series.name);
      button.addEventListener("click", () => {
        this.hidden.has(index) ? this.hidden.delete(index) : this.hidden.add(index);
        button.setAttribute("aria-pressed", String(!this.hidden.has(index)));
        this.draw();
      });
      place.append(button);
    });
  }

  get shown() { return this.spec.series.filter((_, index) => !this.hidden.has(index)); }

  yRange() {
    const ys = [];
    for (const series of this.shown) {
      series.x.forEach((x, i) => {
        if (x >= this.range[0] && x <= this.range[1]) ys.push(series.y[i], ...(series.lo ? [series.lo[i], series.hi[i]] : []));
      });
      if (series.dash) ys.push(series.y[0]);
    }
    let low = Math.min(...ys), high = Math.max(...ys);
    if (!ys.length) [low, high] = [0, 1];
    if (this.spec.zero) low = Math.min(0, low);
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
    const room = 0.06 * (high - low);
    return [this.spec.zero && low === 0 ? 0 : low - room, high + room];
  }

  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    if (!width || !height) return;
    const yAxis = this.yRange();
    const labels = ticks(...yAxis, Math.max(3, Math.round(height / 55)));
    const left = 14 + 7 * Math.max(...labels.map((v) => format(v).length)), right = 12, top = 8, bottom = 36;
    this.box = { left, right: width - right, top, bottom: height - bottom };
    this.px = (x) => left + (x - this.range[0]) / (this.range[1] - this.range[0]) * (width - left - right);
    this.py = (y) => height - bottom - (y - yAxis[0]) / (yAxis[1] - yAxis[0]) * (height - top - bottom);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-hidden", "true");
    const id = "clip-" + this.spec.id;
    shape("rect", { x: left - 5, y: top - 4, width: Math.max(0, width - left - right + 10), height: height - top - bottom + 8 }, shape("clipPath", { id }, shape("defs", {}, svg)));
    for (const y of labels) {
      shape("line", { class: "grid", x1: left, x2: width - right, y1: this.py(y), y2: this.py(y) }, svg);
      shape("text", { x: left - 6, y: this.py(y) + 4, "text-anchor": "end" }, svg).textContent = format(y);
    }
    for (const x of ticks(...this.range, Math.max(2, Math.floor(width / 90)))) {
      const at = Math.min(Math.max(this.px(x), left + 8), width - right - 12);
      shape("text", { x: at, y: height - bottom + 16, "text-anchor": "middle" }, svg).textContent = format(x);
    }
    shape("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, svg).textContent = this.spec.x;
    const inside = shape("g", { "clip-path": `url(#${id})` }, svg);
    for (const series of this.shown) this.drawSeries(series, inside);
    this.overlay = shape("g", {}, svg);
    this.plot.replaceChildren(svg);
    this.point();
  }

  drawSeries(series, parent) {
    const points = series.x.map((x, i) => [this.px(x), this.py(series.y[i])]);
    const group = shape("g", { class: series.role }, parent);
    if (series.lo) {
      const back = series.x.map((x, i) => `${this.px(x)},${this.py(series.lo[i])}`).reverse();
      shape("path", { class: "area", d: "M" + series.x.map((x, i) => `${this.px(x)},${this.py(series.hi[i])}`).concat(back).join("L") + "Z" }, group);
    }
    if (series.step && points.length > 1) {
      const half = (points[1][0] - points[0][0]) / 2, floor = this.py(0);
      const d = points.map(([x, y]) => `${x - half},${y}L${x + half},${y}`).join("L");
      shape("path", { class: "area", d: `M${points[0][0] - half},${floor}L${d}L${points.at(-1)[0] + half},${floor}Z` }, group);
      shape("path", { class: "line", d: "M" + d }, group);
    } else if (!series.dots) {
      shape("path", { class: "line", d: "M" + points.map((p) => p.join(",")).join("L"), ...(series.dash ? { "stroke-dasharray": "6 4" } : {}) }, group);
    }
    if (series.dots || (!series.step && !series.dash && points.length <= 30)) for (const [x, y] of points) shape("circle", { cx: x, cy: y, r: series.dots ? 4 : 2.8 }, group);
  }

  // Show the values at `this.at`, an index into the marks.
  point() {
    this.overlay.replaceChildren();
    if (this.at === null) { this.values.textContent = ""; return; }
    const x = this.marks[this.at];
    if (x < this.range[0] || x > this.range[1]) { this.values.textContent = ""; return; }
    shape("line", { class: "cursor", x1: this.px(x), x2: this.px(x), y1: this.box.top, y2: this.box.bottom }, this.overlay);
    const said = [];
    for (const series of this.shown) {
      const i = series.dash ? 0 : series.x.findLastIndex((at) => at <= x);
      if (i < 0) continue;
      const here = series.dash ? x : series.x[i];
      shape("circle", { cx: this.px(here), cy: this.py(series.y[i]), r: 4 }, shape("g", { class: series.role }, this.overlay));
      const interval = series.lo ? ` [${format(series.lo[i])}, ${format(series.hi[i])}]` : "";
      said.push(`${series.name} ${format(series.y[i])}${interval}${here === x ? "" : ` (at ${format(here)})`}`);
    }
    this.values.textContent = `${this.spec.x} ${format(x)}: ${said.join(", ")}`;
  }

  nearest(clientX) {
    const at = this.toValue(clientX);
    let best = null;
    this.marks.forEach((x, i) => { if (x >= this.range[0] && x <= this.range[1] && (best === null || Math.abs(x - at) < Math.abs(this.marks[best] - at))) best = i; });
    return best;
  }

  toValue(clientX) {
    const x = clientX - this.plot.getBoundingClientRect().left;
    const share = (x - this.box.left) / (this.box.right - this.box.left);
    return this.range[0] + Math.min(1, Math.max(0, share)) * (this.range[1] - this.range[0]);
  }

  zoom(low, high) {
    const [first, last] = this.full;
    const width = Math.max(high - low, (last - first) / 500);
    this.range = width >= last - first ? [first, last] : [Math.max(first, Math.min(low, last - width)), 0];
    if (width < last - first) this.range[1] = this.range[0] + width;
    memory.set("zoom " + this.spec.id, JSON.stringify(width < last - first ? this.range : null)); // all: of a longer run, more
    this.draw();
  }

  listen() {
    let from = null;
    this.plot.addEventListener("pointerdown", (event) => { if (event.button === 0) { from = event.clientX; if (event.pointerType === "mouse") this.plot.setPointerCapture(event.pointerId); } });
    this.plot.addEventListener("pointermove", (event) => {
      if (!this.box) return;
      this.at = this.nearest(event.clientX);
      this.point();
      if (from !== null && Math.abs(event.clientX - from) > 6) {
        const [a, b] = [this.px(this.toValue(from)), this.px(this.toValue(event.clientX))].sort((p, q) => p - q);
        shape("rect", { class: "select", x: a, y: this.box.top, width: b - a, height: this.box.bottom - this.box.top }, this.overlay);
      }
    });
    this.plot.addEventListener("pointerup", (event) => {
      if (from !== null && Math.abs(event.clientX - from) > 6) this.zoom(...[this.toValue(from), this.toValue(event.clientX)].sort((p, q) => p - q));
      from = null;
    });
    this.plot.addEventListener("pointercancel", () => { from = null; });
    this.plot.addEventListener("pointerleave", () => { if (document.activeElement !== this.plot) { this.at = null; if (this.overlay) this.point(); } });
    this.plot.addEventListener("dblclick", () => this.zoom(...this.full));
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const [low, high] = this.range, width = high - low, middle = this.at === null ? (low + high) / 2 : this.marks[this.at];
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (move !== undefined) {
      this.at = this.at === null ? (move > 0 ? 0 : this.marks.length - 1) : Math.min(this.marks.length - 1, Math.max(0, this.at + move));
      const x = this.marks[this.at];
      if (x < low || x > high) this.zoom(x - width / 2, x + width / 2); else this.point();
    } else if (event.key === "+" || event.key === "=") this.zoom(middle - width / 4, middle + width / 4);
    else if (event.key === "-") this.zoom(middle - width, middle + width);
    else if (event.key === "0" || event.key === "Escape") { this.at = null; this.zoom(...this.full); }
    else if (event.key === "Home") { this.at = 0; this.point(); }
    else if (event.key === "End") { this.at = this.marks.length - 1; this.point(); }
    else return;
    event.preventDefault();
  }
}

class Explorer {
  constructor(words) {
    this.columns = words;
    this.ids = new Map(words.words.map((word, id) => [word, id]));
    this.folded = words.words.map((word) => word.toLowerCase());
    this.input = document.getElementById("word");
    this.list = document.getElementById("matches");
    this.found = document.getElementById("found");
    this.chosen = -1;
    this.input.addEventListener("input", () => this.match());
    this.input.addEventListener("keydown", (event) => this.key(event));
    this.input.addEventListener("blur", () => setTimeout(() => this.close(), 150));
    document.querySelectorAll("button.word").forEach((button) => button.addEventListener("click", () => this.open(button.dataset.word)));
    const kept = memory.get("word");
    this.show(kept !== null && this.ids.has(kept) ? kept : this.commonest());
  }

  commonest() {
    let best = 0;
    this.columns.train.forEach((count, id) => { if (count > this.columns.train[best]) best = id; });
    return this.columns.words[best];
  }

  match() {
    const typed = this.input.value.normalize("NFC").trim().toLowerCase();
    this.list.replaceChildren();
    this.chosen = -1;
    if (!typed) { this.close(); return; }
    const starts = [], holds = [];
    for (let id = 0; id < this.folded.length && starts.length < 12; id++) {
      const at = this.folded[id].indexOf(typed);
      if (at === 0) starts.push(id); else if (at > 0 && holds.length < 12) holds.push(id);
    }
    const exact = this.ids.get(typed);
    const ids = [...new Set([...(exact === undefined ? [] : [exact]), ...starts, ...holds])].slice(0, 12);
    ids.forEach((id, row) => {
      const item = element("li", { role: "option", id: "match-" + row, "aria-selected": "false" }, this.columns.words[id]);
      item.addEventListener("pointerdown", (event) => { event.preventDefault(); this.open(this.columns.words[id]); });
      this.list.append(item);
    });
    if (!ids.length) this.list.append(element("li", { role: "option", "aria-disabled": "true", "aria-selected": "false" }, "none of the new words"));
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
  }

  key(event) {
    const items = [...this.list.querySelectorAll("li:not([aria-disabled])")];
    if (event.key === "Escape") this.close();
    else if (event.key === "Enter") {
      const word = items[Math.max(0, this.chosen)]?.textContent;
      if (!this.list.hidden && word) this.open(word);
    } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && items.length) {
      this.chosen = (this.chosen + (event.key === "ArrowDown" ? 1 : items.length - (this.chosen < 0 ? 0 : 1))) % items.length;
      items.forEach((item, row) => item.setAttribute("aria-selected", String(row === this.chosen)));
      items[this.chosen].scrollIntoView({ block: "nearest" });
      this.input.setAttribute("aria-activedescendant", items[this.chosen].id);
      event.preventDefault();
    }
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }

  open(word) {
    this.input.value = word;
    memory.set("word", word);
    this.close();
    this.show(word);
    this.found.scrollIntoView({ block: "nearest" });
  }

  show(word) {
    const c = this.columns, id = this.ids.get(word);
    const before = c.losses.before?.[id], after = c.losses.after?.[id];
    const facts = [
      ["in the text", `${format(c.train[id])} trained on, ${format(c.val[id])} held out`],
      ["loss on the held-out text", before == null || after == null ? "not in it" : `${format(before)} → ${format(after)} nats (step ${format(c.losses_step)})`],
    ];
    if (c.drift) facts.push(["drift since the start", `L2 ${format(c.drift.l2[id])}, cosine ${format(c.drift.cosine[id])}`]);
    const list = element("dl", {}, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
    const card = element("div", { class: "card" }, element("h3", {}, word), list);
    if (c.near) {
      const near = element("div", { class: "two" });
      near.append(this.neighbours("Nearest base tokens", c.near.base_ids[id].map((token) => this.token(c.near.base_tokens[token])), c.near.base_cosines[id]));
      near.append(this.neighbours("Nearest new words", c.near.new_ids[id].map((other) => this.link(c.words[other])), c.near.new_cosines[id]));
      card.append(near, element("p", { class: "quiet" }, `Cosines of input rows after step ${format(c.near.step)}.`));
    }
    this.found.replaceChildren(card);
  }

  token(text) {
    const shown = text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
    return element("span", { class: "token" }, shown || "(nothing visible)");
  }

  link(word) {
    const button = element("button", { type: "button", class: "word" }, word);
    button.addEventListener("click", () => this.open(word));
    return button;
  }

  neighbours(title, names, cosines) {
    const items = names.map((name, i) => {
      const meter = element("i");
      meter.style.width = Math.max(0, 100 * cosines[i]) + "%";
      return element("li", {}, name, element("span", { class: "meter", "aria-hidden": "true" }, meter), element("span", {}, cosines[i].toFixed(3)));
    });
    return element("div", {}, element("h4", {}, title), element("ul", { class: "near" }, ...items));
  }
}

function themes() {
  const button = document.getElementById("theme"), names = ["automatic", "light", "dark"];
  const set = (name) => {
    if (name === "automatic") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = name;
    button.textContent = "Colours: " + name;
    button.setAttribute("aria-label", "Colours: " + name);
    memory.set("theme", name, "localStorage");
  };
  let now = Math.max(0, names.indexOf(memory.get("theme", "localStorage")));
  set(names[now]);
  button.addEventListener("click", () => { now = (now + 1) % 3; set(names[now]); });
}

function live() {
  if (!data.reload_s) return;
  const beat = document.getElementById("beat");
  const tell = () => {
    const seconds = data.beat_unix_s === null ? null : Math.max(0, Math.round(Date.now() / 1000 - data.beat_unix_s));
    const age = seconds === null ? "" : seconds < 120 ? `${seconds} s` : seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
    beat.textContent = `Looks for news every ${data.reload_s} s.` + (age ? ` Last sign of life before this page was written: ${age} ago.` : "");
  };
  tell();
  setInterval(tell, 1000);
  const kept = Number(memory.get("scroll"));
  if (kept) { window.scrollTo(0, kept); memory.set("scroll", "0"); }
  setInterval(() => {
    if (document.activeElement?.id === "word" || document.hidden) return;
    memory.set("scroll", String(window.scrollY));
    location.reload();
  }, 1000 * data.reload_s);
}

themes();
const specs = new Map(data.charts.map((chart) => [chart.id, chart]));
document.querySelectorAll(".chart").forEach((figure) => new Chart(figure, specs.get(figure.dataset.chart)));
if (data.words) new Explorer(data.words);
live();
