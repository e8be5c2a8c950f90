"use strict";
/* Charts of a Miles run report: SVG from the data in the page, nothing loaded from elsewhere. */

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = { tall: 300, normal: 176 };
const PAD = { top: 12, right: 12, bottom: 24 };
const NEAR = 24;
const SMALL = 1e-3, LARGE = 1e5;

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(node.style, value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function shape(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

function number(value) {
  if (value === null || value === undefined) return "—";
  const size = Math.abs(value);
  if (size !== 0 && (size < SMALL || size >= 1e7)) {
    return value.toExponential(size < SMALL ? 1 : 2).replace(/\.0+e/, "e").replace("e+", "e");
  }
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

const inUnit = (value, unit) => {
  if (value === null || value === undefined) return "—";
  if (unit === "share") return `${number(100 * value)} %`;
  return unit === "s" ? `${number(value)} s` : number(value);
};

/* The smallest of 1, 2, 5 × 10ⁿ that makes at most `most` steps. */
function niceStep(span, most) {
  const raw = span / most, power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
}

/* The scale ends at `most` where it is given: the largest value there can be. */
function linearScale(lowest, highest, zero, pixels, most) {
  let low = zero ? Math.min(0, lowest) : lowest, high = highest;
  if (low === high) { const room = Math.abs(low) * 0.1; high += room || 1; low -= zero ? 0 : room; }
  const step = niceStep(high - low, Math.max(2, pixels / 44));
  low = Math.floor(low / step + 1e-6) * step;
  high = Math.min(Math.ceil(high / step - 1e-6) * step, most ?? Infinity);
  const ticks = [];
  for (let tick = low; tick <= high + step / 2; tick += step) ticks.push(Math.abs(tick) < step / 1e6 ? 0 : tick);
  return { at: (value) => (value - low) / (high - low), ticks };
}

function logScale(lowest, highest) {
  const low = Math.floor(Math.log10(lowest)), high = Math.max(low + 1, Math.ceil(Math.log10(highest)));
  const every = Math.ceil((high - low) / 6), ticks = [];
  for (let power = low; power <= high; power += every) ticks.push(10 ** power);
  const at = (value) => (value > 0 ? Math.max(0, (Math.log10(value) - low) / (high - low)) : 0);
  return { at, ticks };
}

class Chart {
  static all = [];

  constructor(chart, columns) {
    this.chart = chart;
    this.columns = columns;
    this.stacked = chart.series.some((series) => series.style === "bar");
    const unit = chart.unit === "share" ? "" : chart.unit;
    const heading = element("h3", {}, chart.title, " ", element("span", { className: "unit" }, unit));
    this.legend = element("div", { className: "legend" });
    this.height = chart.tall ? HEIGHT.tall : HEIGHT.normal;
    this.plot = element("div", { style: { height: `${this.height}px` } });
    this.tip = element("div", { className: "tip", hidden: true });
    const wide = chart.wide || chart.tall ? " wide" : "";
    this.node = element("div", { className: `card chart${wide}` }, element("div", { className: "top" }, heading, this.legend));
    if (chart.text) this.node.append(element("p", { className: "text" }, chart.text));
    this.node.append(this.plot, this.tip);
    this.fillLegend();
    this.plot.addEventListener("pointermove", (event) => this.hover(event));
    this.plot.addEventListener("pointerleave", () => Chart.all.forEach((other) => other.clear()));
    new ResizeObserver(() => this.draw()).observe(this.plot);
    Chart.all.push(this);
  }

  color(series) { return `var(--${typeof series.color === "number" ? `c${series.color}` : series.color})`; }

  key(series) { return element("i", { className: `key ${series.style}`, style: { background: this.color(series) } }); }

  fillLegend() {
    const { series, unit } = this.chart;
    for (const one of series) {
      const label = element("span", {}, this.key(one), one.name);
      const last = one.y.filter((value) => value !== null).at(-1);
      if (!this.stacked && one.style !== "faint") label.append(element("b", { title: "last" }, inUnit(last, unit)));
      this.legend.append(label);
    }
  }

  /* Bars are clipped where one slow rollout (the first, often) would flatten all others. */
  range() {
    const { series, lines, log } = this.chart;
    if (this.stacked) {
      const sums = series[0].y.map((_, i) => series.reduce((sum, one) => sum + (one.y[i] ?? 0), 0));
      const usual = [...sums].sort((a, b) => a - b)[Math.floor(0.9 * (sums.length - 1))];
      return [0, Math.min(Math.max(...sums), 2.5 * usual) || 1];
    }
    let values = series.flatMap((one) => [one.y, one.lo ?? [], one.hi ?? []].flat()).filter((value) => value !== null);
    values = values.concat(lines.map((line) => line.y));
    if (log) values = values.filter((value) => value > 0).concat(lines.map((line) => line.y / 100));
    let low = Infinity, high = -Infinity;
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
    return low <= high ? [low, high] : [log ? 1e-7 : 0, 1];
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    const { chart, height } = this;
    const inner = height - PAD.top - PAD.bottom;
    const scale = chart.log ? logScale(...this.range()) : linearScale(...this.range(), chart.zero, inner, chart.most);
    const label = (tick) => (chart.log ? tick.toExponential(0).replace("e+", "e") : inUnit(tick, chart.unit));
    const left = 12 + 6.8 * Math.max(...scale.ticks.map((tick) => label(tick).length));
    const [first, last] = this.span();
    this.x = (id) => left + (width - left - PAD.right) * ((id - first) / (last - first || 1));
    this.y = (value) => PAD.top + inner * (1 - scale.at(value));
    this.bottom = PAD.top + inner;
    this.width = width;

    const svg = shape("svg", { width, height, role: "img", "aria-label": chart.title });
    for (const tick of scale.ticks) {
      const y = this.y(tick);
      svg.append(shape("line", { x1: left, x2: width - PAD.right, y1: y, y2: y, stroke: "var(--grid)" }));
      svg.append(shape("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, label(tick)));
    }
    this.drawX(svg, first, last, left, width);
    for (const line of chart.lines) this.drawReference(svg, line, left, width);
    if (this.stacked) this.drawBars(svg);
    else chart.series.forEach((series) => this.drawSeries(svg, series));
    this.cross = shape("line", { y1: PAD.top, y2: this.bottom, stroke: "var(--faint)", visibility: "hidden" });
    svg.append(this.cross);
    this.plot.replaceChildren(svg);
  }

  /* All charts share the rollout axis, so that the crosshair means the same rollout in each. */
  span() {
    const ids = Object.values(this.columns).flatMap((column) => [...column.first, ...column.last]);
    const first = Math.min(...ids), last = Math.max(...ids);
    return this.stacked ? [first - 0.5, last + 0.5] : [first, last];
  }

  drawX(svg, first, last, left, width) {
    const step = Math.max(1, niceStep(last - first || 1, Math.max(2, (width - left) / 80)));
    for (let tick = Math.ceil(first / step) * step || 0; tick <= last; tick += step) {
      const end = this.x(tick) > width - 24;
      const attributes = { x: this.x(tick), y: this.bottom + 18, "text-anchor": end ? "end" : "middle" };
      svg.append(shape("text", attributes, tick.toLocaleString("en-US")));
    }
  }

  drawReference(svg, line, left, width) {
    const y = this.y(line.y);
    svg.append(shape("line", { x1: left, x2: width - PAD.right, y1: y, y2: y, stroke: "var(--warn)", "stroke-dasharray": "4 4" }));
    svg.append(shape("text", { x: width - PAD.right, y: y > PAD.top + 14 ? y - 5 : y + 14, "text-anchor": "end", class: "reference" }, line.label));
  }

  middle(series, i) {
    const { first, last } = this.columns[series.x];
    return (first[i] + last[i]) / 2;
  }

  drawSeries(svg, series) {
    const color = this.color(series), faint = series.style === "faint";
    const runs = [];
    series.y.forEach((value, i) => {
      if (value === null) runs.push([]);
      else (runs.length ? runs : (runs.push([]), runs)).at(-1).push(i);
    });
    const point = (i, value) => `${this.x(this.middle(series, i)).toFixed(1)},${this.y(value).toFixed(1)}`;
    for (const run of runs.filter((one) => one.length)) {
      if (series.lo) {
        const band = [...run.map((i) => point(i, series.hi[i])), ...[...run].reverse().map((i) => point(i, series.lo[i]))];
        svg.append(shape("polygon", { points: band.join(" "), fill: color, opacity: faint ? 0.12 : 0.18 }));
      }
      const path = { points: run.map((i) => point(i, series.y[i])).join(" "), fill: "none", stroke: color, "stroke-linejoin": "round" };
      const thick = series.style === "line" ? 1.8 : 1.3;
      svg.append(shape("polyline", { ...path, "stroke-width": thick, opacity: faint ? 0.38 : 1 }));
      if (series.style === "dots" || run.length === 1) this.drawDots(svg, series, run, color);
    }
    for (const i of series.bad ?? []) this.drawCross(svg, this.x(this.middle(series, i)));
  }

  drawDots(svg, series, run, color) {
    if (series.style === "dots" && run.length > 80) return;
    for (const i of run) {
      const place = { cx: this.x(this.middle(series, i)), cy: this.y(series.y[i]), r: series.style === "dots" ? 4 : 3 };
      svg.append(shape("circle", { ...place, fill: color, stroke: "var(--card)", "stroke-width": 1.5 }));
    }
  }

  drawCross(svg, x) {
    const y = this.bottom - 5;
    svg.append(shape("path", { d: `M${x - 4},${y - 4}l8,8m0,-8l-8,8`, stroke: "var(--bad)", "stroke-width": 1.8 }));
  }

  drawBars(svg) {
    const { first, last } = this.columns.bar;
    first.forEach((id, i) => {
      const from = this.x(id - 0.5), to = this.x(last[i] + 0.5), gap = Math.min(2, (to - from) / 5);
      let sum = 0;
      for (const series of this.chart.series) {
        const value = series.y[i] ?? 0;
        const low = Math.max(PAD.top, this.y(sum)), high = Math.max(PAD.top, this.y(sum + value));
        sum += value;
        const box = { x: from + gap / 2, width: Math.max(0.5, to - from - gap), y: high, height: Math.max(0, low - high) };
        if (box.height > 0) svg.append(shape("rect", { ...box, fill: this.color(series) }));
      }
      if (this.y(sum) < PAD.top - 1) {
        const x = (from + to) / 2;
        svg.append(shape("path", { d: `M${x - 4},${PAD.top - 3}l4,-5l4,5z`, fill: "var(--soft)" }));
      }
    });
  }

  hover(event) {
    if (!this.x) return;
    const pixel = event.clientX - this.plot.getBoundingClientRect().left;
    const rows = [];
    let nearest = null;
    for (const series of this.chart.series) {
      const i = this.nearest(series, pixel);
      if (i === null) continue;
      const distance = Math.abs(this.x(this.middle(series, i)) - pixel);
      if (series.style === "dots" && distance > NEAR && this.chart.series.some((one) => one.style !== "dots")) continue;
      rows.push([series, i]);
      const better = nearest === null || (series.style !== "dots" && nearest.series.style === "dots");
      if (better) nearest = { series, i };
    }
    if (nearest === null) return;
    const at = this.middle(nearest.series, nearest.i);
    Chart.all.forEach((other) => other.mark(at));
    this.showTip(nearest, rows, this.x(at));
  }

  nearest(series, pixel) {
    let best = null, distance = Infinity;
    series.y.forEach((_, i) => {
      const far = Math.abs(this.x(this.middle(series, i)) - pixel);
      if (far < distance) { distance = far; best = i; }
    });
    return best;
  }

  name(series, i) {
    const { first, last } = this.columns[series.x];
    return first[i] === last[i] ? rolloutName(first[i]) : `rollouts ${first[i]}–${last[i]}`;
  }

  showTip(nearest, rows, x) {
    const where = this.name(nearest.series, nearest.i);
    const lines = rows.map(([series, i]) => {
      const bad = (series.bad ?? []).includes(i) ? "not finite" : null;
      const spread = series.lo && series.lo[i] !== series.hi[i] ? ` (${inUnit(series.lo[i], this.chart.unit)} … ${inUnit(series.hi[i], this.chart.unit)})` : "";
      const other = this.name(series, i) === where ? "" : ` at ${this.name(series, i).replace(/rollouts? /, "")}`;
      return element("div", {}, this.key(series), series.name + other, element("b", {}, bad ?? inUnit(series.y[i], this.chart.unit) + spread));
    });
    if (this.stacked) {
      const sum = rows.reduce((total, [series, i]) => total + (series.y[i] ?? 0), 0);
      lines.reverse().push(element("div", {}, "total", element("b", {}, inUnit(sum, this.chart.unit))));
    }
    this.tip.replaceChildren(element("div", { className: "head" }, where), ...lines);
    this.tip.hidden = false;
    const offset = this.plot.offsetLeft + x, room = this.tip.offsetWidth + 14;
    const left = offset + room > this.node.clientWidth ? offset - room : offset + 14;
    Object.assign(this.tip.style, { left: `${Math.max(0, left)}px`, top: `${this.plot.offsetTop + 8}px` });
  }

  mark(id) {
    if (!this.cross) return;
    const x = this.x(id);
    this.cross.setAttribute("x1", x);
    this.cross.setAttribute("x2", x);
    this.cross.setAttribute("visibility", "visible");
  }

  clear() {
    this.tip.hidden = true;
    this.cross?.setAttribute("visibility", "hidden");
  }
}

function rolloutName(id) { return id < 0 ? "before training" : `rollout ${id.toLocaleString("en-US")}`; }

function pageData(id) { return JSON.parse(document.getElementById(id).textContent); }

function drawCharts() {
  const { x, sections } = pageData("chart-data");
  for (const [name, charts] of Object.entries(sections)) {
    const place = document.getElementById(`charts-${name}`);
    place?.classList.toggle("pairs", charts.length === 4);
    if (place) charts.forEach((chart) => place.append(new Chart(chart, x).node));
  }
}

/* Follows the system until the button is pressed. */
function themes() {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const apply = (dark) => { root.classList.toggle("dark", dark); button.textContent = dark ? "Light" : "Dark"; };
  const follow = () => apply(system.matches);
  follow();
  system.addEventListener("change", follow);
  button.addEventListener("click", () => {
    system.removeEventListener("change", follow);
    apply(!root.classList.contains("dark"));
  });
}

themes();
drawCharts();
