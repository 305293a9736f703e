"""HotpotQA, distractor setting: a question over ten given paragraphs, two of them needed (Yang et al. 2018)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from cotune.tasks.base import HubSource, Task, UnusableRow
from cotune.tasks.grading import final_span, grade_span, normalise_span, read
from cotune.values import Example, Grade


def _line(sentences: Iterable[str]) -> str:
    """Sentences on one line: the rows start most sentences, but not all, with a space."""
    return " ".join(" ".join(sentences).split())


class HotpotQA(Task):
    """Rows have `question`, `answer`, `context` and `supporting_facts`; the rationale is the supporting sentences.

    `context` is a list of [title, sentences] and `supporting_facts` a list of [title, sentence index] as in the
    official files, or the hub's dict of lists. A supporting fact that points outside the context is left out of
    the rationale, as the official evaluation cannot match it either.
    """

    name: ClassVar[str] = "hotpotqa"
    columns: ClassVar[tuple[str, ...]] = ("question", "answer", "context", "supporting_facts")
    unanswered: ClassVar[Mapping[str, Any]] = {"answer": "?", "supporting_facts": []}
    seed_instruction: ClassVar[str] = 'Answer the question from the context. Give a short answer after "Answer:".'
    headline: ClassVar[str] = "exact_match"
    max_new_tokens: ClassVar[int] = 256

    hub: ClassVar[HubSource | None] = HubSource(
        "hotpotqa/hotpot_qa",
        "1908d6afbbead072334abe2965f91bd2709910ab",
        {
            "train": tuple(f"distractor/train-0000{i}-of-00002.parquet" for i in range(2)),
            "test": ("distractor/validation-00000-of-00001.parquet",),
        },
    )

    def parse(self, row: Mapping[str, Any], row_id: str) -> Example:
        question, answer = str(row["question"] or "").strip(), str(row["answer"] or "").strip()
        if not question or not answer:
            raise UnusableRow("the question or the answer is empty")
        paragraphs = _pairs(row["context"], "title", "sentences")
        if not paragraphs:
            raise UnusableRow("the context is empty")
        facts = _pairs(row["supporting_facts"], "title", "sent_id")
        by_title: dict[str, list[str]] = {}
        for title, sentences in paragraphs:
            by_title.setdefault(title, list(sentences))
        supporting = [by_title[t][int(i)] for t, i in facts if 0 <= int(i) < len(by_title.get(t, ()))]
        context = "\n".join(f"[{title}] {_line(sentences)}" for title, sentences in paragraphs)
        own_id = str(row.get("_id") or row.get("id") or row_id)
        return Example(own_id, question, answer, context, rationale=_line(supporting))

    def question_text(self, example: Example) -> str:
        return f"Context:\n{example.context}\n\nQuestion: {example.question}"

    def reference_completion(self, example: Example) -> str:
        return f"{example.rationale}\nAnswer: {example.reference}".lstrip()

    def vote(self, example: Example, completion: str, truncated: bool = False) -> str | None:
        """Spans vote together when they are one after the official normalisation."""
        prediction = read(final_span, completion, truncated)
        return None if prediction is None else normalise_span(prediction)

    def grade(self, example: Example, completion: str, truncated: bool = False) -> Grade:
        return grade_span(example.reference, completion, truncated)


def _pairs(value: Any, first: str, second: str) -> list[tuple[str, Any]]:
    """[[a, b], ...] or {first: [a, ...], second: [b, ...]} -> [(a, b), ...]. In CSV either is JSON text."""
    if isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, Mapping):
        value = zip(value[first], value[second], strict=True)
    return [(str(a), b) for a, b in value]
