"""CosmosQA: commonsense questions over short narratives, four choices (Huang et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from cotune.tasks.base import Task, UnusableRow
from cotune.tasks.grading import LETTERS, grade_choice
from cotune.values import Example, Grade


class CosmosQA(Task):
    """Rows have `context`, `question`, `answer0` ... `answer3` and `label`, the index of the right choice.

    `label` is a string in the official files and an integer on the hub (-1 where it is withheld: unusable).
    An optional `rationale` field (not in the official rows) is worked reasoning for the reference completion.
    """

    name: ClassVar[str] = "cosmosqa"
    columns: ClassVar[tuple[str, ...]] = ("context", "question", "answer0", "answer1", "answer2", "answer3", "label")
    seed_instruction: ClassVar[str] = 'Choose the best answer. Give its letter after "Answer:".'
    max_new_tokens: ClassVar[int] = 256

    def parse(self, row: Mapping[str, Any], row_id: str) -> Example:
        question, context = str(row["question"]).strip(), str(row["context"]).strip()
        choices = tuple(str(row[f"answer{i}"]).strip() for i in range(4))
        label = str(row["label"]).strip()
        if not question or not context:
            raise UnusableRow("the question or the context is empty")
        if label not in ("0", "1", "2", "3"):
            raise UnusableRow(f"the label is {label!r}, not 0 to 3")
        own_id = str(row.get("id") or row_id)
        rationale = str(row.get("rationale") or "").strip()
        return Example(own_id, question, LETTERS[int(label)], context, rationale, choices)

    def question_text(self, example: Example) -> str:
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, example.choices, strict=True))
        return f"Context: {example.context}\n\nQuestion: {example.question}\n{choices}"

    def reference_completion(self, example: Example) -> str:
        return f"{example.rationale}\nAnswer: {example.reference}".lstrip()

    def grade(self, example: Example, completion: str, truncated: bool = False) -> Grade:
        return grade_choice(example.reference, example.choices, completion, truncated)
