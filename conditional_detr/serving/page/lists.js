// The list of classes, the table, and what table and overlay share: highlighting and the keyboard.

import { css } from "./drawing.js";

function make(name, properties, ...content) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...content);
  return made;
}

function swatch(colour) {
  const made = make("span", { className: "swatch" });
  made.style.background = css(colour);
  return made;
}

/** List classes, a Map of name to colour, with checkboxes; `toggle` gets names and whether to show them. */
export function listClasses(list, colours, hidden, toggle) {
  const listed = [...list.children].map(({ dataset }) => dataset.label);
  if (listed.length === colours.size && listed.every((label) => colours.has(label))) return; // the focus stays
  list.replaceChildren(...[...colours].map(([label, colour]) => {
    const box = make("input", { type: "checkbox", checked: !hidden.has(label) });
    box.addEventListener("change", () => toggle([label], box.checked));
    const text = make("span", { className: "text" }, label);
    const item = make("li", {}, make("label", { className: "check" }, box, swatch(colour), text, make("output", {})));
    item.dataset.label = label;
    return item;
  }));
}

/** Write how many detections there are of each class. */
export function countClasses(list, detections) {
  for (const { dataset, lastChild } of list.children) {
    const count = detections.filter(({ label }) => label === dataset.label).length;
    lastChild.querySelector("output").textContent = count;
  }
}

function row({ index, label, score, box, colour }) {
  const name = make("button", { className: "name", type: "button", tabIndex: -1 },
    swatch(colour), make("span", { className: "text" }, label));
  const bar = make("span", { className: "bar" });
  bar.style.width = `${score * 100}%`;
  const [x, y, width, height] = [box.xmin, box.ymin, box.xmax - box.xmin, box.ymax - box.ymin].map(Math.round);
  const made = make("tr", {}, make("td", {}, name), make("td", { className: "score" }, score.toFixed(2), bar),
    make("td", { className: "place" }, `${x}, ${y}, ${width} × ${height}`));
  made.dataset.index = name.dataset.index = index;
  return made;
}

export function listRows(rows, detections) {
  const focused = rows.contains(document.activeElement) && document.activeElement.dataset.index;
  rows.replaceChildren(...detections.map(row));
  if (focused) rows.querySelector(`button[data-index="${focused}"]`)?.focus();
}

const stops = (container) =>
  [...container.querySelectorAll("[tabindex]")].sort((a, b) => a.dataset.index - b.dataset.index);

/** Let the tab key stop once in a list; the arrow keys move within it. */
export function offerToKeyboard(container, chosen = stops(container)[0]) {
  for (const item of stops(container)) item.setAttribute("tabindex", item === chosen ? 0 : -1);
}

function move(container, event) {
  const items = stops(container);
  const at = items.indexOf(event.target);
  const steps = { ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1, Home: 0, End: items.length - 1 };
  const target = items[steps[event.key]];
  if (!target) return;
  event.preventDefault();
  offerToKeyboard(container, target);
  target.focus();
}

/** Scroll the table, but not the page, to a row. */
function reveal(scroller, target) {
  const [outer, inner] = [scroller.getBoundingClientRect(), target.getBoundingClientRect()];
  const top = outer.top + scroller.querySelector("thead").offsetHeight;
  if (inner.top < top) scroller.scrollTop += inner.top - top;
  else if (inner.bottom > outer.bottom) scroller.scrollTop += inner.bottom - outer.bottom;
}

/** Highlight box, label and row of one detection together; `choose` gets the index of one that is selected. */
export function connect(overlay, rows, choose) {
  const indexOf = ({ target }) => target.closest("[data-index]")?.dataset.index;
  const highlight = (index) => {
    overlay.classList.toggle("dimmed", index !== undefined);
    for (const item of document.querySelectorAll("[data-index]")) {
      const same = item.dataset.index === index;
      item.classList.toggle("active", same);
      if (same && item.matches(".label") && item.nextSibling) item.parentNode.append(item); // over the others
    }
  };
  for (const container of [overlay, rows]) {
    const enter = (event) => {
      const index = indexOf(event);
      highlight(index);
      if (index && container === overlay) reveal(rows.closest(".scroll"), rows.querySelector(`tr[data-index="${index}"]`));
    };
    for (const name of ["pointerover", "focusin"]) container.addEventListener(name, enter);
    for (const name of ["pointerleave", "focusout"]) container.addEventListener(name, () => highlight());
    container.addEventListener("click", (event) => indexOf(event) && choose(indexOf(event)));
    container.addEventListener("keydown", (event) => {
      move(container, event);
      if (container !== overlay || !["Enter", " "].includes(event.key)) return; // rows have buttons
      event.preventDefault();
      choose(indexOf(event));
    });
  }
}
