// The page's behavior: one form for all tabs, one request at a time, results as they come.
"use strict";

const find = (id) => document.getElementById(id);

// pictures: none, one, or any number, and whether the tab needs one. draws: whether settings of drawing matter.
const TABS = {
  t2i: { go: "Generate", about: "Draws a picture from a prompt.", prompt: "Prompt", pictures: 0, draws: true },
  edit: { go: "Edit", about: "Changes a picture by an instruction.", prompt: "What to change", pictures: 99, needs: true, draws: true },
  vqa: { go: "Ask", about: "Answers a question, with or without pictures.", prompt: "Question", pictures: 99, writes: true, think: true },
  think: { go: "Think and draw", about: "Writes a thought, then draws or edits.", prompt: "Prompt", pictures: 99, draws: true, writes: true },
  interleave: { go: "Reason", about: "Answers with texts and pictures in turn.", prompt: "Question", pictures: 99, draws: true, writes: true, iterates: true },
};

const SETTINGS = [
  ["height", "Height", "draws"], ["width", "Width", "draws"],
  ["num_timesteps", "Points of the schedule", "draws"], ["timestep_shift", "Timestep shift", "draws"],
  ["cfg_text_scale", "Text guidance", "draws"], ["cfg_img_scale", "Image guidance", "draws"],
  ["cfg_low", "Guidance from flow time", "draws"], ["cfg_high", "Guidance to flow time", "draws"],
  ["cfg_renorm_type", "Renormalization", "draws"], ["cfg_renorm_min", "Smallest renormalization", "draws"],
  ["enable_taylorseer", "TaylorSeer", "draws"], ["max_think_token_n", "Most tokens of a text", "writes"],
  ["do_sample", "Sample texts", "writes"], ["text_temperature", "Temperature", "writes"],
  ["max_iterations", "Most texts and pictures", "iterates"],
];
const PAIRS = { height: ["image_shapes", 0], width: ["image_shapes", 1], cfg_low: ["cfg_interval", 0], cfg_high: ["cfg_interval", 1] };
const SWITCHES = ["enable_taylorseer", "do_sample"];

let model, mode = "t2i", pictures = [], running = null;

async function ask(path, content) {
  const options = content === undefined ? {} :
    { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is bagel-ds web still running?");
  }
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(words) {
  find("error").textContent = words;
  find("error").hidden = !words;
}

// ------------------------------------------------------------------------------------------------ the form
function defaults() {
  const seen = TABS[mode].pictures && pictures.length ? "+image" : "";
  return model.defaults[mode + seen];
}

function defaultOf(name) {
  const [key, place] = PAIRS[name] ?? [name, null];
  const value = defaults()[key];
  return place === null ? value : value[place];
}

function makeSettings() {
  for (const [name, title] of SETTINGS) {
    let input;
    if (name === "cfg_renorm_type" || SWITCHES.includes(name)) {
      const values = name === "cfg_renorm_type" ? model.renorm_types : ["on", "off"];
      input = element("select", { id: name }, element("option", { value: "" }),
        ...values.map((value) => element("option", { value, textContent: value })));
    } else {
      input = element("input", { id: name, type: "number", step: "any" });
    }
    find("settings").append(element("label", { id: name + "-label", textContent: title }, input));
  }
}

function makeAdapters() {
  for (const [name, weight] of Object.entries(model.adapters)) {
    const input = element("input", { type: "number", step: "0.1", value: weight });
    input.dataset.adapter = name;
    find("adapters").append(element("label", {}, `Adapter ${name} `, input));
  }
  find("adapters").hidden = !find("adapters").children.length;
}

function adapters() {
  const inputs = [...find("adapters").querySelectorAll("input")];
  return inputs.length ? { lora: Object.fromEntries(inputs.map((input) => [input.dataset.adapter, Number(input.value)])) } : {};
}

function show() {
  const tab = TABS[mode];
  for (const button of document.querySelectorAll("nav button")) {
    button.setAttribute("aria-selected", button.dataset.mode === mode);
  }
  find("about").textContent = tab.about;
  find("prompt-title").textContent = tab.prompt;
  find("go").textContent = tab.go;
  find("pictures").hidden = !tab.pictures;
  find("drop-words").textContent = (tab.needs ? "Choose a picture" : "Choose pictures, if there are any") + ", or drop them here";
  find("think-label").hidden = !tab.think;
  for (const [name, , when] of SETTINGS) {
    const fixed = pictures.length && tab.pictures && (name === "height" || name === "width");
    find(name + "-label").hidden = !tab[when] || fixed;  // a picture with pictures before it has the last one's size
    const value = defaultOf(name);
    if (find(name).tagName === "SELECT") {
      const shown = SWITCHES.includes(name) ? (value ? "on" : "off") : value;
      find(name).options[0].textContent = `default (${shown})`;
    } else {
      find(name).placeholder = value;
    }
  }
  const fault = tab.draws && model.cannot_draw;
  say(fault ? `This model can't draw: ${model.cannot_draw}` : "");
  find("go").disabled = Boolean(fault || running);
  find("thumbnails").replaceChildren(...pictures.map((file, number) => element("figure", {},
    element("img", { src: file.url, alt: file.name }),
    element("button", { type: "button", textContent: "×", title: `Remove ${file.name}`, onclick: () => {
      pictures.splice(number, 1);
      show();
    } }))));
}

function take(files) {
  for (const file of files) {
    file.url = URL.createObjectURL(file);
    pictures.push(file);
  }
  show();
}

function settings() {
  const words = {};
  for (const [name, , when] of SETTINGS) {
    const value = find(name).value;
    if (value === "" || !TABS[mode][when] || find(name + "-label").hidden) continue;
    const found = SWITCHES.includes(name) ? value === "on" : name === "cfg_renorm_type" ? value : Number(value);
    const [key, place] = PAIRS[name] ?? [name, null];
    if (place === null) {
      words[key] = found;
    } else {
      words[key] ??= [...defaults()[key]];
      words[key][place] = found;
    }
  }
  return words;
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} can't be read.`));
    reader.readAsDataURL(file);
  });
}

