"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const metricText = (value) => Number(value.toPrecision(5)).toString();
const redraws = [];

// ---- small helpers

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "text", "g", "rect"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function showTip(text, event) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 6))}px`;
  tip.style.top = `${event.clientY - box.height - 12 < 4 ? event.clientY + 18 : event.clientY - box.height - 12}px`;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// ---- scales

function niceTicks(low, high, count) {
  const rough = (high - low || Math.abs(high) || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
    for (const n of [1, 2, 5]) if (n * 10 ** p >= low && n * 10 ** p <= high) ticks.push(n * 10 ** p);
  return ticks.length > 2 ? ticks : niceTicks(low, high, 4);
}

function scale(low, high, from, to, log) {
  const f = log ? Math.log : (v) => v;
  const span = f(high) - f(low) || 1;
  return (value) => from + ((f(value) - f(low)) / span) * (to - from);
}

// A frame with axes; returns the svg and the two scales.
function axes(parent, { x, y, height, label }) {
  const width = Math.max(parent.clientWidth, 240);
  const box = { left: 58, right: width - 12, top: 12, bottom: height - 38 };
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  const sx = scale(x.low, x.high, box.left, box.right, x.log);
  const sy = scale(y.low, y.high, box.bottom, box.top, y.log);
  const xTicks = x.log ? logTicks(x.low, x.high) : niceTicks(x.low, x.high, width / 110);
  const yTicks = y.log ? logTicks(y.low, y.high) : niceTicks(y.low, y.high, height / 40);
  for (const tick of yTicks) {
    svg.append(make("line", { class: "grid", x1: box.left, x2: box.right, y1: sy(tick), y2: sy(tick) }));
    svg.append(make("text", { x: box.left - 8, y: sy(tick) + 4, "text-anchor": "end" }, y.text(tick)));
  }
  let last = -Infinity;
  for (const tick of xTicks) {
    if (sx(tick) - last < 44) continue;
    last = sx(tick);
    svg.append(make("text", { x: last, y: box.bottom + 18, "text-anchor": "middle" }, x.text(tick)));
  }
  svg.append(make("line", { class: "grid", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  svg.append(make("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, x.label));
  parent.replaceChildren(svg);
  return { svg, sx, sy, box, width };
}

function path(points, sx, sy) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${sx(x).toFixed(1)} ${sy(y).toFixed(1)}`).join("");
}

function range(values, share = 0.06) {
  const low = Math.min(...values), high = Math.max(...values);
  const room = (high - low || Math.abs(high) || 1) * share;
  return { low: low - room, high: high + room };
}

// ---- curves over the steps

function curve(parent, { points, kind, title, text, tick, fromZero, steps, dashed, canLog }) {
  const head = make("figcaption", {}, make("span", {}, title));
  const place = make("div");
  let log = false;
  if (canLog) {
    const toggle = make("button", { type: "button", "aria-pressed": "false" }, "log scale");
    toggle.onclick = () => { log = !log; toggle.textContent = log ? "linear scale" : "log scale"; draw(); };
    head.append(toggle);
  }
  parent.append(make("figure", { class: "chart" }, head, place));
  function draw() {
    const values = points.map((p) => p[1]).concat(dashed === null ? [] : [dashed]);
    const y = range(values);
    if (fromZero) y.low = 0;
    if (log) Object.assign(y, { low: Math.min(...values) / 1.25, high: Math.max(...values) * 1.1 });
    const x = { low: steps[0], high: steps[1], label: "step", text: (v) => short.format(v) };
    const frame = axes(place, { x, y: { ...y, log, text: tick }, height: 220, label: `${title} over the steps` });
    const { svg, sx, sy, box, width } = frame;
    if (dashed !== null) {
      svg.append(make("line", { class: "dashed", x1: box.left, x2: box.right, y1: sy(dashed), y2: sy(dashed) }));
      svg.append(make("text", { x: box.right, y: sy(dashed) - 5, "text-anchor": "end" }, `target ${text(dashed)}`));
    }
    svg.append(make("path", { class: `curve ${kind}`, d: path(points, sx, sy) }));
    if (points.length === 1) svg.append(make("circle", { class: `dot ${kind}`, r: 4, cx: sx(points[0][0]), cy: sy(points[0][1]) }));
    const cursor = make("line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" });
    const dot = make("circle", { class: `dot ${kind}`, r: 4, visibility: "hidden" });
    svg.append(cursor, dot);
    svg.onpointermove = (event) => {
      const at = ((event.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width) * width;
      const near = points.reduce((a, b) => (Math.abs(sx(b[0]) - at) < Math.abs(sx(a[0]) - at) ? b : a));
      for (const [name, value] of [["x1", sx(near[0])], ["x2", sx(near[0])], ["visibility", "visible"]]) cursor.setAttribute(name, value);
      for (const [name, value] of [["cx", sx(near[0])], ["cy", sy(near[1])], ["visibility", "visible"]]) dot.setAttribute(name, value);
      showTip(`step ${whole.format(near[0])}: ${text(near[1])}`, event);
    };
    svg.onpointerleave = () => {
      tip.hidden = true;
      cursor.setAttribute("visibility", "hidden");
      dot.setAttribute("visibility", "hidden");
    };
  }
  redraws.push(draw);
}

