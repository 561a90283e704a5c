"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

function values(text, Type) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Type(bytes.buffer);
}

/* Draw an image of one byte a pixel, enlarged so that marks on it are thin; returns the context and the enlargement. */
function paint(canvas, image) {
  const [height, width] = image.shape;
  const shown = typeof image.values === "string" ? values(image.values, Uint8Array) : image.values;
  const small = document.createElement("canvas"), times = Math.max(1, Math.round(480 / width));
  small.width = width;
  small.height = height;
  const pixels = new ImageData(width, height);
  shown.forEach((value, i) => pixels.data.set([value, value, value, 255], 4 * i));
  small.getContext("2d").putImageData(pixels, 0, 0);
  canvas.width = width * times;
  canvas.height = height * times;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  return [context, times];
}

function box([context, times], [y, x, height, width], color) {
  context.strokeStyle = color;
  context.lineWidth = Math.max(2, context.canvas.width / 200);
  context.strokeRect(x * times, y * times, width * times, height * times);
}

const percent = (share) => `${(100 * share).toFixed(2)} %`;
const count = (n) => n.toLocaleString("en");

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  for (; bytes >= 1000 && i < units.length - 1; i++) bytes /= 1000;
  return `${bytes.toPrecision(3)} ${units[i]}`;
}

/* The rows and columns of a window: about the center of all patterns, moved inside the detector. */
function place(shape) {
  return shape.map((n, i) => {
    const full = data.detector[i];
    return Math.min(Math.max(0, Math.round(data.center[i]) - Math.floor(n / 2)), full - n);
  });
}

function show(shape, origin, kept, line) {
  at("shown-window").textContent = `${shape[0]} x ${shape[1]} px`;
  at("shown-retention").textContent = `mean ${percent(kept.mean)}, min ${percent(kept.min)}`;
  const share = (shape[0] * shape[1]) / (data.detector[0] * data.detector[1]);
  const bytes = shape[0] * shape[1] * data.n * data.itemsize;
  let text = `${percent(share)} of the pixels, ${size(bytes)} before compression`;
  if (kept.below !== undefined) {
    text += `; ${count(kept.below)} of ${count(data.filled)} patterns keep less than ${data.minimum}, `;
    text += `${count(kept.short)} less than the target ${data.target}`;
  }
  at("shown-rest").textContent = text;
  at("line").textContent = line;
  for (const name of ["mean", "maximum"]) {
    box(paint(at(name), data[`${name}_pattern`]), [...origin, ...shape], "#0dd");
  }
  drawn = { shape, origin };
  pattern();
}

/* The sampled pattern nearest to the chosen position, with its window. */
function pattern() {
  const small = data.thumbnails;
  if (!small.values) return;
  const nearest = (indices, wanted) => indices.reduce(
    (best, index, i) => (Math.abs(index - wanted) < Math.abs(indices[best] - wanted) ? i : best), 0);
  const columns = data.lead[1], every = data.every;
  const place = data.is_list ? [selected * every] :
    [Math.floor(selected / columns) * every, (selected % columns) * every];
  const i = nearest(small.rows, place[0]), j = data.is_list ? 0 : nearest(small.columns, place[1]);
  const number = data.is_list ? i : i * small.columns.length + j;
  const [height, width] = small.shape, start = number * height * width;
  const image = { shape: small.shape, values: images.subarray(start, start + height * width) };
  const shown = data.is_list ? [small.rows[i]] : [small.rows[i], small.columns[j]];
  const index = data.is_list ? Math.floor(shown[0] / every) :
    Math.floor(shown[0] / every) * columns + Math.floor(shown[1] / every);
  const origin = drawn.origin.map((first, axis) => windows.length === 0 ? first :
    windows[axis][index] + Math.floor(data.window[axis] / 2) - Math.floor(drawn.shape[axis] / 2));
  box(paint(at("pattern"), image), [...origin, ...drawn.shape].map((n) => n / small.cell), "#0dd");
  const where = data.is_list ? `pattern ${shown[0]}` : `row ${shown[0]}, column ${shown[1]}`;
  at("pattern-of").textContent = small.cell > 1 ? `${where}, ${small.cell} x ${small.cell} px binned` : where;
}

function command(n, kept) {
  const least = Math.floor(1e4 * kept.min) / 1e4;
  const low = kept.min < data.minimum ? ` validate.min_retention=${least}` : "";
  return `stem-dask crop ${data.input} ${data.stem}_${n}.zarr --size ${n}${low}${data.options}`;
}

function choose(n) {
  n = Math.max(data.step, Math.round(n / data.step) * data.step);
  at("size").value = at("number").value = n;
  const radius = Math.min(n >> 1, data.curve.mean.length - 1), kept = {};
  for (const name of ["mean", "min", "below", "short"]) kept[name] = data.curve[name][radius];
  const shape = data.detector.map((full) => Math.min(n, full));
  const text = shape[0] === shape[1] ? command(n, kept) : command(n, kept).replace(
    `--size ${n}`, `crop.size=[${shape}]`);
  show(shape, place(shape), kept, text);
}

function look(index) {
  const [rows, columns] = data.lead, chosen = Math.min(Math.max(index, 0), rows * columns - 1);
  selected = chosen;
  const where = data.is_list ? `pattern ${chosen * data.every}` :
    `row ${Math.floor(chosen / columns) * data.every}, column ${(chosen % columns) * data.every}`;
  const words = Object.entries(maps).map(([name, map]) => `${name} ${Number(map[chosen].toPrecision(6))}`);
  at("position").textContent = `${where}: ${words.join(", ")}`;
  const context = paint(at("specimen"), data.specimen);
  for (const [y, x] of data.worst) box(context, [y - 0.5, x - 0.5, 2, 2], "#f44");
  box(context, [Math.floor(chosen / columns) - 0.5, (chosen % columns) - 0.5, 2, 2], "#0d0");
  pattern();
}

let selected = 0, drawn = {}, maps = {}, windows = [], images;

if (data.detector) {
  at("size").addEventListener("input", (event) => choose(Number(event.target.value)));
  at("number").addEventListener("change", (event) => choose(Number(event.target.value)));
  at("targets").addEventListener("change", (event) => {
    const target = data.targets[event.target.value];
    if (target) choose(target.size);
  });
  for (const [name, text] of Object.entries(data.maps)) maps[name] = values(text, Float32Array);
  for (const [name, image] of Object.entries(data.pictures)) paint(at(`map-${name}`), image);
  windows = Object.values(data.windows).map((text) => values(text, Float32Array));
  if (data.thumbnails.values) images = values(data.thumbnails.values, Uint8Array);
  for (const button of document.querySelectorAll("button[data-index]")) {
    button.addEventListener("click", () => look(Number(button.dataset.index)));
  }
  show(data.window, data.origin, data.kept, data.line);
  const specimen = at("specimen");
  look(data.first);
  specimen.addEventListener("click", (event) => {
    const area = specimen.getBoundingClientRect(), [rows, columns] = data.lead;
    const y = Math.floor(((event.clientY - area.top) / area.height) * rows);
    look(y * columns + Math.floor(((event.clientX - area.left) / area.width) * columns));
  });
  specimen.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -data.lead[1], ArrowDown: data.lead[1] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    look(selected + steps[event.key]);
  });
}