async function request() {
  const used = TABS[mode].pictures ? pictures : [];
  const bytes = used.reduce((sum, file) => sum + file.size, 0);
  const most = model.most_bytes * 0.7;  // base64 takes a third more
  if (bytes > most) {
    throw new Error(`The pictures have ${Math.round(bytes / 2 ** 20)} MiB, at most ${Math.floor(most / 2 ** 20)} are taken: ` +
      "choose smaller or fewer ones.");
  }
  const images = await Promise.all(used.map(base64));
  return { mode, prompt: find("prompt").value, seed: Number(find("seed").value), images,
    think: Boolean(TABS[mode].think && find("think").checked),
    weights: find("weights").value.split(","), ...adapters(), ...settings() };
}

// --------------------------------------------------------------------------------------------- the results
function showProgress(job, drawn) {
  find("progress").hidden = false;
  const bar = find("bar");
  let words;
  if (job.state === "waiting") {
    words = job.ahead ? `${job.ahead} before this one` : "waiting";
    bar.removeAttribute("value");
  } else if (job.steps && job.step < job.steps) {
    words = `step ${job.step} of ${job.steps}`;
    bar.max = job.steps;
    bar.value = job.step;
  } else {
    words = job.steps ? "finishing" : drawn ? "reading the prompt" : "writing";
    bar.removeAttribute("value");
  }
  find("bar-words").textContent = find("weights").value.includes(",") ? `${job.under_way}: ${words}` : words;
}

function showPanels(job, seed) {
  const results = find("results");
  while (results.children.length < job.panels.length) {
    const panel = job.panels[results.children.length];
    const made = element("article", {});
    if (model.weights.length > 1) made.append(element("h2", { textContent: `From the ${panel.title}` }));
    for (const item of panel.items) {
      if (item.text !== undefined) {
        made.append(element("p", { className: "text", textContent: item.text || "(an empty text)" }));
      } else {
        const save = element("a", { href: item.image, download: `seed_${seed}.png`, textContent: "save" });
        made.append(element("figure", {}, element("img", { src: item.image, alt: find("prompt").value }),
          element("figcaption", {}, `seed ${seed}, `, save)));
      }
    }
    results.append(made);
  }
}

async function run() {
  say("");
  find("empty").hidden = true;
  document.querySelector("section").scrollIntoView({ block: "nearest" });
  const tab = TABS[mode];
  try {
    const words = await request();
    running = (await ask("api/jobs", words)).name;
    find("results").replaceChildren();
    find("results").className = words.weights.length > 1 ? "beside" : "";
    find("go").disabled = true;
    find("stop").hidden = false;
    for (;;) {
      const job = await ask(`api/jobs/${running}`);
      showPanels(job, words.seed);
      if (job.state === "failed") throw new Error(job.error);
      if (job.state === "stopped") throw new Error("Stopped.");
      if (job.state === "done") break;
      showProgress(job, tab.draws && !tab.writes);
      await new Promise((later) => setTimeout(later, 400));
    }
  } catch (fault) {
    say(fault.message);
  }
  running = null;
  find("go").disabled = Boolean(TABS[mode].draws && model.cannot_draw);
  find("stop").hidden = find("progress").hidden = true;
}

// --------------------------------------------------------------------------------------------------- start
async function start() {
  model = await ask("api/model");
  find("model").textContent = model.path;
  const choices = model.weights.map(({ name, title }) => [name, title]);
  if (choices.length > 1) choices.push([choices.map(([name]) => name).join(","), "both, side by side"]);
  find("weights").append(...choices.map(([value, textContent]) => element("option", { value, textContent })));
  find("weights-label").hidden = choices.length < 2;
  makeSettings();
  makeAdapters();
  if (model.cannot_draw) mode = "vqa";
  show();
  for (const button of document.querySelectorAll("nav button")) {
    button.onclick = () => { mode = button.dataset.mode; show(); };
  }
  find("files").onchange = () => { take(find("files").files); find("files").value = ""; };
  const drop = find("drop");
  drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => { event.preventDefault(); drop.classList.remove("over"); take(event.dataTransfer.files); };
  find("dice").onclick = () => { find("seed").value = Math.floor(Math.random() * 2 ** 31); };
  find("stop").onclick = () => running && ask(`api/jobs/${running}/stop`, {}).catch((fault) => say(fault.message));
  find("form").onsubmit = (event) => { event.preventDefault(); if (!running) run(); };
}

start().catch((fault) => say(fault.message));