function curves(parent) {
  const bytes = (v) => `${whole.format(Math.round(v))} bytes`;
  const all = [...data.nbytes, ...data.values].map((p) => p[0]);
  if (!all.length) return;
  const steps = [Math.min(...all), Math.max(...all, Math.min(...all) + 1)];
  if (data.nbytes.length)
    curve(parent, {
      points: data.nbytes, kind: "first", title: "Packed file, bytes", text: bytes, tick: (v) => short.format(v),
      fromZero: true, steps, dashed: data.target, canLog: true,
    });
  if (data.values.length)
    curve(parent, {
      points: data.values, kind: "second", title: data.metric, text: metricText, tick: metricText,
      fromZero: false, steps, dashed: null, canLog: false,
    });
}

// ---- the front of the metric against bytes

function frontier(parent) {
  const place = make("div");
  const said = make("p", { class: "note" });
  said.textContent = data.runs
    ? "Each point is the end of a run. The line joins those that no other beats in both the metric and bytes."
    : "Each point is a validation. The line joins those that no other beats in both the metric and bytes; a ring is a checkpoint that was kept.";
  parent.append(make("figure", { class: "chart" }, make("figcaption", {}, make("span", {}, data.metric)), place), said);
  redraws.push(() => {
    const sizes = data.points.map((p) => p[0]);
    const x = { low: Math.min(...sizes) / 1.15, high: Math.max(...sizes) * 1.15, log: true, label: "bytes of the packed file, log scale", text: (v) => short.format(v) };
    const y = { ...range(data.points.map((p) => p[1]), 0.1), text: metricText };
    const { svg, sx, sy, box, width } = axes(place, { x, y, height: 320, label: `${data.metric} against bytes` });
    const line = data.front.flatMap((p, i) => (i ? [[p[0], data.front[i - 1][1]], p] : [p]));
    svg.append(make("path", { class: "curve second", d: path(line, sx, sy) }));
    for (const p of data.points) svg.append(make("circle", { class: "seen", r: 3.5, cx: sx(p[0]), cy: sy(p[1]) }));
    for (const p of data.front) svg.append(make("circle", { class: "best", r: 4.5, cx: sx(p[0]), cy: sy(p[1]) }));
    for (const p of data.points.filter((q) => q[3] && !data.runs)) svg.append(make("circle", { class: "kept", r: 7.5, cx: sx(p[0]), cy: sy(p[1]) }));
    if (data.runs)
      for (const p of data.points) {
        const end = sx(p[0]) > box.right - 90;
        svg.append(make("text", { x: sx(p[0]) + (end ? -9 : 9), y: sy(p[1]) + 15, "text-anchor": end ? "end" : "start" }, p[3]));
      }
    svg.onpointermove = (event) => {
      const at = svg.getBoundingClientRect();
      const [px, py] = [((event.clientX - at.left) / at.width) * width, event.clientY - at.top];
      const distance = (p) => Math.hypot(sx(p[0]) - px, sy(p[1]) - py);
      const near = data.points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
      if (distance(near) > 40) return void (tip.hidden = true);
      showTip(`${metricText(near[1])} at ${whole.format(near[0])} bytes, step ${whole.format(near[2])}${near[3] ? `: ${near[3]}` : ""}`, event);
    };
    svg.onpointerleave = () => { tip.hidden = true; };
  });
}

// ---- the bits of each channel over time

const viridis = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const REMOVED = 255;

function ramp(share) {
  const stops = isDark() ? viridis : [...viridis].reverse();
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2);
  const mix = (at) => {
    const [a, b] = [stops[i], stops[i + 1]].map((stop) => parseInt(stop.slice(at, at + 2), 16));
    return Math.round(a + (b - a) * (place - i));
  };
  return `rgb(${mix(1)} ${mix(3)} ${mix(5)})`;
}

function decoded(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}

