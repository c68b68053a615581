"""One self-contained page to look at the pictures of a batch with.

It opens from disk, asks nobody for anything, and runs no script but its own: prompts and
all else from outside travel as JSON and are only ever shown as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final
from urllib.parse import quote

from evolink_async.batch._ledger import Item

__all__ = ["write_gallery"]

_ESCAPES: Final = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


async def write_gallery(items: AsyncIterator[Item], *, title: str) -> AsyncIterator[str]:
    """The page, in pieces: one line per item, so that it may be of any length."""
    yield _HEAD.format(
        title=html.escape(title), policy=_policy(), style=_STYLE, body=_BODY.replace("\n", "")
    )
    separator = "\n"
    async for item in items:
        yield separator + _safe(_facts(item))
        separator = ",\n"
    yield f"\n]</script>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"


def _policy() -> str:
    """Only this page's own style and script; pictures from beside it."""
    style, script = (_hash(text) for text in (_STYLE, _SCRIPT))
    return (
        f"default-src 'none'; img-src 'self' file:; style-src '{style}'; script-src '{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _safe(value: object) -> str:
    """JSON that cannot end the element it stands in, whatever strings it holds."""
    text = json.dumps(value, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _facts(item: Item) -> dict[str, Any]:
    """What the page shows of *item*; what there is nothing of is left out."""
    body: Mapping[str, Any] = item.request.get("body", item.request)
    snapshot = item.snapshot or {}
    credits_ = item.credits_used if item.credits_used is not None else item.credits_reserved
    facts = {
        "state": item.state,
        "prompt": str(body.get("prompt") or ""),
        "files": [quote(file.name) for file in item.files],
        "id": item.user_id,
        "line": item.line if item.wanted else None,
        "model": item.model,
        "size": body.get("size"),
        "credits": credits_,
        "seconds": snapshot.get("duration"),
        "task": item.task_id,
        "saved": item.times.get("saved"),
        "key": item.idempotency_key if item.state == "uncertain" else None,
        "code": item.code,
        "reason": item.message,
        "more": item.metadata or None,
    }
    return {name: value for name, value in facts.items() if value is not None}


_HEAD: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{body}
<script type="application/json" id="data">["""

_BODY: Final = """
<nav id="filters" aria-label="Which items"></nav>
<input id="search" type="search" placeholder="Search prompts" aria-label="Search prompts">
</header>
<main id="grid"></main>
<p id="empty" hidden>Nothing here.</p>
<div id="end"></div>
<noscript><p>This page needs JavaScript; the pictures are beside it in its folder.</p></noscript>
<dialog id="viewer">
<button id="close" aria-label="Close">\N{MULTIPLICATION SIGN}</button>
<button id="previous" aria-label="Previous">\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}</button>
<button id="next" aria-label="Next">\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}</button>
<div id="stage"></div>
<aside><p id="prompt"></p><button id="copy">Copy prompt</button><dl id="facts"></dl></aside>
</dialog>
"""

_STYLE: Final = """
:root {
  --page: #f6f5f3; --card: #fff; --text: #1d1c1a; --soft: #77736c; --line: #e4e1db;
  --accent: #3056d3; --bad: #b3261e; --bad-page: #fdecea; --doubt: #8a5a00; --doubt-page: #fff4dc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141416; --card: #1e1e21; --text: #eceae6; --soft: #9a968e; --line: #2f2f34;
    --accent: #8aa4ff; --bad: #ff8a80; --bad-page: #3a1d1c; --doubt: #ffcf70;
    --doubt-page: #38290c;
  }
}
* { box-sizing: border-box; }
body:has(dialog[open]) { overflow: hidden; }
[hidden] { display: none !important; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
header {
  position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; align-items: center;
  gap: 10px 18px; padding: 14px clamp(14px, 3vw, 36px); background: var(--page);
  border-bottom: 1px solid var(--line);
}
h1 {
  margin: 0; font-size: 18px; font-weight: 650; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; max-width: 100%;
}
nav { display: flex; flex-wrap: wrap; gap: 6px; }
button, input { font: inherit; color: inherit; }
nav button {
  padding: 4px 12px; border: 1px solid var(--line); border-radius: 999px;
  background: var(--card); cursor: pointer;
}
nav button[aria-pressed="true"] {
  background: var(--text); border-color: var(--text); color: var(--page);
}
nav span { margin-left: 2px; opacity: .6; font-variant-numeric: tabular-nums; }
#search {
  flex: 1 1 180px; max-width: 340px; margin-left: auto; padding: 6px 14px;
  border: 1px solid var(--line); border-radius: 999px; background: var(--card);
}
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
main {
  display: grid; gap: clamp(10px, 1.4vw, 20px);
  padding: clamp(12px, 2.4vw, 32px) clamp(14px, 3vw, 36px);
  grid-template-columns: repeat(auto-fill, minmax(min(230px, 44vw), 1fr));
}
.card {
  display: flex; flex-direction: column; padding: 0; text-align: left; overflow: hidden;
  border: 1px solid var(--line); border-radius: 12px; background: var(--card); cursor: pointer;
  content-visibility: auto; contain-intrinsic-size: auto 300px;
}
.card:hover { border-color: var(--soft); }
.frame {
  width: 100%; aspect-ratio: 1; background: var(--line); display: grid; place-items: center;
  overflow: hidden;
}
.frame img { width: 100%; height: 100%; object-fit: cover; display: block; }
.frame p { margin: 0; padding: 14px; overflow: hidden; overflow-wrap: anywhere; font-size: 13px; }
.frame b { display: block; margin-bottom: 6px; font-size: 14px; }
.failed .frame { background: var(--bad-page); color: var(--bad); }
.uncertain .frame { background: var(--doubt-page); color: var(--doubt); }
.caption {
  margin: 10px 12px 12px; font-size: 13.5px; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; min-height: 2.9em;
}
#empty { text-align: center; color: var(--soft); }
#end { height: 1px; }
dialog {
  width: 100vw; height: 100vh; height: 100dvh; max-width: none; max-height: none; padding: 0;
  border: 0; background: var(--page); color: var(--text);
}
dialog[open] { display: grid; grid-template-columns: minmax(0, 1fr) 360px; }
#stage { display: grid; place-items: center; min-width: 0; min-height: 0; background: #0c0c0d; }
#stage img { max-width: 100%; max-height: 100vh; max-height: 100dvh; display: block; }
#stage p { color: #ddd; padding: 24px; overflow-wrap: anywhere; }
aside { padding: 56px 24px 24px; overflow: auto; border-left: 1px solid var(--line); }
#prompt { margin: 0 0 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
#copy {
  padding: 4px 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  cursor: pointer;
}
dl {
  display: grid; grid-template-columns: auto 1fr; gap: 6px 14px; margin: 20px 0 0;
  font-size: 13px;
}
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
#close, #previous, #next {
  position: fixed; z-index: 1; width: 40px; height: 40px; border: 0; border-radius: 50%;
  background: #0009; color: #fff; font-size: 24px; line-height: 1; cursor: pointer;
}
#close { top: 12px; right: 12px; }
#previous { left: 12px; top: calc(50% - 20px); }
#next { right: 372px; top: calc(50% - 20px); }
@media (max-width: 760px) {
  dialog[open] { grid-template-columns: 1fr; grid-template-rows: minmax(0, 62dvh) minmax(0, 1fr); }
  #stage img { max-height: 62vh; max-height: 62dvh; }
  aside { padding: 18px; border: 0; }
  #previous, #next { top: calc(31dvh - 20px); }
  #next { right: 12px; }
  #search { max-width: none; margin: 0; flex-basis: 100%; }
  .caption { font-size: 12.5px; margin: 8px 9px 9px; }
}
"""

_SCRIPT: Final = """
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
function trouble(item) {
  const text = element("p");
  text.append(element("b", "", item.code || words[item.state] || item.state));
  text.append(item.reason || "");
  return text;
}
function card(view, index) {
  const made = element("button", "card " + view.item.state);
  const frame = element("div", "frame");
  frame.append(view.file ? picture(view, true) : trouble(view.item));
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
  at("stage").replaceChildren(view.file ? picture(view, false) : trouble(view.item));
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
"""
