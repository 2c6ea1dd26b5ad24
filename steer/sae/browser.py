"""A feature browser: one HTML page that holds everything, with a search and no server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from steer.files import replace_file
from steer.sae.features import Feature

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$TITLE</title><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; color: #222 }
input, select { font: inherit; padding: .3rem .5rem } input { width: 30rem; max-width: 100% }
article { border-top: 1px solid #ddd; padding: .7rem 0 } h2 { font-size: 1rem; margin: 0 }
.facts { color: #555 } .words span { background: #eef; border-radius: 3px; margin-right: .3rem; padding: 0
.25rem } .words.down span { background: #fee } .snippet { margin: .25rem 0; font-family: ui-monospace,
monospace } .snippet::before { content: attr(data-mark); color: #888; margin-right: .5rem } .more { color:
#555 } </style></head><body>
<h1>$TITLE</h1><p id="about"></p>
<p><input id="query" type="search" placeholder="a feature's number, or text in its tokens and snippets">
<select id="order"><option value="p">most different</option><option value="right">oftener when right</option>
<option value="wrong">oftener when wrong</option><option value="mean">strongest on average</option>
<option value="index">number</option></select> <span id="count"></span></p>
<main id="list"></main>
<script type="application/json" id="data">$DATA</script>
<script>
const {about, features} = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id), share = x => (100 * x).toFixed(1) + " %";
const visible = t => t.replace(/\\n/g, "\\u21b5").replace(/^ +$/, "\\u2423");
byId("about").textContent = about;
const orders = {p: (a, b) => a.p - b.p, index: (a, b) => a.index - b.index, mean: (a, b) => b.mean - a.mean,
  right: (a, b) => (b.right - b.wrong) - (a.right - a.wrong),
  wrong: (a, b) => (a.right - a.wrong) - (b.right - b.wrong)};
for (const f of features)
  f.text = [f.index, ...f.promotes, ...f.suppresses, ...f.snippets.map(s => s.tokens.join(""))]
    .join("\\n").toLowerCase();
function element(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
function words(list, label, kind) {
  const line = element("div", label + " ", "words " + kind);
  for (const word of list) line.append(element("span", visible(word)));
  return line;
}
function card(f) {
  const made = element("article");
  made.append(element("h2", "feature " + f.index));
  made.append(element("div", `fires in ${share(f.right)} of right and ${share(f.wrong)} of wrong completions;
    ` + `difference ${share(f.right - f.wrong)} (95 %: ${share(f.low)} to ${share(f.high)}), ` +
    `p within prompts ${f.p.toPrecision(2)}, corrected ${f.q.toPrecision(2)}; ` +
    `mean strength ${f.mean.toPrecision(3)}`, "facts"));
  made.append(words(f.promotes, "raises", "up"), words(f.suppresses, "lowers", "down"));
  for (const s of f.snippets) {
    const line = element("div", undefined, "snippet"), top = Math.max(...s.strengths, 1e-9);
    line.dataset.mark = s.correct ? "right" : "wrong";
    s.tokens.forEach((token, i) => {
      const shown = element("span", visible(token));
      shown.title = s.strengths[i].toPrecision(3);
      shown.style.background = `rgba(255, 150, 0, ${0.8 * s.strengths[i] / top})`;
      line.append(shown);
    });
    made.append(line);
  }
  return made;
}
function show() {
  const query = byId("query").value.trim().toLowerCase();
  const number = /^\\d+$/.test(query) ? Number(query) : null;
  const found = features.filter(f => number !== null ? f.index === number || f.text.includes(query)
    : f.text.includes(query)).sort(orders[byId("order").value]);
  byId("count").textContent = found.length + " of " + features.length + " features";
  byId("list").replaceChildren(...found.slice(0, 100).map(card));
  if (found.length > 100) byId("list").append(element("p", "the first 100 are shown: search on", "more"));
}
byId("query").oninput = byId("order").onchange = show;
show();
</script></body></html>
"""


def write_browser(path: str | Path, features: Sequence[Feature], title: str, about: str) -> Path:
    """Write the page; `about` says in a sentence what the features are of. Returns its path."""
    data: Mapping[str, object] = {"about": about, "features": [asdict(feature) for feature in features]}
    # inside a script element only "</" could end it, and "<!--" open a comment
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    safe_title = title.replace("&", "&amp;").replace("<", "&lt;")
    page = PAGE.replace("$TITLE", safe_title).replace("$DATA", text)
    replace_file(Path(path), page.encode())
    return Path(path)
