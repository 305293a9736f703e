"""The HTML report: what it says, that it loads nothing and runs nothing foreign, and how it behaves in a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shlex
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, chromium
from reference.run_folders import rows_of, write_rows, write_run
from typer.testing import CliRunner, Result

from cotune.cli import app
from cotune.compare import evidence, plots, report
from cotune.compare.curves import learning
from cotune.compare.markup import data, tag
from cotune.compare.stats import Estimate
from cotune.compare.tables import compare
from cotune.config import parse_set, resolve

IDS = [f"q{i}" for i in range(40)]
ZEROS = dict.fromkeys(IDS, 0.0)
SOME = {i: float(n % 3 == 0) for n, i in enumerate(IDS)}
MOST = {i: float(n % 10 != 0) for n, i in enumerate(IDS)}
NASTY = (
    "<script>alert(1)</script></script><img src=x onerror=alert(1)><!-- ]]> <svg/onload=alert(1)>"
    '" onmouseover="alert(1)\' javascript:alert(1) https://evil.example/x.js @import url(//evil.example)'
    "\x1b[31mred\x1b]0;title\x07 \u2028\u2029 \u202egnp.exe \ud800 \\ud800 \x00 {{7*7}} ${x} &lt;b&gt;"
)
COST = {"tokens": 5000, "flops": 1e9, "seconds": 3.0}
EMPTY_TAGS = {"meta", "br", "input", "hr"}


def cotune(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def write_events(folder: Path, *events: dict) -> None:
    write_rows(folder / "events.jsonl", [{"i": i, "time": 0.0, **event} for i, event in enumerate(events)])


def save_prompt(folder: Path, instruction: str, demonstrations: tuple[dict, ...] = ()) -> None:
    (folder / "tuned").mkdir()
    prompt = {"instruction": instruction, "demonstrations": list(demonstrations)}
    (folder / "tuned" / "tuned.json").write_text(json.dumps({"kind": "fixed", "prompt": prompt, "adapter": False}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two strategies with a finished run and one that failed; everything that a report can show."""
    out = tmp_path_factory.mktemp("runs")
    save_prompt(write_run(out, "zero-shot", ZEROS), "Solve the problem. Be brief.")
    cells = {"seed/base": ZEROS, "tuned/base": ZEROS, "seed/tuned": SOME}
    tuned = write_run(out, "sequential", MOST, tuning=COST, cells=cells)
    save_prompt(tuned, "Solve the problem. Be careful.", ({"question": "1+1?", "answer": "2"},))
    write_events(
        tuned,
        {"kind": "candidate", "origin": "start", "score": 0.1, "tuning_tokens": 100},
        {"kind": "round", "best": 0.5, "tuning_tokens": 900},
        {"kind": "epoch", "val_score": 0.25, "tuning_tokens": 2000},
        {"kind": "epoch", "val_score": 0.75, "tuning_tokens": 4000},
    )
    write_run(out, "joint", status="failed", reason="CUDA ran out of memory")
    return out


