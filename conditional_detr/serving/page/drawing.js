// Boxes and labels: colours, places of the labels, the overlay on the page, and the annotated image.

const FONT = "system-ui, sans-serif";
const [TEXT, PADDING, HEIGHT] = [12, 5, 18]; // of a label, in units; the page's unit is a CSS pixel
const pen = document.createElement("canvas").getContext("2d");

/** Return the colour of a class as [red, green, blue], each in 0..255. */
export function colourOf(index) {
  const hue = (190 + index * 137.508) % 360; // the golden angle keeps neighbours apart
  const lightness = [0.52, 0.66, 0.4][index % 3];
  const reach = 0.78 * Math.min(lightness, 1 - lightness);
  return [0, 8, 4].map((n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (lightness - reach * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

/** Return black or white, whichever has the higher contrast ratio of WCAG on a colour. */
export function textOn(colour) {
  const [red, green, blue] = colour.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000" : "#fff";
}

export const css = (colour) => `rgb(${colour.join(" ")})`;

const shared = (a, b) =>
  Math.max(0, Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x)) *
  Math.max(0, Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y));

function shorten(text, width) {
  if (pen.measureText(text).width <= width) return text;
  const letters = [...text];
  while (letters.length > 1 && pen.measureText(`${letters.join("")}…`).width > width) letters.pop();
  return `${letters.join("")}…`;
}

/**
 * Give each label the place at its box that covers the least of the labels before it. A label that would cover much of
 * them is marked as crowded: it is shown only while its box is highlighted. Boxes are {x, y, width, height} in the same units as the area; labels stay inside the area.
 */
function placeLabels(items, area, unit) {
  pen.font = `500 ${TEXT * unit}px ${FONT}`;
  const placed = [];
  return items.map(({ box, label, score }) => {
    const suffix = ` ${score.toFixed(2)}`;
    const room = area.width - 2 * PADDING * unit - pen.measureText(suffix).width;
    const text = shorten(label, Math.min(room, 220 * unit)) + suffix;
    const width = pen.measureText(text).width + 2 * PADDING * unit;
    const height = HEIGHT * unit;
    const [right, bottom] = [box.x + box.width, box.y + box.height];
    const corners = [
      [box.x, box.y - height], [right - width, box.y - height], [box.x, bottom], [right - width, bottom],
      [box.x, box.y], [right - width, box.y], [box.x, bottom - height], [right - width, bottom - height],
      [right, box.y], [box.x - width, box.y], [right, bottom - height], [box.x - width, bottom - height],
      [box.x + (box.width - width) / 2, box.y + (box.height - height) / 2],
    ];
    let [best, least] = [null, Infinity];
    for (const [x, y] of corners) {
      const place = {
        x: Math.max(0, Math.min(x, area.width - width)), y: Math.max(0, Math.min(y, area.height - height)), width, height,
      };
      const cost = placed.reduce((sum, other) => sum + shared(place, other), 0);
      if (cost < least) [best, least] = [place, cost];
      if (cost === 0) break;
    }
    const crowded = least > 0.2 * width * height;
    if (!crowded) placed.push(best);
    return { ...best, text, crowded };
  });
}

/** Return detections with boxes as {x, y, width, height}, scaled. */
function scaled(detections, scale) {
  return detections.map((detection) => {
    const { xmin, ymin, xmax, ymax } = detection.box;
    const [x, y] = [xmin * scale, ymin * scale];
    return { ...detection, box: { x, y, width: (xmax - xmin) * scale, height: (ymax - ymin) * scale } };
  });
}

function element(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/**
 * Draw detections into an SVG that lies over the image.
 * Each detection has label, score, box, index and colour; `area` is the SVG's size in CSS pixels, `scale` CSS pixels
 * per pixel of the image. Small boxes lie over large ones, so that the pointer reaches them.
 */
export function drawOverlay(svg, detections, area, scale) {
  const unit = Math.max(0.85, Math.min(1, area.width / 600)); // labels are smaller on phones
  const items = scaled(detections, scale);
  const labels = placeLabels(items, area, unit);
  const boxes = items.map(({ box, index, label, score, colour }) => {
    const group = element("g", { "data-index": index, class: "box", role: "button", tabindex: -1 });
    group.setAttribute("aria-label", `${label}, score ${score.toFixed(2)}`);
    group.append(element("rect", { ...box, class: "halo" }), element("rect", { ...box, stroke: css(colour) }));
    return { group, size: box.width * box.height };
  });
  const names = items.map(({ index, colour }, i) => {
    const { text, crowded, ...place } = labels[i];
    const kind = crowded ? "label crowded" : "label";
    const group = element("g", { "data-index": index, class: kind, "aria-hidden": true });
    const start = { x: place.x + PADDING * unit, y: place.y + place.height / 2 };
    const words = element("text", { ...start, "font-size": TEXT * unit, fill: textOn(colour) });
    words.textContent = text;
    group.append(element("rect", { ...place, rx: 2, fill: css(colour) }), words);
    return group;
  });
  const layer = element("g", {});
  layer.append(...boxes.sort((a, b) => b.size - a.size).map(({ group }) => group));
  const top = element("g", {});
  top.append(...names.reverse()); // the highest score is read best
  svg.setAttribute("viewBox", `0 0 ${area.width} ${area.height}`);
  svg.replaceChildren(layer, top);
}

/** Return a canvas of the image's full resolution with boxes and labels. */
export function annotate(image, detections) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const unit = Math.max(0.75, Math.max(canvas.width, canvas.height) / 1000);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const items = scaled(detections, 1);
  const labels = placeLabels(items, canvas, unit);
  for (const { box, colour } of items) {
    for (const [width, style] of [[3.5, "rgb(0 0 0 / 0.45)"], [2, css(colour)]]) {
      [context.lineWidth, context.strokeStyle] = [width * unit, style];
      context.strokeRect(box.x, box.y, box.width, box.height);
    }
  }
  [context.font, context.textBaseline] = [pen.font, "middle"];
  for (let i = items.length - 1; i >= 0; i -= 1) {
    const { x, y, width, height, text, crowded } = labels[i];
    if (crowded) continue;
    context.fillStyle = css(items[i].colour);
    context.fillRect(x, y, width, height);
    context.fillStyle = textOn(items[i].colour);
    context.fillText(text, x + PADDING * unit, y + height / 2);
  }
  return canvas;
}
