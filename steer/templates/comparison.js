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
  return answers[label] || (data.seeds[method] < 2 ? answers[label.split(', training seed')[0]] : undefined);
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
      const mark = a ? (a.correct ? '\u25cf' : '\u25cb') : '\u00b7';
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
