// The page: what it shows, and what the user's actions do.

import { answerFrames, closeCamera, openCamera, takePhoto } from "./camera.js";
import { annotate, colourOf, drawOverlay } from "./drawing.js";
import { connectFiles, saveFile } from "./files.js";
import { connect, countClasses, listClasses, listRows, offerToKeyboard } from "./lists.js";
import { detect, drawAttention, hasKey, listModels, setKey } from "./service.js";
import { copy, snippet } from "./snippets.js";

const LOWEST = 0.05; // the score that is asked for once; the slider selects among the answer's detections
const LARGEST_ZOOM = 3; // of small images
const $ = (id) => document.getElementById(id);
const [image, video] = [$("image"), $("video")];
const state = {
  models: [],
  file: null, // the image that is shown, or the camera's last frame that was answered
  size: null, // {width, height} of what is shown, in pixels; null: nothing
  detections: [], // the whole answer, each with its index and colour
  classes: new Map(), // class name to colour: those of this image, or of all frames of the camera so far
  hidden: new Set(), // class names that are switched off
  answered: false, // whether the detections are an answer about what is shown
  note: "", // how long the answer took
};
let running = new AbortController(); // the last detection
let inspecting = new AbortController(); // the last attention map

const model = () => state.models.find(({ id }) => id === $("model").value);
const threshold = () => Number($("threshold").value);
const above = () => state.detections.filter(({ score }) => score > threshold());
const visible = () => above().filter(({ label }) => !state.hidden.has(label));
const query = () => ({ model: $("model").value, threshold: LOWEST, top_k: 300 });

function restart() {
  running.abort();
  running = new AbortController();
  return running.signal;
}

function report(error) {
  if (error?.name === "AbortError") return;
  const locked = error?.status === 401;
  $("message").textContent = error && !locked ? error.message : "";
  $("message").hidden = !error || locked;
  $("key-form").hidden = !locked;
  $("key-label").textContent = hasKey() ? "The service does not accept this key." : "This service needs an API key.";
  if (locked) $("key").focus();
}

async function loadModels() {
  try {
    state.models = await listModels();
    $("model").replaceChildren(...state.models.map(({ id }) => new Option(id, id)));
    $("model").disabled = false;
    describeModel();
  } catch (error) {
    report(error);
  }
}

function describeModel() {
  const { class_names: names = [], licence } = model() ?? {};
  $("model-note").textContent = [`${names.filter(Boolean).length} classes`, licence].filter(Boolean).join(" · ");
}

/* The image and its detections */

async function show(file) {
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.alt = file.name;
  state.file = file;
  $("name").textContent = file.name;
  const decoded = await image.decode().then(() => true, () => false);
  if (state.file !== file) return;
  image.hidden = !decoded;
  fit(decoded ? { width: image.naturalWidth, height: image.naturalHeight } : null);
}

/** Show another image and detect objects on it; what runs for an earlier one is given up. */
async function open(file) {
  stopCamera();
  const signal = restart();
  report(null);
  image.hidden = true;
  state.classes.clear();
  setDetections(null, "Detecting …");
  const shown = show(file);
  try {
    await ready;
    const started = performance.now();
    const answer = await detect(query(), file, signal);
    const elapsed = performance.now() - started;
    await shown;
    if (!signal.aborted) setDetections(answer, `${Math.round(elapsed)} ms`);
  } catch (error) {
    if (signal.aborted) return;
    setDetections(null, "");
    report(error);
  }
}

/** Take an answer of the service, or null while there is none. */
function setDetections(given, note) {
  const answer = given ?? [];
  [state.answered, state.note] = [given !== null, note];
  const order = new Set([...(model()?.class_names ?? []), ...answer.map(({ label }) => label)]);
  const rank = new Map([...order].map((label, index) => [label, index]));
  const colour = ({ label }) => colourOf(rank.get(label));
  state.detections = answer.map((detection, index) => ({ ...detection, index, colour: colour(detection) }));
  for (const { label, colour } of state.detections) state.classes.set(label, colour);
  $("filter").hidden = state.classes.size === 0;
  listClasses($("classes"), state.classes, state.hidden, toggleClasses);
  render();
}

function toggleClasses(labels, shown) {
  for (const label of labels) state.hidden[shown ? "delete" : "add"](label);
  render();
}

/** Fit what is shown into the page; null: the invitation is shown instead. */
function fit(size) {
  state.size = size;
  $("stage").classList.toggle("empty", !size);
  $("frame").hidden = !size;
  $("invitation").hidden = Boolean(size);
  if (size) {
    const highest = Math.max(240, window.innerHeight * 0.68);
    const scale = Math.min($("stage").clientWidth / size.width, highest / size.height, LARGEST_ZOOM);
    $("frame").style.width = `${size.width * scale}px`;
    $("frame").style.height = `${size.height * scale}px`;
  }
  drawBoxes();
  writeStatus();
}

function drawBoxes() {
  $("download").disabled = !state.size || !state.file;
  if (!state.size) return;
  const { clientWidth: width, clientHeight: height } = $("frame");
  drawOverlay($("overlay"), visible(), { width, height }, width / state.size.width);
  offerToKeyboard($("overlay"));
}

