"""CFPO: how formats look, which is tried next, and what is asked of the model that rewrites parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from toy import answering, bench, instruction_of, of_kind, problem, question_of

from cotune.config import resolve
from cotune.engines.base import Sampling
from cotune.engines.fake import FakeEngine
from cotune.errors import CotuneError
from cotune.models.base import BaseModel, load
from cotune.strategies.base import Fixed
from cotune.strategies.prompt_methods.formats import PLAIN, POOL, RENDERERS, Format, uct
from cotune.strategies.prompt_only import PromptOnly
from cotune.values import Demonstration, Event, Prompt

START = Fixed(Prompt("Add the numbers."))
PARTS = [("Task", "Add the numbers."), ("Output format", "Write steps. End with the sum.")]


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir), device="cpu", dtype="float32")


def cfpo(**prompt: Any) -> PromptOnly:
    small = {"method": "cfpo", "candidates": 2, "search_examples": 12, "choice_examples": 4, "finalists": 2} | prompt
    return PromptOnly.from_config(
        resolve({"strategy": "prompt-only", "model": "x", "task": "micro-gsm8k", "prompt": small})
    )


@pytest.mark.parametrize(
    ("renderer", "style", "rendered"),
    [
        ("plain", "prose", "Add the numbers. Write steps. End with the sum."),
        ("plain", "bullets", "Add the numbers.\n- Write steps.\n- End with the sum."),
        ("titles", "prose", "Task: Add the numbers.\nOutput format: Write steps. End with the sum."),
        ("markdown", "numbers", "## Task\nAdd the numbers.\n\n## Output format\n1. Write steps.\n2. End with the sum."),
        (
            "xml",
            "prose",
            "<task>\nAdd the numbers.\n</task>\n<output_format>\nWrite steps. End with the sum.\n</output_format>",
        ),
        (
            "latex",
            "prose",
            "\\section{Task}\nAdd the numbers.\n\n\\section{Output format}\nWrite steps. End with the sum.",
        ),
    ],
)
def test_formats_look_as_they_should(renderer: str, style: str, rendered: str) -> None:
    assert Format(renderer, style).render(PARTS) == rendered


def test_every_format_says_everything_and_one_plain_part_stays_as_it_is() -> None:
    texts = {format: format.render(PARTS) for format in POOL}
    assert len(set(texts.values())) == len(POOL) == 3 * len(RENDERERS)
    assert all(words in text for text in texts.values() for words in ("Add the numbers.", "Write steps.", "the sum."))
    odd = 'Say "{x}" \\ <b> %s $1.\nThen stop.'
    assert PLAIN.render([("Task", odd)]) == odd
    assert json.loads(Format("json", "prose").render([("Task", odd)])) == {"task": odd}


def test_uct_is_the_papers_value() -> None:
    """Sheet 10, CFPO, item 8, by hand."""
    assert uct([0.5, 0.7], 10) == pytest.approx(1.2 / 3 + 0.001 * math.sqrt(math.log(10) / 3), abs=1e-15)
    assert uct([], 10) == pytest.approx(0.001 * math.sqrt(math.log(10)), abs=1e-15)
    assert uct([], 1) == 0
    assert uct([0.5] * 9, 10) > uct([0.5], 10) > uct([], 10)


def test_after_every_format_was_tried_uct_tries_the_best_ones_on_other_contents(base: BaseModel) -> None:
    """Sentences are liked, and the looks of XML most: round 4 goes on with what scored best in round 2."""

    def likes(rendered: str, _: str | None) -> float:
        said = instruction_of(rendered)
        return 0.3 + 0.2 * ("step" in said) + 0.3 * said.startswith("<task>") + 0.1 * said.startswith("## Task")

    events: list[Event] = []
    engine = FakeEngine(answering(likes), batch_size=8)
    cfpo(proposer="edits", rounds=4, demonstrations=0).tune(START, problem(base), bench(base, engine, events=events))
    tried = of_kind(events, "candidate")
    second = {c["origin"] for c in tried if c["round"] == 2}
    fourth = [c for c in tried if c["round"] == 4]
    assert len(second) == len({c["text"] for c in tried if c["round"] == 2}) >= len(RENDERERS) - 1
    assert len(fourth) == 2 and all(c["origin"].startswith(("format:xml", "format:markdown")) for c in fourth)


def test_a_diagnosis_reads_wrong_answers_first_and_its_suggestions_reach_their_parts(base: BaseModel) -> None:
    asked: list[str] = []
    says = answering(lambda rendered, _: 0.9 if "carry the one" in instruction_of(rendered) else 0.4)

    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        if "put before every question of a" not in rendered:
            return says(rendered, adapter, sample)
        asked.append(question_of(rendered))
        if "PART: CHANGE" in rendered:
            return "Here you are:\n- Details (new): carry\n* OUTPUT: end\nexamples: show one\ntask: f\ntask: too many"
        part = asked[-1].split("Rewrite its part ")[1].split()[0]
        new = {"details": "Remember to carry the one.", "output": "End well.", "task": "Sum."}[part]
        return f"<instruction>{new}</instruction>"

    given, events = problem(base), list[Event]()
    engine = FakeEngine(answer, batch_size=8)
    tuned = cfpo(rounds=1, demonstrations=1, reflection_minibatch=6).tune(
        START, given, bench(base, engine, events=events)
    )
    assert isinstance(tuned, Fixed)
    assert tuned.prompt.instruction == "Sum. Remember to carry the one. End well."
    [shown] = tuned.prompt.demonstrations
    assert shown.answer in {e.rationale for e in given.train}
    diagnosis, *rewritings = asked
    assert diagnosis.count("Question: ") == 6
    cases = diagnosis.split("Question: ")[1:]
    right = ["Correct." in case for case in cases]
    assert sorted(right) == right and len(set(right)) == 2
    wishes = [r.split("Rewrite its part ")[1].split(" Put it", 1)[0].split("\n\n")[0] for r in rewritings]
    assert wishes[:3] == ["details with this change: carry", "output with this change: end", "task with this change: f"]
    assert {c["origin"] for c in of_kind(events, "candidate")} == {"start", "self:diagnosed", "self:rewritten"}


def test_without_demonstrations_those_of_the_start_prompt_stay(base: BaseModel) -> None:
    engine = FakeEngine(answering(lambda *_: 0.5), batch_size=8)
    shown = (Demonstration("What is 1 + 1 ?", "1 + 1 = 2"),)
    start, events = Fixed(Prompt("Add the numbers.", shown)), list[Event]()
    cfpo(proposer="edits", rounds=3, candidates=6, demonstrations=0).tune(
        start, problem(base), bench(base, engine, events=events)
    )
    assert {c["demonstrations"] for c in of_kind(events, "candidate")} == {1}


def test_what_cannot_be_read_in_a_short_context_is_said(base: BaseModel) -> None:
    given = problem(base, max_new_tokens=8)
    long = Fixed(Prompt("Add the numbers. " * 70))
    engine = FakeEngine(answering(lambda *_: 0.5))
    with pytest.raises(CotuneError, match=r"proposer self cannot propose prompts: its context is too short"):
        cfpo(rounds=1).tune(long, given, bench(base, engine))


def test_temperature_falls_over_the_rounds_and_changes_become_fewer(base: BaseModel) -> None:
    """Sheet 10, CFPO, item 5: 1.0 to 0.7; 4, 4, 3, 3, 2, 2, 1."""
    asked: list[tuple[float, str]] = []

    class Noting(FakeEngine):
        def generate(self, requests: Any, sampling: Sampling) -> Any:
            asked.extend((sampling.temperature, r.prompt) for r in requests if "PART: CHANGE" in r.prompt)
            return super().generate(requests, sampling)

    engine = Noting(answering(lambda *_: 0.5), batch_size=8)
    cfpo(rounds=7, candidates=1).tune(START, problem(base), bench(base, engine))
    assert [t for t, _ in asked] == pytest.approx([1.0, 0.9, 0.8, 0.7])
    assert [p.split("Suggest at most ")[1][0] for _, p in asked] == ["4", "4", "3", "3"]
