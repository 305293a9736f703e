"""GSM8K: grade-school word problems with one number as the answer (openai/grade-school-math)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from cotune.tasks.base import HubSource, Task, UnusableRow
from cotune.tasks.grading import final_number, grade_number, numbers, read, value
from cotune.values import Example, Grade

_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Gsm8k(Task):
    """Rows have `question` and `answer`, the worked solution whose last line is `#### number`."""

    name: ClassVar[str] = "gsm8k"
    columns: ClassVar[tuple[str, ...]] = ("question", "answer")
    unanswered: ClassVar[Mapping[str, Any]] = {"answer": "#### 0"}
    seed_instruction: ClassVar[str] = "Solve the math word problem. Give the final answer as a number after ####."
    max_new_tokens: ClassVar[int] = 512

    hub: ClassVar[HubSource | None] = HubSource(
        "openai/gsm8k",
        "740312add88f781978c0658806c59bc2815b9866",
        {split: (f"main/{split}-00000-of-00001.parquet",) for split in ("train", "test")},
    )

    def parse(self, row: Mapping[str, Any], row_id: str) -> Example:
        question, answer = str(row["question"] or "").strip(), str(row["answer"] or "")
        worked, mark, _ = answer.rpartition("####")
        if not question:
            raise UnusableRow("the question is empty")
        if not mark:
            raise UnusableRow("the answer has no ####")
        reference = self.read_reference(answer)
        return Example(row_id, question, reference, rationale=_CALCULATOR.sub("", worked).strip())

    def read_reference(self, text: str, choices: tuple[str, ...] = ()) -> str:
        found = numbers(text.rpartition("####")[2])
        if len(found) != 1:
            raise UnusableRow(f"the final answer is {text.rpartition('####')[2].strip()[:80]!r}, not one number")
        return found[0]

    def question_text(self, example: Example) -> str:
        return example.question

    def reference_completion(self, example: Example) -> str:
        return f"{example.rationale}\n#### {example.reference}".lstrip()

    def vote(self, example: Example, completion: str, truncated: bool = False) -> str | None:
        """Equal numbers vote together: `18.00` is 18."""
        prediction = read(final_number, completion, truncated)
        return None if prediction is None else str(value(prediction))

    def grade(self, example: Example, completion: str, truncated: bool = False) -> Grade:
        return grade_number(example.reference, completion, truncated)