class Seen(html.parser.HTMLParser):
    """What a browser would make of the page: elements with attributes, text outside scripts, scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        self.close()
        assert self.open == [], "every element is closed, in order"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY_TAGS:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def only(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(*folders: Path) -> str:
    return report.as_html(compare(folders))


# ---- what it says ----


def test_the_command_writes_one_file_that_says_what_json_says(runs: Path, tmp_path: Path) -> None:
    done = cotune("compare", runs, "--format", "html", "--out", tmp_path / "report.html")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    seen = Seen((tmp_path / "report.html").read_text(encoding="utf-8"))
    rows = {r["strategy"]: r for r in json.loads(cotune("compare", runs, "--json").stdout)["groups"][0]["rows"]}
    shown = {row[0]: row for row in seen.tables[0][1:]}
    assert shown.keys() == rows.keys()
    for strategy in ("zero-shot", "sequential"):
        row = rows[strategy]
        score = f"{100 * row['score']:.1f} [{100 * row['score_low']:.1f}, {100 * row['score_high']:.1f}]"
        assert score in shown[strategy]
    row = rows["sequential"]
    low, high = 100 * row["difference_low"], 100 * row["difference_high"]
    assert f"{100 * row['difference']:+.1f} [{low:.1f}, {high:.1f}]*" in shown["sequential"]
    assert row["difference_sentence"] in seen.text
    assert row["interaction_sentence"] in seen.text
    assert "CUDA ran out of memory" in seen.text


def test_the_answer_stands_on_top(runs: Path) -> None:
    (head,) = re.findall("<h1>(.*?)</h1>", page_of(runs))
    assert head == (
        "On micro-gsm8k, sequential is better than zero-shot by 90.0 points (95% 73.4 to 96.0); "
        "one seed: other seeds are not covered; 1 run is not in it: 1 failed."
    )


def test_no_difference_is_never_told_as_one(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", MOST)
    write_run(tmp_path, "prompt-only", MOST | {"q1": 0.0})
    write_run(tmp_path, "lora-only", MOST | {"q2": 0.0})
    (group,) = compare([tmp_path])
    said = report.answer(group)
    assert said.startswith(
        "On micro-gsm8k, no difference is shown between zero-shot and any of prompt-only and lora-only"
    )
    assert "better" not in said


def test_several_tasks_are_answered_by_their_mean_first(tmp_path: Path) -> None:
    for task in ("micro-gsm8k", "micro-math"):
        write_run(tmp_path, "zero-shot", ZEROS, task=task)
        write_run(tmp_path, "prompt-only", MOST, task=task)
    write_run(tmp_path, "lora-only", MOST)
    seen = page_of(tmp_path)
    (head,) = re.findall("<h1>(.*?)</h1>", seen)
    assert head.startswith("On the mean of 2 tasks, prompt-only is better than zero-shot by 90.0 points")
    assert head.endswith("; not finished on every task: lora-only.")
    assert seen.count("On micro-math, prompt-only is better") == 1


def test_plots_carry_their_numbers_as_text_and_every_kind_is_there(runs: Path) -> None:
    seen = Seen(page_of(runs))
    labels = [str(a["aria-label"]) for a in seen.only("svg")]
    assert len(labels) == 2 * 4  # each for a wide and a narrow screen
    assert all(a["role"] == "img" for a in seen.only("svg"))
    differences, two, cost, curves = labels[::2]
    assert "sequential +90.0 [" in differences
    assert "tuned/tuned 90.0" in two
    assert "Pareto front: zero-shot, sequential." in cost
    assert "sequential: 10 to 50, 25 to 75" in curves


def test_prompts_are_shown_against_the_seed_prompt(runs: Path) -> None:
    page = page_of(runs)
    assert "Solve the problem. Be <del>brief</del><ins>careful</ins>." in page
    assert "1 demonstration" in page
    assert str(report.difference("Say it.", "Count to ten!")) == "<ins>Count to ten!</ins>"
    assert str(report.difference("Say it. Be brief.", "Say it.")) == "Say it.<del>Be brief.</del>"
    assert str(report.difference("a b c", "a b c")) == "a b c"
    assert str(report.difference("a <b> c d", "a <i> c d")) == "a &lt;<del>b</del><ins>i</ins>&gt; c d"


def test_the_pareto_front_is_who_nobody_beats_for_less() -> None:
    assert plots.pareto([(0, 0.2), (5, 0.9), (5, 0.8), (7, 0.9), (9, 0.95), (3, 0.1)]) == [0, 1, 4]
    assert plots.pareto([]) == []


def test_labels_that_would_cover_the_plot_become_numbers_with_a_key() -> None:
    score = Estimate(0.5, 0.4, 0.6, 0.05, 100)
    few = [(plots.Series(f"joint-{n}", "joint"), 10.0**n, score) for n in range(1, 4)]
    long = [(plots.Series(f"joint (share=0.{n}, rank={n})", "joint"), 10.0**n, score) for n in range(1, 4)]

    def names(items: list[tuple[plots.Series, float, Estimate]]) -> list[str]:
        svg = ElementTree.fromstring(plots.frontier("t", "accuracy", items).alone())
        return [str(e.text) for e in svg.iter() if "name" in e.get("class", "")]

    assert names(few) == ["joint-1", "joint-2", "joint-3"]
    assert names(long) == ["1", "2", "3", *(f"{n}  joint (share=0.{n}, rank={n})" for n in (1, 2, 3))]


def test_provenance_names_digests_and_the_command_of_every_run(runs: Path, tmp_path: Path) -> None:
    settings, more = {"prompt": {"rounds": 7}, "data": "/somewhere/rows"}, {"hardware": ["cpu", "AVX2"]}
    other = write_run(tmp_path, "prompt-only", MOST, settings=settings, more=more)
    (other / "environment.json").write_text(json.dumps({"commit": "abcdef0123456789", "packages": {"torch": "2.99"}}))
    seen = Seen(page_of(runs, other))
    command = "cotune run --strategy prompt-only --model tiny --task micro-gsm8k --data DIR --set prompt.rounds=7"
    assert command in seen.text
    assert "/somewhere/rows" not in seen.text
    row = next(row for row in seen.tables[-1] if row[0] == other.name)
    assert row[1:5] == ["done", "abcdef01", "2.99", "cpu AVX2"]


def test_the_commands_make_run_and_page_again(tmp_path: Path) -> None:
    """What they say is read back as the same settings, and the same page."""
    settings = {"seed_instruction": 'Say "hi" – it\'s\nfine 😀', "prompt": {"rounds": 7}, "joint": {"share": 0.25}}
    write_run(tmp_path, "zero-shot", ZEROS)
    write_run(tmp_path, "joint", MOST, settings=settings, seed=3)
    (group,) = compare([tmp_path], "joint", "accuracy")
    run = next(row.runs[0] for row in group.rows if row.strategy == "joint")
    words = shlex.split(report.command(run))
    assert words[:2] == ["cotune", "run"]
    given = list(zip(words[2::2], words[3::2], strict=True))
    named = {name[2:]: value for name, value in given if name != "--set"}
    again = resolve(named | {"seed": int(named["seed"])}, parse_set([v for name, v in given if name == "--set"]))
    assert again.model_dump(mode="json") == dict(run.config)
    assert "cotune compare DIR --format html --out report.html --baseline joint<" in report.as_html([group])
    assert "--out report.html<" in page_of(tmp_path)


def test_the_same_folders_give_the_same_bytes(runs: Path) -> None:
    assert page_of(runs) == page_of(runs)


# ---- what is missing ----


def test_missing_pieces_are_sentences(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "prompt-only", MOST)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["cost"]
    (folder / "summary.json").write_text(json.dumps(summary))
    seen = Seen(page_of(tmp_path))
    assert seen.only("svg") == []
    for sentence in (
        "Only prompt-only is finished (90.0 [",
        "No differences to draw",
        "No 2x2:",
        "No quality against cost:",
        "No learning curves:",
        "The seed prompt is not known",
    ):
        assert sentence in seen.text


def test_without_a_finished_run_there_is_still_a_report(tmp_path: Path) -> None:
    write_run(tmp_path, "joint", status="failed", reason="it broke")
    write_run(tmp_path, "sequential", status=None)
    page = page_of(tmp_path)
    sentence = "Nothing to compare: no run of micro-gsm8k is finished (2 runs are not in it: 1 failed, 1 unfinished)."
    assert f"<h1>{sentence}</h1>" in page
    assert "No finished run, so no examples." in page
    assert 'id="data"' not in page


def test_damaged_files_beside_the_scores_are_named_not_raised(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "prompt-only", MOST, tuning=COST)
    (folder / "events.jsonl").write_text('{"kind": \n{"kind": "epoch"}\n[1]\n')
    (folder / "environment.json").write_text("[]")
    (folder / "tuned").mkdir()
    (folder / "tuned" / "tuned.json").write_text('{"kind": "fixed", "prompt": {"instruction": 3}}')
    assert f"{folder.name}: events.jsonl could not be read (UsageError)." in Seen(page_of(tmp_path)).text
    odd = [{"kind": "epoch", "val_score": v, "tuning_tokens": t} for v, t in ((True, 1), (2, 1), (0.5, -1), (0.5, "x"))]
    write_events(folder, *odd)
    assert learning(compare([tmp_path])[0].rows[0].runs[0], []) is None


def test_an_unknown_strategy_of_a_plugin_is_drawn_like_any_other(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", ZEROS)
    folder = write_run(tmp_path, "prompt-only", MOST, tuning=COST)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "strategy": 'x" onload="alert(1)'}))
    damaged = write_run(tmp_path, "joint", status=None)
    (damaged / "config.json").write_text('{"strategy": 3')
    seen = Seen(page_of(tmp_path))
    assert "--strategy 'x\" onload=\"alert(1)'" in seen.text
    assert "what made this run is not known" in seen.text
    assert len(seen.only("svg")) == 4
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)


# ---- what is foreign stays text ----


def nasty_runs(out: Path) -> Path:
    """Every text that data, a model or a person may have chosen is hostile; one completion has a million letters."""
    ids = {NASTY + str(n): float(n % 2) for n in range(6)}
    for strategy, scores in (("zero-shot", dict.fromkeys(ids, 0.0)), ("prompt-only", ids)):
        clean = {i.encode("utf-8", "replace").decode(): s for i, s in scores.items()}
        folder = write_run(
            out, strategy, clean, tuning=COST, settings={"seed_instruction": NASTY.replace("\ud800", "")}
        )
        rows = rows_of(clean)
        for n, row in enumerate(rows):
            row |= dict.fromkeys(("instruction", "completion", "prediction", "reference", "note"), NASTY)
            row["completion"] += "x" * (1_000_000 if n == 0 else 10)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        save_prompt(folder, NASTY + strategy, ({"question": NASTY, "answer": NASTY},))
        write_events(folder, {"kind": "finalist", "val_score": 0.5, "tuning_tokens": 10, "text": "x"})
        summary = json.loads((folder / "summary.json").read_text())
        summary["notes"] = [NASTY]
        summary["headline"] = NASTY
        summary["comparable"]["grader_version"] = NASTY
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "environment.json").write_text(json.dumps({"commit": NASTY, "packages": {"torch": NASTY}}))
    write_run(out, "joint", status="failed", reason=NASTY.replace("\ud800", ""), name="<b>run & co")
    return out


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    groups = compare([nasty_runs(tmp_path / "runs")])
    assert [row.status for row in groups[0].rows] == ["done", "done", "failed"]
    page = report.as_html(groups)
    seen = Seen(page)
    page.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    # Two scripts, both ours; nothing else that could run or load.
    assert [a.get("type") for a in seen.only("script")] == ["application/json", None]
    assert seen.scripts[1] == report._asset("report.js")
    assert {name for name, _ in seen.tags} & {
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "image",
    } == set()
    for name, attributes in seen.tags:
        assert not any(key.startswith("on") or key in ("src", "style", "srcset", "action") for key in attributes), name
        assert str(attributes.get("href") or "#").startswith("#")
    assert len(seen.only("style")) == 1
    for asset in ("plots.css", "report.css"):
        assert not re.search(r"url\(|@import|//[a-z]", report._asset(asset))
    assert "innerHTML" not in report._asset("report.js")
    shown = json.loads(seen.scripts[0])[0]
    assert any(text.startswith("<script>alert(1)</script>") for text in shown["texts"])
    assert all(len(text) < 5000 for text in shown["texts"])
    every = [*shown["texts"], *shown["ids"], *shown["rows"], shown["title"], shown["metric"]]
    assert all(text.replace("\n", "").isprintable() for text in every)
    assert any(re.search(r"\n… cut: 1,000,\d{3} characters in all$", text) for text in shown["texts"])
    assert "<" not in seen.scripts[0]
    assert len(page) < 400_000
    for name, svg in report.drawings(groups).items():
        assert re.fullmatch(r"[\w.-]+\.svg", name)
        root = ElementTree.fromstring(svg)
        assert {e.tag.split("}")[1] for e in root.iter()} <= {
            "svg", "style", "title", "desc", "text", "line", "g", "circle", "rect", "path", "polyline",
        }  # fmt: skip


def test_markup_escapes_whatever_is_not_markup() -> None:
    made = tag("p", "<b>", tag("i", "&"), None, ["'", ['"']], title='"><x', hidden=True, class_="a", id=False)
    assert made == '<p title="&quot;&gt;&lt;x" hidden class="a">&lt;b&gt;<i>&amp;</i>&#x27;&quot;</p>'
    assert data(["</script>", "\u2028"]) == (
        '<script type="application/json">["\\u003c/script\\u003e","\\u2028"]</script>'
    )


def test_the_policy_allows_exactly_our_style_and_script(runs: Path) -> None:
    import base64
    import hashlib

    page = page_of(runs)
    policy = str(next(a for a in Seen(page).only("meta") if "http-equiv" in a)["content"])
    assert policy.startswith("default-src 'none'; ")
    for kind, pattern in (("style", "<style>(.*?)</style>"), ("script", "<script>(.*?)</script>")):
        (inside,) = re.findall(pattern, page, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_texts_beyond_the_room_are_left_out_and_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        write_run(tmp_path, "prompt-only", MOST, seed=seed)
    monkeypatch.setattr(evidence, "ROOM", 10)
    seen = Seen(page_of(tmp_path))
    first, second = json.loads(seen.scripts[0])[0]["runs"]
    assert first["completion"] is not None
    assert second["completion"] is None
    assert second["outcome"] == first["outcome"]
    assert "grades only in the example browser" in seen.text


# ---- the command ----


def test_html_needs_a_file_and_says_what_it_cannot_write(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = cotune("compare", runs, "--format", "html", "--out", tmp_path / "no" / "report.html")
    assert nowhere.exit_code == 2
    assert "cannot be written" in nowhere.stderr
    (tmp_path / "file").write_text("")
    blocked = cotune("compare", runs, "--plots", tmp_path / "file")
    assert blocked.exit_code == 2
    assert "Choose another --plots" in blocked.stderr
    import cotune.commands.report as command

    class Terminal:
        class stdout:
            @staticmethod
            def isatty() -> bool:
                return True

    monkeypatch.setattr(command, "sys", Terminal)
    refused = cotune("compare", runs, "--format", "html")
    assert refused.exit_code == 2
    assert "Add --out report.html" in refused.stderr


def test_plots_are_files_of_their_own(runs: Path, tmp_path: Path) -> None:
    assert cotune("compare", runs, "--plots", tmp_path / "plots").exit_code == 0
    names = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert names == [f"1-micro-gsm8k-{kind}.svg" for kind in ("2x2", "cost", "curves", "differences")]
    for name in names:
        assert ElementTree.parse(tmp_path / "plots" / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"


# ---- in a browser ----

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def page(tab: Page) -> Iterator[Page]:
    """The tab, which must have had nothing to complain about and fetched nothing."""
    tab.problems.clear()
    tab.requests.clear()
    yield tab
    assert tab.problems == []
    assert [url for url in tab.requests if not url.startswith("file://")] == []


def saved(path: Path, *folders: Path) -> Path:
    path.write_text(page_of(*folders), encoding="utf-8")
    return path


SHOWN = "document.querySelectorAll('.item').length"
COUNT = "document.getElementById('count').textContent"
ACTIVE = "document.activeElement.id"
SELECTED = "document.querySelector('.item[aria-selected=true] .id').textContent"
OPENED = "document.querySelector('#detail h3').textContent"


@needs_browser
def test_browse_with_the_keyboard_alone(page: Page, runs: Path, tmp_path: Path) -> None:
    page.open(saved(tmp_path / "r.html", runs))
    assert page.js(COUNT) == (
        "40 of 40 examples; strategies disagree on 36 of them. Grades in this order: zero-shot, sequential."
    )
    assert page.js(SELECTED) == "q1"  # q0 is wrong for both
    page.js("document.getElementById('list').focus()")
    for key, selected in (
        ("j", "q2"),
        ("ArrowDown", "q3"),
        ("k", "q2"),
        ("ArrowUp", "q1"),
        ("End", "q30"),
        ("Home", "q1"),
    ):
        page.key(key)
        assert (page.js(SELECTED), page.js(OPENED)) == (selected, selected), key
    page.key("Enter")
    assert page.js(ACTIVE) == "detail"
    page.key("Escape")
    assert page.js(ACTIVE) == "list"
    page.key("/")
    assert page.js(ACTIVE) == "search"
    page.type("IS Q17.")
    page.until(f"{COUNT}.startsWith('1 of 40')")
    page.key("Enter")
    assert (page.js(ACTIVE), page.js(OPENED)) == ("list", "q17")
    page.key("/")
    page.type("nothing like it")
    page.until(f"{COUNT}.startsWith('0 of 40')")
    page.key("Escape")
    assert page.js(COUNT).startswith("40 of 40")


@needs_browser
def test_filters_narrow_by_grade_and_by_disagreement(page: Page, runs: Path, tmp_path: Path) -> None:
    page.open(saved(tmp_path / "r.html", runs))

    def choose(selector: str, value: str) -> str:
        page.js(
            f"(s => {{ s.value = {value!r}; s.dispatchEvent(new Event('change')); }})"
            f"(document.querySelector({selector!r}))"
        )
        return str(page.js(COUNT)).split(" ")[0]

    assert choose("#show", "differ") == "36"
    assert choose("#show", "wrong") == "4"
    assert choose("#show", "right") == "0"
    assert choose("#show", "all") == "40"
    assert choose("#filters [data-row='1']", "0") == "4"
    assert choose("#filters [data-row='1']", "w") == "4"
    assert choose("#filters [data-row='1']", "t") == "0"


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_scrolls_sideways_and_dark_is_dark(page: Page, runs: Path, tmp_path: Path, width: int) -> None:
    file = saved(tmp_path / "r.html", runs)
    colours = []
    for dark in (False, True):
        page.open(file, width, dark=dark)
        assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        size = page.js(
            "[...document.querySelectorAll('svg')].filter(s => s.clientWidth)"
            ".map(s => s.clientWidth / s.viewBox.baseVal.width)"
        )
        assert len(size) == 4
        assert min(size) >= 0.95  # letters keep their size
        colours.append(page.js("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


@needs_browser
def test_hostile_text_does_nothing_in_a_browser(page: Page, tmp_path: Path) -> None:
    page.open(saved(tmp_path / "r.html", nasty_runs(tmp_path / "runs")), 390)
    assert page.js("document.querySelectorAll('img, iframe, b').length") == 0
    page.js("document.getElementById('list').focus()")
    page.key("End")
    assert "<script>alert(1)</script>" in page.js("document.getElementById('detail').textContent")
    assert page.js("document.querySelectorAll('#detail script, #detail img').length") == 0
    assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@needs_browser
def test_the_policy_blocks_what_would_slip_through(tab: Page, runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.html"
    evil = "<script>document.title = 'pwned'</script><img src='https://evil.example/x.png'></body>"
    file.write_text(page_of(runs).replace("</body>", evil), encoding="utf-8")
    tab.open(file)
    assert tab.js("document.title") == "cotune: micro-gsm8k"
    assert sum("Content Security Policy" in problem for problem in tab.problems) >= 2


@needs_browser
def test_ten_thousand_examples_stay_smooth(page: Page, tmp_path: Path) -> None:
    scores = {f"test-{n}": float(n % 3 != 0) for n in range(10_000)}
    other = {i: 1 - s if n % 7 == 0 else s for n, (i, s) in enumerate(scores.items())}
    for strategy, mine in (("prompt-only", scores), ("lora-only", other), ("sequential", scores), ("joint", other)):
        folder = write_run(tmp_path / "runs", strategy, mine)
        rows = rows_of(mine)
        for row in rows:
            row["completion"] = f"{strategy} thinks about {row['id']}. " * 12
        write_rows(folder / "predictions.jsonl", rows)
    file = saved(tmp_path / "r.html", tmp_path / "runs")
    assert file.stat().st_size < 40_000_000
    start = time.monotonic()
    page.open(file)
    page.until(f"{COUNT}.startsWith('10000 of 10000')", 30)
    opened = time.monotonic() - start
    assert page.js(SHOWN) < 40
    script = """(async () => {
      const list = document.getElementById('list'), frame = () => new Promise(requestAnimationFrame);
      const steps = [];
      let most = 0;
      for (let i = 0; i < 60; i++) {
        const start = performance.now();
        list.scrollTop = i * 7333 % list.scrollHeight;
        await frame(); await frame();
        steps.push(performance.now() - start);
        most = Math.max(most, document.querySelectorAll('.item').length);
      }
      const start = performance.now(), search = document.getElementById('search');
      search.value = 'about test-9999.';
      search.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter' }));
      steps.sort((a, b) => a - b);
      return [steps[30], most, performance.now() - start, document.getElementById('count').textContent];
    })()"""
    scrolled, most, searched, count = page.js(script)
    print(f"opened in {opened:.1f} s, half of all jumps drawn in {scrolled:.0f} ms, search {searched:.0f} ms")
    assert most < 40
    assert count.startswith("1 of 10000")
    # Ten times what a slow machine needs: a list with all its rows in the page is far beyond it.
    assert opened < 20
    assert scrolled < 500
    assert searched < 1000
