const {about, features} = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id), share = x => (100 * x).toFixed(1) + " %";
const visible = t => t.replace(/\n/g, "\u21b5").replace(/^ +$/, "\u2423");
byId("about").textContent = about;
const orders = {p: (a, b) => a.p - b.p, index: (a, b) => a.index - b.index, mean: (a, b) => b.mean - a.mean,
  right: (a, b) => b.difference - a.difference, wrong: (a, b) => a.difference - b.difference};
for (const f of features)
  f.text = [f.index, ...f.promotes, ...f.suppresses, ...f.snippets.map(s => s.tokens.join(""))]
    .join("\n").toLowerCase();
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
    ` + `within prompts: difference ${share(f.difference)} (95 %: ${share(f.low)} to ${share(f.high)}), ` +
    `p ${f.p.toPrecision(2)}, corrected ${f.q.toPrecision(2)}; ` +
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
  const number = /^\d+$/.test(query) ? Number(query) : null;
  const found = features.filter(f => number !== null ? f.index === number || f.text.includes(query)
    : f.text.includes(query)).sort(orders[byId("order").value]);
  byId("count").textContent = found.length + " of " + features.length + " features";
  byId("list").replaceChildren(...found.slice(0, 100).map(card));
  if (found.length > 100) byId("list").append(element("p", "the first 100 are shown: search on", "more"));
}
byId("query").oninput = byId("order").onchange = show;
show();
