"""A comparison as one HTML file that loads nothing: the answer, tables, plots, prompts, examples, provenance.

The same run folders always give the same bytes. Everything that came from data, a model or a config passes through
`markup.tag`, which escapes it, or through a block of JSON that the script shows as text; a content security policy
allows our own style and script by their hashes and nothing else.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from typing import Any

from cotune.compare import evidence, plots, words
from cotune.compare.curves import learning
from cotune.compare.evidence import Wording
from cotune.compare.labels import changed
from cotune.compare.markup import Child, Html, data, join, tag
from cotune.compare.plots import NARROW, WIDE, Plot, Series
from cotune.compare.render import LEGEND, Sheet, estimate, means, sheets
from cotune.compare.runs import Run
from cotune.compare.tables import Group, Overall, Row, cost, overall


def as_html(groups: Sequence[Group]) -> str:
    """The whole page, for a file."""
    problems: list[str] = []
    told = overall(groups)
    browser = [found for group in groups if (found := evidence.examples(group, problems))]
    sections = [_section(f"g{i}", group, problems) for i, group in enumerate(groups, 1)]
    body = (
        tag("a", "Skip to the examples", href="#examples", class_="skip"),
        tag("header", tag("p", "cotune compare", class_="kicker"), _answer(groups, told), _contents(groups, told)),
        tag(
            "main",
            sections,
            _overall(told) if told else None,
            _browser(browser),
            _provenance(groups, problems),
        ),
        tag("footer", tag("p", LEGEND)),
    )
    style = join([Html(plots.style()), Html(_asset("report.css"))])
    script = Html(_asset("report.js"))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=f"{policy}; form-action 'none'"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", "cotune: " + ", ".join(dict.fromkeys(group.task for group in groups))),
        tag("style", style),
    )
    shown = data(browser, id="data") if browser else None
    page = tag("html", tag("head", head), tag("body", body, shown, tag("script", script)), lang="en")
    return f"<!doctype html>\n{page}\n"


def drawings(groups: Sequence[Group]) -> dict[str, str]:
    """File name -> SVG of every plot of the report, each with its colours inside."""
    problems: list[str] = []
    found = [(i, plot) for i, group in enumerate(groups, 1) for plot, _ in _plots(group, problems).values() if plot] + [
        (0, plot) for _, plot in _mean_plots(overall(groups))
    ]
    return {f"{i}-{plots.file_name(plot.name)}.svg" if i else f"{plots.file_name(plot.name)}.svg": plot.alone()
            for i, plot in found}  # fmt: skip


def _asset(name: str) -> str:
    return files("cotune.compare").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# ---- the answer ----


def _answer(groups: Sequence[Group], told: Sequence[Overall]) -> Html:
    """One sentence on top: over all tasks where there are several, else of the one group. Then one for each group."""
    each = [(group, answer(group)) for group in groups]
    if len(each) == 1:
        return tag("h1", each[0][1])
    top = [mean_answer(part, groups) for _, part in _by_setting(told)] or [
        f"{len(groups)} comparisons: one answer for each."
    ]
    lines = [tag("li", tag("a", _title(group), href=f"#g{i}"), ": ", text) for i, (group, text) in enumerate(each, 1)]
    return join([tag("h1", " ".join(top)), tag("ul", lines, class_="answers")])


def answer(group: Group) -> str:
    """What the statistics support, in one sentence; also when that is nothing."""
    done = [row for row in group.rows if row.status == "done"]
    left = _not_done(group)
    if not done:
        return f"Nothing to compare: no run of {group.task} is finished{f' ({left})' if left else ''}."
    if len(done) == 1 and done[0].score:
        alone = f"Only {done[0].strategy} is finished ({estimate(done[0].score, '.1f')}% {group.metric})"
        return f"{alone}, so there is nothing to compare it with{f'; {left}' if left else ''}."
    tested = [(row.strategy, row.difference) for row in done if row.difference]
    said = words.answer(str(group.baseline), tested)
    sides = list(dict.fromkeys(t.uncovered for _, t in tested if t.uncovered))
    caveat = sides[0] if len(sides) == 1 else "not every seed is covered: see the sentences below" if sides else ""
    mixed = "these are mixed runs, which are not comparable: see the notes below" if group.mixed else ""
    return "; ".join(filter(None, (f"On {group.task}, {said}", mixed, caveat, left))) + "."


def mean_answer(told: Sequence[Overall], groups: Sequence[Group]) -> str:
    """Of the means over tasks of one model and engine; it names the rows that are not in every mean."""
    tested = [(over.strategy, over.difference) for over in told if over.difference]
    where = f"On the mean of {len(told[0].tasks)} tasks"
    rows = [r for g in groups if (g.model, g.engine) == (told[0].model, told[0].engine) for r in g.rows]
    left = list(dict.fromkeys(row.strategy for row in rows if row.strategy not in {over.strategy for over in told}))
    absent = f"not finished on every task: {words.few(left)}" if left else ""
    if not tested:
        alone = f"{where}, only {told[0].strategy} is finished everywhere, so there is nothing to compare it with"
        return "; ".join(filter(None, (alone, absent))) + "."
    sides = list(dict.fromkeys(t.uncovered for _, t in tested if t.uncovered))
    caveat = sides[0] if len(sides) == 1 else "not every seed is covered" if sides else ""
    said = f"{where}, {words.answer(told[0].baseline, tested)}"
    mixed = f"mixed runs of {words.listed(told[0].mixed)}" if told[0].mixed else ""
    return "; ".join(filter(None, (said, mixed, caveat, absent))) + "."


def _not_done(group: Group) -> str:
    """For example "2 runs are not in it: 1 failed, 1 unfinished"."""
    statuses = sorted(row.status for row in group.rows if row.status != "done")
    counted = ", ".join(f"{len(list(some))} {status}" for status, some in groupby(statuses))
    if not statuses:
        return ""
    return f"{len(statuses)} run{' is' if len(statuses) == 1 else 's are'} not in it: {counted}"


def _by_setting(told: Sequence[Overall]) -> list[tuple[str, list[Overall]]]:
    return [(key, list(some)) for key, some in groupby(told, key=lambda o: f"{o.model} · {o.engine}")]


def _title(group: Group) -> str:
    return group.title


def _contents(groups: Sequence[Group], told: Sequence[Overall]) -> Html:
    links = [(f"g{i}", group.task) for i, group in enumerate(groups, 1)]
    links += [("mean", "mean of tasks")] if told else []
    links += [("examples", "examples"), ("provenance", "provenance")]
    items = [tag("a", text, href=f"#{name}") for name, text in links]
    return tag("nav", items, aria_label="Contents")


# ---- one group ----


def _section(name: str, group: Group, problems: list[str]) -> Html:
    first, *others = sheets([group], whole=True)
    drawn = _plots(group, problems)
    return tag(
        "section",
        tag("h2", _title(group)),
        _table(first, group),
        _notes(first.notes),
        tag("div", [_figure(plot, caption) for plot, caption in drawn.values()], class_="figures"),
        tag("h3", "Tests, spread, cost, what an answer costs, checks") if others else None,
        [
            tag("details", tag("summary", sheet.title.split(" · ")[-1]), _table(sheet, group), _notes(sheet.notes))
            for sheet in others
        ],
        tag("h3", "Prompts"),
        _prompts(group, problems),
        id=name,
    )


def _overall(told: Sequence[Overall]) -> Html:
    tables = [join([tag("h3", sheet.title), _table(sheet), _notes(sheet.notes)]) for sheet in means(told)]
    drawn = [_figure(plot, "") for _, plot in _mean_plots(told)]
    return tag(
        "section", tag("h2", "Mean of tasks"), tables[:1], tag("div", drawn, class_="figures"), tables[1:], id="mean"
    )


def _table(sheet: Sheet, group: Group | None = None) -> Html:
    """The first column names the row. In a region of its own that scrolls sideways where the screen is narrow."""
    css = {row.strategy: _series(row).css for row in group.rows} if group else {}
    head = tag("thead", tag("tr", [tag("th", name, scope="col") for name in sheet.header]))
    rows = [
        tag("tr", tag("th", _dot(css.get(cells[0])), cells[0], scope="row"), [tag("td", cell) for cell in cells[1:]])
        for cells in sheet.rows
    ]
    table = tag("table", tag("caption", sheet.title), head, tag("tbody", rows))
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=f"Table: {sheet.title}")


def _dot(css: str | None) -> Html | None:
    return tag("span", class_=f"dot {css}", aria_hidden="true") if css else None


def _notes(notes: Sequence[str]) -> Html | None:
    return tag("ul", [tag("li", note) for note in notes], class_="notes") if notes else None


def _series(row: Row) -> Series:
    return Series(row.strategy, row.runs[0].strategy)


def _plots(group: Group, problems: list[str]) -> dict[str, tuple[Plot | None, str]]:
    """Each plot with its caption; None with the reason where there is nothing to draw."""
    name, done = group.task, [row for row in group.rows if row.status == "done"]
    pairs = [(_series(row), row.difference) for row in done if row.difference]
    spent = [
        (_series(row), c, row.score) for row in done if row.score and (c := cost(row, "tuning", "tokens")) is not None
    ]
    learnt = [(_series(row), [curve for run in row.runs if (curve := learning(run, problems))]) for row in done]
    learnt = [(series, some) for series, some in learnt if some]
    crossed = [(_series(row), row.two_by_two, row.interaction) for row in done if row.two_by_two]
    unpriced = [row.strategy for row in done if cost(row, "tuning", "tokens") is None]
    return {
        "differences": (
            plots.forest(name, str(group.baseline), pairs) if pairs else None,
            f"Each difference to {group.baseline}, paired by example, with its 95% interval. Left of the line is "
            "worse, right is better; *: shown, after Holm's correction."
            if pairs
            else "No differences to draw: they need two finished strategies.",
        ),
        "2x2": (
            plots.two_by_two(name, crossed) if crossed else None,
            "What the prompt gives alone, the weights alone, and both. Interaction: how much more both give together "
            "than the sum of what each gives alone."
            if crossed
            else "No 2x2: it needs a finished run that tunes prompt and weights (sequential, joint) and no plan.",
        ),
        "cost": (
            plots.frontier(name, group.metric, spent) if spent else None,
            "Score with its 95% interval against what tuning cost. Dashed: the Pareto front, the rows that no other "
            "beats at the same cost or less. It goes by the scores alone, not by what is shown to differ."
            + (f" Without a known cost: {words.listed(unpriced)}." if unpriced else "")
            if spent
            else "No quality against cost: no finished run reports its tuning tokens.",
        ),
        "curves": (
            plots.curves(name, learnt) if learnt else None,
            "Dots: the validation score of each epoch, round or finalist. Solid: the best so far of the stage at hand, "
            "which is what would be handed over if the budget ended there. Dotted: the best prompt of a search on the "
            "training examples it looked at; these are other examples. One line for each seed."
            if learnt
            else "No learning curves: no finished run has left validation or search scores in its events.",
        ),
    }


def _mean_plots(told: Sequence[Overall]) -> list[tuple[str, Plot]]:
    out = []
    for where, part in _by_setting(told):
        pairs = [(Series(o.strategy, o.strategy.split(" ")[0]), o.difference) for o in part if o.difference]
        if pairs:
            name = f"mean-{part[0].model}-{part[0].engine}"
            out.append((where, plots.forest(name, part[0].baseline, pairs)))
    return out


def _figure(plot: Plot | None, caption: str) -> Html:
    """Drawn twice, for a wide and a narrow screen; the style shows one, so letters are never scaled."""
    if plot is None:
        return tag("figure", tag("figcaption", caption), class_="missing")
    both = [tag("div", plot.svg(width), class_=name) for name, width in (("wide", WIDE), ("narrow", NARROW))]
    return tag("figure", tag("h3", plot.title), both, tag("figcaption", caption) if caption else None)


# ---- prompts ----


def _prompts(group: Group, problems: list[str]) -> Html:
    seed = evidence.seed_prompt(group)
    done = [(row, run) for row in group.rows for run in row.runs if run.status == "done"]
    if not done:
        return tag("p", "No finished run, so no prompts.", class_="soft")
    cards = [tag("article", tag("h4", "seed prompt"), tag("p", evidence.cut(seed), class_="text"))] if seed else []
    alike: dict[tuple[str, tuple[Wording, ...]], list[Run]] = {}  # seeds that ended with the same prompt share a card
    for row, run in done:
        if run.strategy != "zero-shot" or not seed:  # which is the seed prompt
            alike.setdefault((row.strategy, tuple(evidence.prompts(run, problems))), []).append(run)
    for (strategy, wordings), runs in alike.items():
        seeds = words.listed([str(run.seed) for run in runs])
        css = Series(strategy, runs[0].strategy).css
        head = tag("h4", _dot(css), strategy, tag("small", f" seed{'s' * (len(runs) > 1)} {seeds}"))
        told = [_wording(wording, seed) for wording in wordings]
        cards.append(tag("article", head, told or tag("p", "No prompt was saved.", class_="soft")))
    about = (
        "Against the seed prompt: underlined is new, struck through is gone. Of prompts written for each example, the "
        f"{evidence.GENERATED} most frequent."
        if seed
        else "The seed prompt is not known from these run folders, so there is nothing to compare with."
    )
    return join([tag("p", about, class_="soft"), tag("div", cards, class_="cards")])


def _wording(wording: Wording, seed: str | None) -> Html:
    text = [Html(difference(evidence.cut(seed), wording.text))] if seed else [wording.text]
    same = bool(seed) and wording.text == evidence.cut(seed)
    rewritten = bool(seed) and text[0] == tag("ins", wording.text)
    said = "the seed prompt unchanged" if same else "rewritten" if rewritten else ""
    notes = ", ".join(filter(None, (wording.share, said)))
    demos = [
        tag("li", tag("span", question, class_="text"), tag("br"), "→ ", tag("span", text, class_="text"))
        for question, text in wording.demonstrations[: evidence.DEMONSTRATIONS]
    ]
    more = len(wording.demonstrations) - len(demos)
    return join(
        [
            tag("p", text, class_="text"),
            tag("p", notes, class_="soft") if notes else None,
            tag("p", f"{len(wording.demonstrations)} demonstrations:", class_="soft") if demos else None,
            tag("ol", demos, class_="demos") if demos else None,
            tag("p", f"and {more} more", class_="soft") if more > 0 else None,
        ]
    )


def difference(old: str, new: str) -> Html:
    """`new` by words, with what it adds to `old` in <ins> and what it leaves out in <del>.

    Blanks do not count. Where less than half of `new` is kept text, a mix of both cannot be read: all is in <ins>.
    """
    a, b = (re.findall(r"\w+\s*|\s+|[^\w\s]\s*", text) for text in (old, new))
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in a], [w.strip() for w in b], autojunk=False)
    kept = sum(len("".join(b[at : at + size])) for _, at, size in matcher.get_matching_blocks())
    if kept < len(new) / 2:
        return tag("ins", new)
    parts: list[Child] = []
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        gone, here = "".join(a[i1:i2]), "".join(b[j1:j2])
        if kind == "equal":
            parts.append(here)
        else:
            parts += [tag("del", gone) if gone else None, tag("ins", here) if here else None]
    return join(parts)


# ---- the example browser ----


def _browser(found: Sequence[Mapping[str, Any]]) -> Html:
    title = tag("h2", "Examples")
    if not found:
        return tag("section", title, tag("p", "No finished run, so no examples.", class_="soft"), id="examples")
    select: tuple[tuple[str, str, list[Child]], ...] = (
        ("task", "Comparison", [tag("option", f["title"], value=i) for i, f in enumerate(found)]),
        ("seed", "Seed", []),
        (
            "show",
            "Show",
            [
                tag("option", text, value=value)
                for value, text in (
                    ("all", "all examples"),
                    ("differ", "strategies disagree"),
                    ("right", "every one correct"),
                    ("wrong", "no one correct"),
                )
            ],
        ),
    )
    fields = [tag("label", tag("span", label), tag("select", options, id=name)) for name, label, options in select]
    search = tag(
        "label",
        tag("span", "Search (/)"),
        tag(
            "input",
            type="search",
            id="search",
            autocomplete="off",
            spellcheck="false",
            placeholder="id, answer, prompt",
        ),
        class_="search",
    )
    keys = [tag("kbd", key) for key in ("↑", "↓", "j", "k", "/", "Enter", "Esc")]
    return tag(
        "section",
        title,
        tag("noscript", tag("p", "The example browser needs JavaScript. Everything else on this page does not.")),
        tag("p", "Examples on which strategies disagree come first. Keys: ", [[k, " "] for k in keys], class_="soft"),
        tag("div", fields, search, class_="controls"),
        tag("div", id="filters", class_="controls"),
        tag("p", id="count", role="status", class_="soft"),
        tag(
            "div",
            tag("div", tag("div", id="rows"), id="list", tabindex=0, role="listbox", aria_label="Examples"),
            tag("div", id="detail", tabindex=-1, role="region", aria_label="Example", aria_live="polite"),
            class_="browser",
        ),
        id="examples",
    )


# ---- provenance ----


def _provenance(groups: Sequence[Group], problems: Sequence[str]) -> Html:
    runs = [run for group in groups for row in group.rows for run in row.runs]
    header = ("run", "status", "commit", "torch", "hardware", "data", "test examples", "decoding", "grader", "finished")
    sheet = Sheet("Runs", header, tuple(_facts(run) for run in runs), tuple(dict.fromkeys(problems)))
    details = []
    for run in runs:
        settings = {**run.config, "data": "DIR"} if run.config.get("data") else run.config  # a path says whose machine
        config = json.dumps(settings, indent=2, ensure_ascii=False, default=str)
        notes = run.summary.get("notes")
        details.append(
            tag(
                "details",
                tag("summary", run.name),
                _notes([str(note) for note in notes]) if isinstance(notes, list) else None,
                tag("pre", command(run), tabindex=0),
                tag("pre", config, tabindex=0),
            )
        )
    return tag(
        "section",
        tag("h2", "Provenance, and how to reproduce it"),
        tag("p", "This page again, from the same run folders in DIR (the same folders give the same bytes):"),
        tag("pre", _again(groups), tabindex=0),
        _table(sheet),
        _notes(sheet.notes),
        tag(
            "details",
            tag("summary", f"Each of the {len(runs)} runs: its notes, its command, all its settings"),
            details,
        ),
        id="provenance",
    )


def _again(groups: Sequence[Group]) -> str:
    """The command that makes this page. A baseline that stands in for a missing one was not asked for."""
    parts = ["cotune", "compare", "DIR", "--format", "html", "--out", "report.html"]
    asked = [g.baseline for g in groups if not any(note.startswith("No finished run of") for note in g.notes)]
    baseline = next((name for name in asked if name not in (None, "zero-shot")), None)
    done = [run for g in groups for row in g.rows for run in row.runs if run.status == "done"]
    metric = next((run.metric for run in done if run.metric != run.summary.get("headline")), None)
    parts += ["--baseline", baseline] if baseline else []
    parts += ["--metric", metric] if metric else []
    parts += ["--allow-mixed"] if any(group.mixed for group in groups) else []
    return shlex.join(parts)


def _facts(run: Run) -> tuple[str, ...]:
    made = evidence.json_of(run.folder / "environment.json")
    packages = made.get("packages")
    packages = packages if isinstance(packages, Mapping) else {}
    same = run.summary.get("comparable")
    same = same if isinstance(same, Mapping) else {}
    found = (
        str(made.get("commit") or "")[:8],
        packages.get("torch"),
        run.hardware,
        *(str(same.get(f"{name}_digest") or "")[:8] for name in ("data", "test_ids", "decoding")),
        same.get("grader_version"),
        str(run.summary.get("finished") or "")[:16],
    )
    return (run.name, run.status, *("" if value is None else str(value) for value in found))


def command(run: Run) -> str:
    """The command that makes this run again: its settings where they differ from the defaults."""
    settings = changed(run.config)
    if not settings:
        return "config.json is damaged: what made this run is not known."
    parts = ["cotune", "run"]
    for key, value in settings.items():
        if key in ("strategy", "model", "task", "seed", "generator", "engine"):
            parts += [f"--{key}", str(value)]
        elif key == "data":
            parts += ["--data", "DIR"]
        else:
            parts += ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    return shlex.join(parts)
