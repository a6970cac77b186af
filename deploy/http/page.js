"use strict";
const $ = (id) => document.getElementById(id);
const root = location.pathname.replace(/\/?$/, "/");
const FLAGS = {
  empty: "has no words", looping: "repeats itself", echoes_prompt: "repeats the prompt", truncated: "the picture lacks its end",
};
const EXAMPLES = ["what is in the picture?", "what color is it?", "how many are there?", "a close-up of"];
const BEGINNINGS = ["a red", "a blue circle above", "a yellow ring on"];

let picture = null;  // {blob, name, drawn}; `drawn` is the true caption of a drawn scene
let key = "";  // kept until the page is left
let running = null;  // the AbortController of the request under way

// The service -----------------------------------------------------------------------------------------------

async function call(path, request = {}) {
  for (;;) {
    const response = await fetch(root + path, {...request, headers: key ? {Authorization: `Bearer ${key}`} : {}});
    if (response.status !== 401 || !(await askForKey())) return response;
  }
}

function askForKey() {
  $("key").value = "";
  $("key-dialog").returnValue = "";
  $("key-dialog").showModal();
  return new Promise((resolve) => {
    $("key-dialog").onclose = () => {
      key = $("key").value.trim();
      showPrograms();
      resolve(key !== "");
    };
  });
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

async function showModel() {
  try {
    const response = await call("v1/model");
    const model = await response.json();
    if (!response.ok) throw new Error(model.error.message);
    $("model").textContent = `${model.model} · ${model.dtype} · ${model.image_size_px} px`;
    $("default").textContent = `as the service is set (${model.options.num_beams > 1 ? `${model.options.num_beams} beams` : "text appears as it grows"})`;
    if (model.caveat) {
      $("caveat").textContent = model.caveat[0].toUpperCase() + model.caveat.slice(1) + ".";
      $("caveat").hidden = false;
    }
    const isDemo = model.model === "demo";
    $("scene").hidden = !isDemo;
    $("about-questions").textContent = isDemo
      ? "This model answers no questions; it continues the beginning of a caption."
      : "A line with a question mark at its end is sent as “Question: … Answer:”.";
    $("examples").replaceChildren(...(isDemo ? BEGINNINGS : EXAMPLES).map(exampleButton));
  } catch (error) {
    $("model").textContent = `the service does not answer (${error.message})`;
  }
}

function exampleButton(text) {
  const button = make("button", text);
  button.type = "button";
  button.onclick = () => {
    $("questions").value = [...linesOf($("questions").value), text].join("\n");
    showPrograms();
  };
  return button;
}

// The request, and how a program makes it -------------------------------------------------------------------

const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
const promptOf = (line) => line.endsWith("?") ? `Question: ${line} Answer:` : line;

/** The fields of the form, apart from the picture; texts stand as they are, all else is JSON. */
function fieldsOf() {
  const fields = {};
  const questions = linesOf($("questions").value);
  if ($("prompt").value) fields.prompt = $("prompt").value;
  if (questions.length) fields.ask = Object.fromEntries(questions.map((line, index) => [`q${index + 1}`, promptOf(line)]));
  if ($("search").value !== "{}") fields.options = JSON.parse($("search").value);
  if ($("attention").checked) fields.attention = true;
  return fields;
}

const written = (value) => typeof value === "string" ? value : JSON.stringify(value);

function showPrograms() {
  const url = `${location.origin}${root}v1/caption`;
  const fields = Object.entries(fieldsOf());
  const file = picture?.name ?? "photo.jpg";
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  $("curl").textContent = [
    `curl ${url}`,
    ...(key ? ['-H "Authorization: Bearer $BLIP2_KEY"'] : []),
    `-F image=@${file}`,
    ...fields.map(([name, value]) => `--form-string ${quoted(`${name}=${written(value)}`)}`),
  ].join(" \\\n  ");
  const inPython = (value) => typeof value === "string" ? JSON.stringify(value) : `json.dumps(${JSON.stringify(value)})`;
  const data = fields.map(([name, value]) => `"${name}": ${value === true ? '"true"' : inPython(value)}`);
  $("python").textContent = [
    ...(data.some((line) => line.includes("json.dumps")) ? ["import json"] : []),
    ...(key ? ["import os"] : []),
    ...(key || data.some((line) => line.includes("json.dumps")) ? [""] : []),
    "import requests",
    "",
    `with open("${file}", "rb") as image:`,
    "    response = requests.post(",
    `        "${url}",`,
    ...(key ? ["        headers={\"Authorization\": f\"Bearer {os.environ['BLIP2_KEY']}\"},"] : []),
    "        files={\"image\": image},",
    ...(data.length ? ["        data={", ...data.map((line) => `            ${line},`), "        },"] : []),
    "    )",
    "response.raise_for_status()",
    "print(response.json()[\"caption\"])",
  ].join("\n");
}

// The answer ------------------------------------------------------------------------------------------------

function make(tag, text = "", className = "") {
  return Object.assign(document.createElement(tag), {textContent: text, className});
}

function clear() {
  for (const id of ["caption", "details", "answers", "alternatives"]) $(id).replaceChildren();
  for (const id of ["alternatives", "looked", "drawn", "overlay", "peak"]) $(id).hidden = true;
  $("caption").className = "";
}

const rounded = (number) => String(Math.round(1000 * number) / 1000 || 0).replace("-", "−");
const factsOf = (logprob, flags, ...more) => [
  `log-probability ${rounded(logprob)}`, ...more, ...flags.map((flag) => `⚑ ${flag}${FLAGS[flag] ? `: ${FLAGS[flag]}` : ""}`),
].join(" · ");

function fail(message, details) {
  clear();
  $("caption").textContent = message;
  $("caption").className = "bad";
  $("details").textContent = details;
  $("status").textContent = `${message} ${details}`;
}

function failWith(error, response) {
  const wait = response?.headers.get("retry-after");
  fail(error.message, [response?.status, error.type, wait && `try again in ${wait} s`].filter(Boolean).join(" · "));
}

/** Begin the list of answers, and return the element that each output grows in. */
function outputsOf(questions) {
  const growing = {caption: $("caption")};
  questions.forEach((question, index) => {
    growing[`q${index + 1}`] = make("dd");
    $("answers").append(make("dt", question), growing[`q${index + 1}`]);
  });
  return growing;
}

function show(answer, growing, ms) {
  $("caption").className = "";
  $("caption").textContent = answer.caption || "(no text)";
  $("details").textContent = factsOf(
    answer.logprob, answer.flags, `${answer.num_tokens} tokens`, `${answer.width}×${answer.height}`, `${ms} ms`);
  for (const [name, one] of Object.entries(answer.answers ?? {})) {
    growing[name].textContent = one.text || "(no text)";
    growing[name].append(make("span", factsOf(one.logprob, one.flags), "facts"));
  }
  (answer.captions ?? []).forEach((text, index) => {
    if (index === 0) return;  // the caption itself
    const item = make("li", text || "(no text)");
    item.append(make("span", factsOf(answer.logprobs[index], answer.captions_flags[index]), "facts"));
    $("alternatives").append(item);
  });
  $("alternatives").hidden = !answer.captions;
  if (answer.attention) showAttention(answer.attention);
  $("drawn").hidden = !picture.drawn;
  $("drawn").textContent = `The scene that was drawn: “${picture.drawn}”.`;
  const spoken = Object.entries(answer.answers ?? {}).map(([name, one]) => `${growing[name].previousSibling.textContent}: ${one.text}.`);
  $("status").textContent = [`${$("caption").textContent}.`, ...spoken, $("looked").hidden ? "" : $("looked").textContent].join(" ");
}

/** Darken what the model did not look at, and say where it looked most. */
function showAttention(grid) {
  const side = grid.length;
  const weights = grid.flat();
  const largest = Math.max(...weights);
  const canvas = $("overlay");
  canvas.width = canvas.height = side;
  const pixels = new ImageData(side, side);
  weights.forEach((weight, index) => { pixels.data[4 * index + 3] = 215 * (1 - weight / largest); });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  canvas.hidden = false;
  const at = weights.indexOf(largest);
  const [row, column] = [Math.floor(at / side), at % side];
  const place = [["upper", "middle", "lower"][Math.floor(3 * row / side)], ["left", "center", "right"][Math.floor(3 * column / side)]].join(" ");
  $("looked").textContent = `The model looked most at the ${place} of the picture: row ${row + 1}, column ${column + 1} of a grid of ${side} × ${side} (the frame). It looked least at the dark parts.`;
  $("looked").hidden = false;
  const part = (number) => `${100 * number / side}%`;
  Object.assign($("peak").style, {left: part(column), top: part(row), width: part(1), height: part(1)});
  $("peak").hidden = false;
  canvas.setAttribute("aria-label", $("looked").textContent);
}

async function ask() {
  if (!picture) return;
  running?.abort();
  const mine = running = new AbortController();
  const body = new FormData();
  body.append("image", picture.blob, picture.name);
  for (const [name, value] of Object.entries(fieldsOf())) body.append(name, written(value));
  body.append("stream", "true");
  clear();
  const growing = outputsOf(linesOf($("questions").value));
  $("caption").className = "waiting";
  $("status").textContent = "The model is reading the picture.";
  $("stop").hidden = false;
  const started = performance.now();
  try {
    const response = await call("v1/caption", {method: "POST", body, signal: mine.signal});
    if (!response.ok) return failWith((await response.json()).error, response);
    for await (const [name, data] of eventsOf(response)) {
      if (name === "text") growing[data.output].textContent += data.text;
      if (name === "answer") return show(data, growing, Math.round(performance.now() - started));
      if (name === "error") return failWith(data.error);
    }
    fail("The answer broke off.", "The service has ended, or the connection was cut. Try again.");
  } catch (error) {
    if (running !== mine) return;  // a newer request has taken the page
    if (mine.signal.aborted) return fail("Stopped.", "");
    fail("The service does not answer.", String(error));
  } finally {
    if (running === mine) {
      running = null;
      $("stop").hidden = true;
      $("caption").classList.remove("waiting");
    }
  }
}

// The picture -----------------------------------------------------------------------------------------------

function choose(blob, name, {drawn = "", isNew = false} = {}) {
  if (!blob) return;
  URL.revokeObjectURL($("preview").src);
  picture = {blob, drawn, name: /^[\w.-]+$/.test(name) ? name : "photo.jpg"};
  $("preview").src = URL.createObjectURL(blob);
  $("hint").hidden = true;
  $("picture").hidden = false;
  $("go").disabled = false;
  $("save").hidden = !isNew;
  $("save").href = $("preview").src;
  $("save").download = picture.name;
  showPrograms();
  ask();
}

async function drawScene() {
  try {
    const response = await call("scene.png", {cache: "no-store"});
    if (!response.ok) return failWith((await response.json()).error, response);
    choose(await response.blob(), "scene.png", {drawn: response.headers.get("x-caption"), isNew: true});
  } catch (error) {
    fail("The service does not answer.", String(error));
  }
}

async function openCamera() {
  try {
    $("shoot").disabled = true;
    $("video").srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
    $("camera-dialog").showModal();
  } catch (error) {
    fail("The camera cannot be used.", error.message);
  }
}

function takePicture() {
  const video = $("video");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  $("camera-dialog").close();
  canvas.toBlob((blob) => choose(blob, "camera.jpg", {isNew: true}), "image/jpeg", 0.95);
}

function chooseFrom(files) {
  if (files[0]) choose(files[0], files[0].name);
}

$("preview").onerror = () => {
  $("hint").textContent = "The browser cannot show this picture; the service may be able to read it.";
  $("hint").hidden = false;
  $("picture").hidden = true;
};
$("file").onchange = () => { chooseFrom($("file").files); $("file").value = ""; };
$("form").oninput = showPrograms;
$("form").onsubmit = (event) => {
  event.preventDefault();
  ask();
  $("answer").scrollIntoView({block: "nearest"});  // on a phone it is above the form
};
$("stop").onclick = () => running?.abort();
$("attention").onchange = ask;
$("scene").onclick = drawScene;
$("camera").hidden = !navigator.mediaDevices?.getUserMedia;  // browsers give it to https and localhost alone
$("camera").onclick = openCamera;
$("camera-dialog").onclose = () => $("video").srcObject.getTracks().forEach((track) => track.stop());
$("camera-close").onclick = () => $("camera-dialog").close();
$("video").onloadeddata = () => { $("shoot").disabled = false; };
$("shoot").onclick = takePicture;
document.onpaste = (event) => chooseFrom(event.clipboardData.files);
document.ondragover = (event) => { event.preventDefault(); $("drop").className = "over"; };
document.ondragleave = () => { $("drop").className = ""; };
document.ondrop = (event) => {
  event.preventDefault();
  $("drop").className = "";
  chooseFrom(event.dataTransfer.files);
};
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = !navigator.clipboard;
  button.onclick = async () => {
    await navigator.clipboard.writeText($(button.dataset.of).textContent);
    $("status").textContent = "Copied.";
  };
}
$("routes").href = `${root}docs`;
showPrograms();
showModel();