function bitsPicture(parent) {
  const { steps, step: unit } = data.bits;
  const layers = data.bits.layers.map((layer) => ({ name: layer.name, frames: layer.frames.map(decoded) }));
  const most = Math.max(1, ...layers.flatMap((l) => l.frames.flatMap((f) => [...f].filter((v) => v !== REMOVED)))) * unit;
  const total = layers.reduce((n, l) => n + Math.max(...l.frames.map((f) => f.length)), 0);
  const cell = total > 20000 ? 4 : total > 4000 ? 6 : total > 800 ? 9 : 12;
  const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "step" });
  const output = make("output");
  const play = make("button", { type: "button" }, "Play");
  const rows = layers.map((layer) => {
    const counts = make("span");
    const canvas = make("canvas", { role: "img", "aria-label": `bits of the channels of ${layer.name}` });
    return { ...layer, counts, canvas, node: make("div", { class: "layer" }, make("p", {}, make("span", {}, layer.name), counts), canvas) };
  });
  const gradient = make("canvas", { width: 180, height: 12 });
  const legend = make("div", { class: "legend" },
    make("span", {}, "0 bits", gradient, `${Number(most.toFixed(1))}`),
    make("span", {}, make("i", { class: "dead" }), "dead, 0 bits"),
    make("span", {}, make("i"), "removed"));
  parent.append(make("div", { class: "slider" }, play, slider, output), legend, ...rows.map((row) => row.node));
  parent.append(make("p", { class: "note" },
    "Bits that one weight of the channel takes in the file."));
  if (data.bits.left_out)
    parent.append(make("p", { class: "note" }, `Of the epochs ${steps.length} are shown, evenly spread; ${data.bits.left_out} are left out.`));

  function drawLayer(row, frame) {
    const values = row.frames[frame];
    const width = row.canvas.parentNode.clientWidth, dense = devicePixelRatio || 1;
    const columns = Math.max(1, Math.floor(width / cell));
    const height = Math.max(1, Math.ceil(values.length / columns)) * cell;
    Object.assign(row.canvas, { width: width * dense, height: height * dense });
    row.canvas.style.height = `${height}px`;
    const pen = row.canvas.getContext("2d");
    pen.scale(dense, dense);
    const [gap, soft] = [colour("--gap"), colour("--soft")];
    let left = 0, sum = 0;
    values.forEach((value, i) => {
      const [x, y, side] = [(i % columns) * cell, Math.floor(i / columns) * cell, cell - (cell > 6 ? 2 : 1)];
      if (value === REMOVED || value === 0) {
        pen.strokeStyle = value ? gap : soft;
        pen.lineWidth = 1;
        if (cell > 4) pen.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
        if (!value) { pen.fillStyle = soft; pen.fillRect(x + side / 2 - 1, y + side / 2 - 1, 2, 2); }
      } else {
        left += 1;
        sum += value * unit;
        pen.fillStyle = ramp((value * unit) / most);
        pen.fillRect(x, y, side, side);
      }
    });
    row.counts.textContent = `${whole.format(left)} of ${whole.format(values.length)}${left ? `, ${(sum / left).toFixed(1)} bits` : ""}`;
    row.canvas.onpointermove = (event) => {
      const i = Math.floor(event.offsetY / cell) * columns + Math.floor(event.offsetX / cell);
      if (event.offsetX >= columns * cell || i >= values.length) return void (tip.hidden = true);
      const value = values[i];
      const state = value === REMOVED ? "removed" : value === 0 ? "dead, 0 bits" : `${(value * unit).toFixed(2)} bits`;
      showTip(`${row.name}, channel ${i}: ${state}`, event);
    };
    row.canvas.onpointerleave = () => { tip.hidden = true; };
  }

  function draw() {
    const frame = Number(slider.value);
    output.textContent = `step ${whole.format(steps[frame])}`;
    const pen = gradient.getContext("2d");
    for (let i = 0; i < 180; i++) { pen.fillStyle = ramp(i / 179); pen.fillRect(i, 0, 1, 12); }
    for (const row of rows) drawLayer(row, frame);
  }
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  play.onclick = () => {
    if (timer) return stop();
    if (Number(slider.value) === steps.length - 1) slider.value = 0;
    play.textContent = "Pause";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      draw();
      if (Number(slider.value) === steps.length - 1) stop();
    }, Math.max(60, 4000 / steps.length));
  };
  slider.oninput = () => { stop(); draw(); };
  redraws.push(draw);
}

// ---- the page

const theme = document.getElementById("theme");
function redraw() {
  theme.textContent = isDark() ? "Light" : "Dark";
  for (const draw of redraws) draw();
}
theme.onclick = () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  redraw();
};
const parts = { curves, front: frontier, bits: bitsPicture };
for (const [name, draw] of Object.entries(parts)) {
  const place = document.getElementById(name);
  if (place) draw(place);
}
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
redraw();
