"""Tables, sentences, plots and the page, from runs whose answers are made up and whose scores are known."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.evaluating import make_run
from helpers.steering import message

from steer.errors import SteerError
from steer.evaluation import browse, compare, page, scores, tables, task_effects
from steer.evaluation.collect import collect

N = 40
# The base has every fourth problem; `good` has those and half of all, `same` the base's, `noisy` others.
BASE = [n % 4 == 0 for n in range(N)]
GOOD = [n % 4 == 0 or n % 2 == 1 for n in range(N)]
NOISY = [n % 4 == 1 for n in range(N)]
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u2028&lt;"
)


def verdicts(right: list[bool]) -> list[list[bool]]:
    """Greedy and four samples, of which the first three are like the greedy answer and the last is wrong."""
    return [[r, r, r, r, False] for r in right]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    methods = {"base": BASE, "good": GOOD, "same": BASE, "noisy": NOISY}
    return make_run(tmp_path / "one", {name: verdicts(right) for name, right in methods.items()})


def by_key(rows: list[dict]) -> dict[tuple[str, str], dict]:
    return {(row["method"], row["decoding"]): row for row in rows}


def test_scores_of_known_answers(one):
    rows = by_key(compare.score(collect([one]), "base"))
    assert set(rows) == {(m, d) for m in ("base", "good", "same", "noisy") for d in ("greedy", "sampled")}
    base, good = rows["base", "greedy"], rows["good", "greedy"]
    assert base["accuracy"] == scores.share(10, N).__dict__
    assert good["accuracy"]["value"] == 0.75
    assert (good["gained"], good["lost"]) == (20, 0)
    assert good["gain"]["p"] == pytest.approx(2 / 2**20)
    assert good["gain"]["verdict"] == "better"
    assert (rows["noisy", "greedy"]["gained"], rows["noisy", "greedy"]["lost"]) == (10, 10)
    assert rows["noisy", "greedy"]["gain"]["verdict"] == "no difference shown"
    sampled = rows["good", "sampled"]
    assert sampled["accuracy"]["value"] == pytest.approx(0.75 * 0.75)
    assert sampled["pass"] == {"1": pytest.approx(0.5625), "2": pytest.approx(0.75), "4": pytest.approx(0.75)}
    assert sampled["majority"] == pytest.approx(0.75)
    assert sampled["tokens"] == np.mean([5, 6, 7, 8])
    assert rows["base", "sampled"]["truncated"] == 0.75
    assert "gain" not in base


def test_a_page_stays_when_the_reader_of_the_table_is_gone(one, tmp_path, monkeypatch):
    page = tmp_path / "page"
    page.mkdir()
    (page / "table.md").write_text("from before")

    def gone(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr(compare, "print", gone, raising=False)
    with pytest.raises(BrokenPipeError):
        compare.main([str(one), "--out", str(page), "--force"])
    assert (page / "index.html").exists() and "from before" not in (page / "table.md").read_text()


def test_better_is_said_only_where_it_is_shown(one, capsys):
    compare.report([one])
    printed = capsys.readouterr().out
    verdict = {line.split()[0]: line for line in printed.splitlines() if " on sums, greedily: " in line}
    assert "better than base (+0.500" in verdict["good"]
    for name in ("same", "noisy"):
        assert "not shown to differ from base" in verdict[name]
        assert not re.search("better|worse", verdict[name])
    assert "about one in twenty" in printed
    assert "the length limit cut off 75% of the answers of base" in printed
    assert json.loads((one / "scores.json").read_text())["base"] == "base"


def test_the_method_that_the_others_are_compared_with_is_named(tmp_path, capsys):
    folder = make_run(tmp_path / "r", {"full": verdicts(BASE), "good": verdicts(GOOD)})
    compare.report([folder], out=tmp_path / "page")
    printed = capsys.readouterr().out
    assert "there is no method 'base' here: the others are compared with full" in printed
    assert "comparisons with full, each at the 95 % level" in printed
    for text in (printed, (tmp_path / "page" / "table.md").read_text()):
        assert "| greedy against full" in text and "against base" not in text
    shown = (tmp_path / "page" / "index.html").read_text()
    assert "gained: full wrong, method right" in shown and "no method &#39;base&#39; here" in shown
    half = {"value": 0.5, "low": 0.25, "high": 0.75}
    tasks = [{"task": "t", "metric": "acc", "method": "m", "problems": 1, "accuracy": half}]
    assert "| accuracy | minus full |" in task_effects.table(tasks, "full")
    assert "| accuracy | minus the base |" in task_effects.table(tasks, "base")


def test_table_is_markdown_with_every_method(one):
    text = tables.table(compare.score(collect([one]), "base"))
    lines = text.splitlines()
    assert lines[0] == "**sums**, 40 problems"
    assert len({len(line) for line in lines[2:]}) == 1, "columns are aligned"
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["base", "good", "same", "noisy"]
    assert "0.750 (0.598 to 0.858)" in lines[5]


def test_a_verdict_on_one_seed_is_a_verdict_on_one_run(one, capsys):
    """`good` was trained once: nothing is said of the method."""
    compare.report([one], out=one / "page")
    printed = capsys.readouterr().out
    assert "good on sums, greedily: this run is better than base" in printed
    assert "good is better" not in printed and "good on sums, greedily: better" not in printed
    assert "one seed of training: good, same, noisy. Their intervals are over problems only" in printed
    rows = by_key(compare.score(collect([one]), "base"))
    assert rows["good", "greedy"]["one_seed"] and not rows["base", "greedy"]["one_seed"]
    assert tables.gain(rows["good", "greedy"]).endswith("better (one seed)")
    assert "better, one seed" in (one / "page" / "index.html").read_text()


def test_seeds_that_agree_make_it_a_verdict_on_the_method(tmp_path):
    seeds = {f"steering#{k}": [n % 4 == 0 or n % 10 != k for n in range(N)] for k in (1, 2, 3)}
    folder = make_run(tmp_path / "r", {n: verdicts(r) for n, r in {"base": BASE, **seeds}.items()})
    rows = compare.score(collect([folder]), "base")
    assert "steering on sums, greedily: better than base" in tables.sentences(rows, "base")[0]
    assert not tables.single_runs(rows)


def test_trained_methods_are_paired_with_one_another(one, tmp_path, capsys):
    found = {
        (row["method"], row["other"]): row
        for row in compare.pairs(collect([one]))
        if row["decoding"] == "greedy"
    }
    assert set(found) == {("good", "same"), ("good", "noisy"), ("same", "noisy")}
    row = found["good", "noisy"]  # 20 problems right with `good` alone, none with `noisy` alone
    assert row["difference"]["value"] == pytest.approx(0.5)
    assert row["p"] == pytest.approx(2 / 2**20)
    assert row["corrected_p"] == pytest.approx(3 / 2 * row["p"])  # the smallest of three, twice
    assert (row["verdict"], row["one_seed"]) == ("better", True)
    assert found["same", "noisy"]["verdict"] == "no difference shown"
    compare.report([one], out=tmp_path / "page")
    assert "| sums | greedy | good | noisy | +0.500 (" in capsys.readouterr().out
    assert "| better (one seed) |" in (tmp_path / "page" / "table.md").read_text()
    assert len(json.loads((tmp_path / "page" / "scores.json").read_text())["pairs"]) == 6


def test_seeds_are_one_method(tmp_path):
    seeds = {f"steering#{k}": [n % 4 == 0 or n % 5 == k for n in range(N)] for k in (1, 2, 3)}
    folder = make_run(tmp_path / "r", {n: verdicts(r) for n, r in {"base": BASE, **seeds}.items()})
    rows = by_key(compare.score(collect([folder]), "base"))
    row = rows["steering", "greedy"]
    assert row["seeds"] == 3
    expected = [np.mean(right) for right in seeds.values()]
    assert list(row["by_seed"].values()) == expected
    assert row["accuracy"]["value"] == pytest.approx(np.mean(expected))
    assert "(3 seeds)" in tables.table(list(rows.values()))


def test_seeds_of_several_runs_are_one_method_where_they_were_run_alike(tmp_path):
    first = make_run(tmp_path / "a", {"base": verdicts(BASE), "s#1": verdicts(GOOD)})
    second = make_run(tmp_path / "b", {"base": verdicts(BASE), "s#2": verdicts(NOISY)})
    hot = make_run(tmp_path / "hot", {"s#3": verdicts(GOOD)}, temperature=0.5)
    found = collect([first, second, hot])
    assert {m.name: m.seeds for m in found.methods} == {"base": [""], "s": ["1", "2"], "s (hot)": ["3"]}


def test_share_of_the_references_gain(tmp_path):
    half = [n % 4 == 0 or n % 4 == 1 for n in range(N)]
    folder = make_run(
        tmp_path / "r", {"base": [[b] for b in BASE], "s": [[h] for h in half], "full": [[g] for g in GOOD]}
    )
    rows = by_key(compare.score(collect([folder]), "base", "full"))
    assert rows["s", "greedy"]["gain_share"]["value"] == pytest.approx(0.5)
    sentences = tables.sentences(list(rows.values()), "base")
    assert "; 50% of full's gain (" in sentences[0]
    with pytest.raises(SteerError, match="no method 'fool' in these runs; they have base, s, full"):
        compare.score(collect([folder]), "base", "fool")


def test_runs_are_joined_and_their_differences_told(one, tmp_path):
    again = make_run(tmp_path / "again", {"base": verdicts(BASE), "full": verdicts(GOOD)})
    found = collect([one, again])
    assert [m.name for m in found.methods] == ["base", "good", "same", "noisy", "full"]
    assert not found.notes
    other = make_run(tmp_path / "hot", {"base": verdicts(NOISY)}, temperature=0.5)
    found = collect([one, other])
    assert [m.name for m in found.methods] == ["base", "good", "same", "noisy", "base (hot)"]
    assert found.methods[-1].rows[""]["sums"]["p1"][-1]["correct"]
    assert any(note.startswith("temperature differs: base 1.0") for note in found.notes)


def test_a_third_run_of_the_same_name_is_a_method_of_its_own(tmp_path):
    folders = [
        make_run(tmp_path / name / "eval", {"base": verdicts(right)}, temperature=temperature)
        for name, right, temperature in (("a", BASE, 1.0), ("b", NOISY, 0.5), ("c", GOOD, 0.25))
    ]
    found = collect(folders)
    assert [m.name for m in found.methods] == ["base", "base (eval)", f"base ({folders[2]})"]
    assert [m.conditions["temperature"] for m in found.methods] == [1.0, 0.5, 0.25]
    right = [[m.rows[""]["sums"][f"p{n}"][-1]["correct"] for n in range(N)] for m in found.methods]
    assert right == [BASE, NOISY, GOOD]


def test_fewer_problems_are_compared_where_one_answered_fewer(one, tmp_path):
    few = make_run(tmp_path / "few", {"short": verdicts(GOOD[:8])})
    found = collect([one, few])
    rows = by_key(compare.score(found, "base"))
    assert {row["problems"] for row in rows.values()} == {8}
    assert "sums: base answered 40 problems; compared are the 8 that all methods answered" in found.notes


def test_an_unfinished_run_says_so(one):
    part = one / "part-00000.parquet"
    import pyarrow.parquet as parquet

    table = parquet.read_table(part)
    parquet.write_table(table.slice(0, len(table) - 60), part)
    found = collect([one])
    assert any("is not finished: at least 60 answers are missing" in note for note in found.notes)
    rows = by_key(compare.score(found, "base"))
    assert rows["noisy", "greedy"]["problems"] == N - 12, "problems without all answers are left out"


def test_folders_that_are_no_runs(tmp_path, capsys):
    with pytest.raises(SteerError, match="no run in") as error:
        collect([tmp_path])
    message(error)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SteerError, match=r"run.json cannot be read \(it is not what `steer eval` writes\)"):
        collect([tmp_path])
    assert compare.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


# ---- the page


@pytest.fixture
def written(one, tmp_path) -> Path:
    hostile = make_run(tmp_path / "two", {"x<b>$y": verdicts(GOOD)}, {"x<b>$y": HOSTILE})
    assert compare.main([str(one), str(hostile), "--reference", "good", "--out", str(tmp_path / "page")]) == 0
    return tmp_path / "page"


class Elements(HTMLParser):
    """Every element's name and attributes, and the text of the scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def test_what_is_written(written):
    names = {path.name for path in written.iterdir()}
    assert names == {"table.md", "scores.json", "accuracy.png", "parameters.png", "lengths.png", "index.html"}
    for name in names:
        if name.endswith(".png"):
            assert (written / name).read_bytes().startswith(b"\x89PNG")
    assert compare.main([str(written), "--out", str(written)]) == 1  # a page is no run


