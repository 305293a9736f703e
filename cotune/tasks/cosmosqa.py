"""CosmosQA: commonsense questions over short narratives, four choices (Huang et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from cotune.tasks.base import HubSource, Task, UnusableRow
from cotune.tasks.grading import LETTERS, final_choice, grade_choice, read, read_choice
from cotune.values import Example, Grade


class CosmosQA(Task):
    """Rows have `context`, `question`, `answer0` ... `answer3` and `label`, the index of the right choice.

    `label` is a string in the official files and an integer on the hub (-1 where it is withheld: unusable).
    An optional `rationale` field (not in the official rows) is worked reasoning for the reference completion.
    """

    name: ClassVar[str] = "cosmosqa"
    columns: ClassVar[tuple[str, ...]] = ("context", "question", "answer0", "answer1", "answer2", "answer3", "label")
    unanswered: ClassVar[Mapping[str, Any]] = {"label": "0"}
    choices: ClassVar[int] = 4
    seed_instruction: ClassVar[str] = 'Choose the best answer. Give its letter after "Answer:".'
    max_new_tokens: ClassVar[int] = 256

    hub: ClassVar[HubSource | None] = HubSource(
        "allenai/cosmos_qa",
        "ed50fe83db62b355759053b1cd5eef344ee371e0",  # of the hub's own parquet conversion
        {"train": ("default/train/0000.parquet",), "test": ("default/validation/0000.parquet",)},
    )

    def parse(self, row: Mapping[str, Any], row_id: str) -> Example:
        question, context = str(row["question"] or "").strip(), str(row["context"] or "").strip()
        choices = tuple(str(row[f"answer{i}"] or "").strip() for i in range(4))
        label = str(row["label"]).strip()
        if not question or not context:
            raise UnusableRow("the question or the context is empty")
        if label not in ("0", "1", "2", "3"):
            raise UnusableRow(f"the label is {label!r}, not 0 to 3")
        own_id = str(row.get("id") or row_id)
        rationale = str(row.get("rationale") or "").strip()
        return Example(own_id, question, LETTERS[int(label)], context, rationale, choices)

    def read_reference(self, text: str, choices: tuple[str, ...] = ()) -> str:
        letter = read_choice(text, choices)
        if letter is None:
            raise UnusableRow(f"the reference {text[:80]!r} is no letter, index or text of a choice")
        return letter

    def question_text(self, example: Example) -> str:
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, example.choices, strict=True))
        return f"Context: {example.context}\n\nQuestion: {example.question}\n{choices}"

    def reference_completion(self, example: Example) -> str:
        return f"{example.rationale}\nAnswer: {example.reference}".lstrip()

    def vote(self, example: Example, completion: str, truncated: bool = False) -> str | None:
        """The letter."""
        return read(lambda text: final_choice(text, example.choices), completion, truncated)

    def grade(self, example: Example, completion: str, truncated: bool = False) -> Grade:
        return grade_choice(example.reference, example.choices, completion, truncated)
