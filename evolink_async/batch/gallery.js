"use strict";
const at = (id) => document.getElementById(id);
const items = JSON.parse(at("data").textContent);
const views = items.flatMap((item) => item.files.length
  ? item.files.map((file, k) => ({item, file, k})) : [{item, file: null, k: 0}]);
const words = {
  saved: "Saved", failed: "Failed", uncertain: "Uncertain", completed: "To download",
  submitted: "Running", queued: "Queued",
};
const CHUNK = 120;
let filter = "all", shown = [], drawn = 0, current = 0;

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}
function picture(view, lazy) {
  const image = element("img");
  if (lazy) { image.loading = "lazy"; image.decoding = "async"; }
  image.alt = view.item.prompt;
  image.src = view.file;
  image.onerror = () => image.replaceWith(element("p", "", "The file is not here any more."));
  return image;
}
function problem(item) {
  const text = element("p");
  text.append(element("b", "", item.code || words[item.state] || item.state));
  text.append(item.reason || "");
  return text;
}
function card(view, index) {
  const made = element("button", "card " + view.item.state);
  const frame = element("div", "frame");
  frame.append(view.file ? picture(view, true) : problem(view.item));
  const {prompt, id, model} = view.item;
  made.append(frame, element("div", "caption", prompt || id || model));
  made.dataset.index = index;
  return made;
}
function draw() {
  const next = shown.slice(drawn, drawn + CHUNK).map((view, k) => card(view, drawn + k));
  drawn += next.length;
  at("grid").append(...next);
  more.unobserve(at("end"));  // or a screen larger than what was drawn would wait for ever
  more.observe(at("end"));
}
function select() {
  const wanted = at("search").value.trim().toLowerCase();
  shown = views.filter(({item}) => (filter === "all" || item.state === filter)
    && (!wanted || [item.prompt, item.id, item.code, item.reason]
      .some((text) => text && text.toLowerCase().includes(wanted))));
  drawn = 0;
  at("grid").replaceChildren();
  at("empty").hidden = shown.length > 0;
  for (const button of at("filters").children) {
    button.setAttribute("aria-pressed", String(button.dataset.state === filter));
  }
  draw();
}
function facts(item, k) {
  const rows = [
    ["State", words[item.state] || item.state], ["Reason", item.code], ["", item.reason],
    ["Id", item.id], ["Line", item.line], ["Model", item.model], ["Size", item.size],
    ["Picture", item.files.length > 1 ? `${k + 1} of ${item.files.length}` : null],
    ["Credits", item.credits], ["Took", item.seconds && `${item.seconds} s`],
    ["Saved", item.saved && new Date(item.saved * 1000).toLocaleString()],
    ["File", item.files[k] && decodeURIComponent(item.files[k])],
    ["Task", item.task], ["Key", item.key],
    ...Object.entries(item.more || {}).map(([name, value]) =>
      [name, typeof value === "string" ? value : JSON.stringify(value)]),
  ];
  return rows.filter(([, value]) => value !== undefined && value !== null)
    .flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]);
}
function show(index) {
  if (index < 0 || index >= shown.length) return;
  current = index;
  const view = shown[index];
  at("stage").replaceChildren(view.file ? picture(view, false) : problem(view.item));
  at("prompt").textContent = view.item.prompt;
  at("facts").replaceChildren(...facts(view.item, view.k));
  at("previous").hidden = index === 0;
  at("next").hidden = index === shown.length - 1;
  if (!at("viewer").open) at("viewer").showModal();
}
for (const state of ["all", ...Object.keys(words)]) {
  const count = items.filter((item) => state === "all" || item.state === state).length;
  if (!count) continue;
  const button = element("button", "", (words[state] || "All") + " ");
  button.dataset.state = state;
  button.append(element("span", "", count));
  button.onclick = () => { filter = state; select(); };
  at("filters").append(button);
}
at("search").oninput = select;
at("grid").onclick = (event) => {
  const found = event.target.closest(".card");
  if (found) show(Number(found.dataset.index));
};
at("close").onclick = () => at("viewer").close();
at("previous").onclick = () => show(current - 1);
at("next").onclick = () => show(current + 1);
at("copy").onclick = async () => {
  await navigator.clipboard.writeText(shown[current].item.prompt);
  at("copy").textContent = "Copied";
  setTimeout(() => { at("copy").textContent = "Copy prompt"; }, 1500);
};
at("viewer").onclose = () => {
  const opened = at("grid").children[current];
  if (opened) { opened.focus(); opened.scrollIntoView({block: "nearest"}); }
};
document.onkeydown = (event) => {
  if (!at("viewer").open) return;
  if (event.key === "ArrowLeft") show(current - 1);
  if (event.key === "ArrowRight") show(current + 1);
};
const more = new IntersectionObserver((seen) => {
  if (drawn < shown.length && seen.some((entry) => entry.isIntersecting)) draw();
}, {rootMargin: "1500px"});
select();