def test_the_page_loads_nothing_and_holds_no_markup_of_a_model(written):
    text = (written / "index.html").read_text()
    parsed = Elements()
    parsed.feed(text)
    assert [tag for tag, _ in parsed.found].count("script") == 2
    assert not [tag for tag, _ in parsed.found if tag in ("img", "link", "iframe", "object", "b")]
    for tag, attributes in parsed.found:
        for name, value in attributes.items():
            assert name not in ("src", "onerror", "onload"), tag
            assert not (name.endswith("href") and not str(value).startswith("#")), (tag, value)
    data = json.loads(parsed.scripts[0])
    assert any(
        a["text"] == HOSTILE for item in data["items"] for m in item["answers"].values() for a in m.values()
    )
    policy = next(a["content"] for tag, a in parsed.found if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_problems_gained_and_lost_stand_in_the_page(written):
    text = (written / "index.html").read_text()
    assert "good: 20 problems</summary>" in text
    assert "noisy: 10 problems</summary>" in text
    assert "x&lt;b&gt;$y: 20 problems" in text
    assert text.count("What is 4 + 1?") > 1


def test_problems_gained_are_counted_among_those_that_are_compared(one, tmp_path):
    few = make_run(tmp_path / "few", {"short": verdicts(GOOD[:8])})
    assert compare.main([str(one), str(few), "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "index.html").read_text()
    assert "good: 4 problems</summary>" in text and "short: 4 problems</summary>" in text
    assert "and of the first training seed. The gains above" in text


def test_a_page_is_kept_small(one, monkeypatch):
    monkeypatch.setattr(page, "LISTED", 3)
    found = collect([one])
    whole = page.render(found, compare.score(found, "base"), "base", {})
    assert "and 17 more, below" in whole and "of them below" not in whole
    monkeypatch.setattr(page, "MAX_CHARACTERS", 2000)
    text = page.render(found, compare.score(found, "base"), "base", {})
    kept = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])["items"]
    assert 0 < len(kept) < N
    assert all(int(item["id"][1:]) % 4 != 2 for item in kept), "those that changed come first"
    assert f"the answers to {N - len(kept)} problems are left out of this page" in text
    for counted in ("good: 20 problems</summary>", "noisy: 10 problems</summary>"):
        assert counted in whole and counted in text
    below = sum(int(item["id"][1:]) % 2 for item in kept) - 3  # `good` gains the odd ones, and lists three
    assert 0 < below < 17 and f"and 17 more, {below} of them below" in text


def chromium(argument: str, target: Path, folder: Path) -> str:
    """Open `target` in headless Chromium; what it printed."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine")
    plain = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    quiet = "--disable-component-update --disable-sync --virtual-time-budget=2000 --window-size=1200,2600"
    command = [
        program,
        *plain.split(),
        *quiet.split(),
        f"--user-data-dir={folder}",
        argument,
        target.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize(("chosen", "listed"), [("all", 40), ("gained", 20), ("lost", 0), ("both wrong", 10)])
def test_a_browser_shows_and_filters_the_answers(written, tmp_path, chosen, listed):
    path = written / "index.html"
    text = path.read_text().replace(f'<option value="{chosen}">', f'<option value="{chosen}" selected>')
    path.write_text(text)
    shown = chromium("--dump-dom", path, tmp_path / "profile")
    assert "<title>good, same, noisy, x&lt;b&gt;$y against base</title>" in shown, "no script of a model ran"
    assert f'<span id="count">{listed} of 40 problems</span>' in shown
    assert shown.count('<span class="dots">') == listed
    if listed:
        assert shown.count('<div class="answer ') == 5
        assert "&lt;/script&gt;&lt;script&gt;document.title" in shown
    else:
        assert "No problem passes this filter." in shown


def test_a_method_of_several_seeds_has_no_answer_of_a_seed_that_it_lacks(tmp_path):
    right = {name: [[r] for r in GOOD] for name in ("s#1", "s#2", "t#1", "t#3")}
    found = collect([make_run(tmp_path / "r", {"base": [[r] for r in BASE], **right})])
    text = page.render(found, compare.score(found, "base"), "base", {})
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])
    assert data["seeds"] == {"base": 1, "s": 2, "t": 2}
    path = tmp_path / "index.html"  # the decoding that is named first is chosen
    path.write_text(text.replace('"decodings": [', '"decodings": ["greedy, training seed 3", '))
    shown = chromium("--dump-dom", path, tmp_path / "profile")
    assert shown.count('title="s: no answer here"') == N
    assert shown.count('<div class="answer ') == 2  # of base, and of t


def test_a_browser_draws_the_page(written, tmp_path):
    picture = tmp_path / "page.png"
    chromium(f"--screenshot={picture}", written / "index.html", tmp_path / "profile")
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[:2] == (2600, 1200)
    inked = (pixels[..., :3].mean(-1) < 0.6).mean(1)
    assert (inked[:600] > 0).mean() > 0.2, "text and figures from the top"
    assert (inked[1500:2400] > 0).mean() > 0.1


# ---- the terminal


@pytest.mark.parametrize(("verdict", "count"), [("gained", 20), ("lost", 0), ("wrong", 10), ("all", 40)])
def test_browse_selects(one, verdict, count):
    found = list(browse.select(collect([one]), "base", ["base", "good"], verdict, None, -1))
    assert len(found) == count


def test_browse_prints_side_by_side(one, capsys):
    assert browse.main([str(one), "--verdict", "gained", "--methods", "good", "--limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 20 problems (gained)" in printed
    assert re.search(r"^base +\| good$", printed, re.MULTILINE)
    assert re.search(r"^So \\boxed\{0\} +\| So \\boxed\{2\}$", printed, re.MULTILINE)


def test_a_model_cannot_drive_the_terminal(tmp_path, capsys):
    folder = make_run(tmp_path / "r", {"base": [[True]]}, {"base": "a\x1b[2Jb\x07\u202ec\td"})
    assert browse.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "a\\x1b[2Jb\\x07\\u202ec    d" in printed
    assert "\x1b" not in printed


def test_browse_mistakes(one, capsys):
    assert browse.main([str(one), "--methods", "bad"]) == 1
    assert "no method 'bad' in these runs; they have base, good, same, noisy" in capsys.readouterr().err
    assert browse.main([str(one), "--benchmark", "gsm8k"]) == 1
    assert "no benchmark 'gsm8k' here; there are sums" in capsys.readouterr().err
    assert browse.main([str(one), "--base", "bad"]) == 1
    assert "no method 'bad' in these runs; they have base, good, same, noisy" in capsys.readouterr().err


def test_browse_measures_against_the_first_method_where_there_is_no_base(tmp_path, capsys):
    folder = make_run(tmp_path / "r", {"full": verdicts(BASE), "good": verdicts(GOOD)})
    for more in ([], ["--methods", "good"]):
        assert browse.main([str(folder), "--verdict", "gained", *more]) == 0
        printed = capsys.readouterr().out
        assert "5 of 20 problems (gained)" in printed
        assert re.search(r"^full +\| good$", printed, re.MULTILINE)
