"""
The style and the script of the page (`steer.evaluation.page`). The script builds every element with
`textContent`, so that no text of a model can become markup.
"""

STYLE = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #e1e6eb; --ground: #fafbfc; --good: #0f766e; --bad: #b42318;
  --good-ground: #e6f4f1; --bad-ground: #fdecea; --mark: #1d4ed8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, ul { margin: .4rem 0; max-width: 78ch; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .82rem; white-space: nowrap; }
th, td { padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.name { font-weight: 600; white-space: nowrap; }
td small { display: block; color: var(--soft); white-space: nowrap; }
.badge { display: inline-block; border-radius: 999px; padding: 0 .6em; font-size: .8rem; line-height: 1.6;
  background: #eef1f4; color: var(--soft); white-space: nowrap; }
.badge.good { background: var(--good-ground); color: var(--good); }
.badge.bad { background: var(--bad-ground); color: var(--bad); }
.facts { overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem;
  align-items: start; }
.plots.wide { grid-template-columns: 1fr; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
details { border-top: 1px solid var(--line); padding: .45rem 0; }
summary { cursor: pointer; }
.problem { white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { padding: .6rem 0; border-top: 1px dashed var(--line); }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; margin-bottom: .8rem; }
.controls label { display: flex; flex-direction: column; font-size: .8rem; color: var(--soft); }
select, input { font: inherit; font-size: .92rem; padding: .25rem .4rem; border: 1px solid #c7cfd8;
  border-radius: 5px; background: #fff; color: var(--ink); }
.reader { display: grid; grid-template-columns: 290px minmax(0, 1fr); gap: 1rem; align-items: start; }
.list { max-height: 76vh; overflow-y: auto; padding: .3rem; position: sticky; top: 1rem; }
.list button { display: block; width: 100%; text-align: left; border: 0; background: none; font: inherit;
  font-size: .86rem; line-height: 1.4; padding: .4rem .5rem; border-radius: 5px; cursor: pointer;
  color: inherit; }
.list button:hover { background: #f0f3f6; }
.list button[aria-current=true] { background: #e4ecfb; }
.list .text { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; }
.dots { letter-spacing: .15em; font-size: .8rem; }
.dots .good { color: var(--good); } .dots .bad { color: var(--bad); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: .9rem;
  margin-top: .9rem; }
.answer { border: 1px solid var(--line); border-top: 3px solid #c7cfd8; border-radius: 6px;
  padding: .6rem .8rem;
  background: #fff; min-width: 0; }
.answer.good { border-top-color: var(--good); } .answer.bad { border-top-color: var(--bad); }
.answer h4 { margin: 0 0 .2rem; font-size: .95rem; }
.answer pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 0;
  font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; max-height: 60vh;
  overflow-y: auto; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .9em; }
@media (max-width: 760px) { .reader { grid-template-columns: 1fr; } .list { position: static;
  max-height: 30vh; } }
"""

SCRIPT = """
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const get = id => document.getElementById(id);
const make = (tag, name, text) => {
  const e = document.createElement(tag);
  if (name) e.className = name;
  if (text !== undefined) e.textContent = text;
  return e;
};
const option = (select, value, text) => {
  const e = make('option', '', text);
  e.value = value;
  select.append(e);
};
let shown = [], at = 0;

for (const b of data.benchmarks) option(get('benchmark'), b, b);
for (const d of data.decodings) option(get('decoding'), d, d);
for (const m of data.methods.slice(1)) option(get('method'), m, m);
if (data.methods.length < 2) option(get('method'), data.methods[0], data.methods[0]);

// the answer of one method to one problem as chosen; a method with one training seed has that one's for all
const answer = (item, method) => {
  const label = get('decoding').value, answers = item.answers[method] || {};
  return answers[label] || answers[label.split(', training seed')[0]];
};
const tests = {
  all: () => true,
  gained: (b, m) => b && m && !b.correct && m.correct,
  lost: (b, m) => b && m && b.correct && !m.correct,
  right: (b, m) => m && m.correct,
  wrong: (b, m) => m && !m.correct,
  'both wrong': (b, m) => b && m && !b.correct && !m.correct,
  'cut off': (b, m) => m && m.truncated,
  'no answer': (b, m) => m && m.how === 'no_answer',
};

function filter() {
  const words = get('search').value.toLowerCase(), benchmark = get('benchmark').value;
  const method = get('method').value, test = tests[get('verdict').value];
  shown = data.items.filter(item =>
    (!benchmark || item.benchmark === benchmark) &&
    data.methods.some(m => answer(item, m)) &&
    test(answer(item, data.methods[0]), answer(item, method)) &&
    (!words || item.problem.toLowerCase().includes(words)));
  at = 0;
  const list = get('list');
  list.replaceChildren();
  shown.forEach((item, i) => {
    const row = make('button');
    row.type = 'button';
    const dots = make('span', 'dots');
    for (const m of data.methods) {
      const a = answer(item, m);
      const mark = a ? (a.correct ? '\\u25cf' : '\\u25cb') : '\\u00b7';
      const dot = make('span', a ? (a.correct ? 'good' : 'bad') : '', mark);
      dot.title = m + (a ? (a.correct ? ': right' : ': wrong') : ': no answer here');
      dots.append(dot);
    }
    row.append(dots, make('span', 'text', item.problem));
    row.addEventListener('click', () => show(i));
    list.append(row);
  });
  get('count').textContent = shown.length + ' of ' + data.items.length + ' problems';
  show(0);
}

function show(i) {
  const panel = get('panel');
  panel.replaceChildren();
  if (!shown.length) {
    panel.append(make('p', 'soft', 'No problem passes this filter.'));
    return;
  }
  at = Math.max(0, Math.min(i, shown.length - 1));
  [...get('list').children].forEach((row, n) => row.setAttribute('aria-current', n === at));
  const current = get('list').children[at];
  const list = get('list');
  const end = current.offsetTop + current.offsetHeight;
  if (current.offsetTop < list.scrollTop || end > list.scrollTop + list.clientHeight)
    list.scrollTop = current.offsetTop - list.clientHeight / 3;
  const item = shown[at];
  panel.append(make('div', 'soft', item.benchmark + ', problem ' + item.id));
  panel.append(make('div', 'problem', item.problem));
  const line = make('p', 'soft', 'Reference answer: ');
  line.append(make('code', '', item.answer));
  panel.append(line);
  const grid = make('div', 'answers');
  for (const m of data.methods) {
    const a = answer(item, m);
    if (!a) continue;
    const box = make('div', 'answer ' + (a.correct ? 'good' : 'bad'));
    box.append(make('h4', '', m));
    const facts = make('div', 'soft');
    facts.append(make('span', 'badge ' + (a.correct ? 'good' : 'bad'), a.correct ? 'right' : 'wrong'));
    facts.append(document.createTextNode(' '));
    if (a.given === null) facts.append(document.createTextNode('no boxed answer'));
    else facts.append(document.createTextNode('answer '), make('code', '', a.given));
    const end = a.truncated ? ', cut off' : '';
    facts.append(document.createTextNode(', ' + a.tokens + ' tokens' + end + a.note));
    box.append(facts, make('pre', '', a.text || '(nothing)'));
    grid.append(box);
  }
  panel.append(grid);
}

for (const id of ['benchmark', 'decoding', 'method', 'verdict']) get(id).addEventListener('change', filter);
get('search').addEventListener('input', filter);
document.addEventListener('keydown', event => {
  if (['INPUT', 'SELECT', 'TEXTAREA'].includes(event.target.tagName)) return;
  if (event.key === 'j') show(at + 1);
  if (event.key === 'k') show(at - 1);
});
filter();
"""