/** Write all that follows from the detections, the slider and the class filter. */
function render() {
  const shown = visible();
  $("threshold-value").textContent = threshold().toFixed(2);
  countClasses($("classes"), above());
  listRows($("rows"), shown);
  offerToKeyboard($("rows"));
  drawBoxes();
  $("scroll").hidden = shown.length === 0;
  $("hint").textContent = hint(shown.length);
  $("count").textContent = shown.length ? `${shown.length} of ${state.detections.length}` : "";
  writeStatus();
  writeSnippet();
}

function hint(count) {
  if (count) return model()?.attention ? "Select one to see where the model looks." : "";
  if (state.detections.length) return "None with this score and these classes.";
  return state.answered ? "The model detects nothing on this image." : "Nothing to list yet.";
}

function writeStatus() {
  const count = visible().length;
  const size = state.size ? [`${state.size.width} × ${state.size.height} pixels`] : [];
  const counted = state.answered ? [`${count} ${count === 1 ? "detection" : "detections"}`] : [];
  $("status").textContent = state.file ? [...size, ...counted, state.note].filter(Boolean).join(" · ") : "";
}

/* Attention, download, code */

async function inspect(index) {
  if (!model()?.attention) return;
  await freeze();
  const { label, score } = state.detections[index];
  inspecting = new AbortController();
  $("attention-title").textContent = `Where the model looks for this ${label} (${score.toFixed(2)})`;
  $("attention-status").textContent = "Drawing …";
  $("attention-image").hidden = true;
  $("attention").showModal();
  try {
    const map = await drawAttention({ ...query(), index }, state.file, inspecting.signal);
    URL.revokeObjectURL($("attention-image").src);
    $("attention-image").src = URL.createObjectURL(map);
    $("attention-image").alt = `Attention map of ${label}`;
    $("attention-image").hidden = false;
    $("attention-status").textContent = "";
  } catch (error) {
    if (error.name !== "AbortError") $("attention-status").textContent = error.message;
  }
}

async function download() {
  await freeze();
  const blob = await new Promise((resolve) => annotate(image, visible()).toBlob(resolve, "image/png"));
  if (!blob) return report(new Error("The browser cannot draw an image of this size."));
  const name = `${state.file.name.replace(/\.[^.]*$/, "")}-detections.png`;
  saveFile(blob, name);
}

function writeSnippet() {
  $("snippet").textContent = snippet(document.querySelector("[name=form]:checked").value, {
    model: $("model").value,
    threshold: threshold(),
    fileName: state.file?.name ?? "image.jpg",
    type: state.file?.type || "application/octet-stream",
    detections: visible().map(({ label, score, box }) => ({ label, score, box })),
  });
}

/* The camera */

function showCamera(on) {
  $("live").setAttribute("aria-pressed", false);
  $("status").ariaLive = "polite";
  image.hidden = on;
  video.hidden = !on;
  $("camera").hidden = on;
  $("camera-actions").hidden = !on;
}

async function startCamera() {
  report(null);
  try {
    await openCamera(video);
  } catch (error) {
    return report(error);
  }
  restart();
  state.file = null;
  state.classes.clear();
  showCamera(true);
  fit({ width: video.videoWidth, height: video.videoHeight });
  setDetections(null, "");
  $("name").textContent = "Camera";
}

function stopCamera() {
  closeCamera(video);
  showCamera(false);
}

/** End the camera, and keep the frame whose detections are shown. */
async function freeze() {
  if (video.hidden) return;
  restart();
  stopCamera();
  state.note = "";
  if (state.file) return show(state.file);
  $("name").textContent = "";
  fit(null);
}

async function detectLive() {
  const on = $("live").ariaPressed !== "true";
  const signal = restart();
  $("live").setAttribute("aria-pressed", on);
  $("status").ariaLive = on ? "off" : "polite"; // it changes with every frame
  if (!on) return;
  const show = (frame, answer, rate) => {
    state.file = frame;
    report(null);
    setDetections(answer, `${rate.toFixed(1)} frames a second`);
  };
  const fail = (error) => {
    report(error);
    $("live").setAttribute("aria-pressed", Boolean(error.retryAfter));
  };
  await answerFrames(video, signal, { answer: (frame) => detect(query(), frame, signal), show, fail });
}

/* The user's actions */

const on = (id, name, action) => $(id).addEventListener(name, action);

connectFiles($("file"), open, (message) => report(new Error(message)));
on("model", "change", () => {
  describeModel();
  state.hidden.clear();
  if (state.file && video.hidden) open(state.file);
  else render();
});
on("key-form", "submit", async (event) => {
  event.preventDefault();
  setKey($("key").value.trim(), $("key-keep").checked);
  report(null);
  ready = loadModels();
  await ready;
  if (state.file && state.models.length) open(state.file);
});
on("threshold", "input", render);
for (const [id, shown] of [["all", true], ["none", false]]) {
  on(id, "click", () => {
    for (const box of $("classes").querySelectorAll("input")) box.checked = shown;
    toggleClasses(state.classes.keys(), shown);
  });
}
for (const radio of document.querySelectorAll("[name=form]")) radio.addEventListener("change", writeSnippet);
on("copy", "click", () => copy($("snippet"), $("copy")));
on("download", "click", download);
on("camera", "click", startCamera);
on("camera-close", "click", freeze);
on("photo", "click", async () => open(await takePhoto(video)));
on("live", "click", detectLive);
on("attention-close", "click", () => $("attention").close());
on("attention", "close", () => inspecting.abort());
connect($("overlay"), $("rows"), inspect);
window.addEventListener("resize", () => fit(state.size));

let ready = loadModels();
render();
