"""GSM8K: grade-school word problems with one number as the answer (openai/grade-school-math)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from cotune.tasks.base import Task, UnusableRow
from cotune.tasks.grading import grade_number, marked_number
from cotune.values import Example, Grade

_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Gsm8k(Task):
    """Rows have `question` and `answer`, the worked solution whose last line is `#### number`."""

    name: ClassVar[str] = "gsm8k"
    columns: ClassVar[tuple[str, ...]] = ("question", "answer")
    seed_instruction: ClassVar[str] = "Solve the math word problem. Give the final answer as a number after ####."
    max_new_tokens: ClassVar[int] = 512

    def parse(self, row: Mapping[str, Any], row_id: str) -> Example:
        question, answer = str(row["question"]).strip(), str(row["answer"])
        worked, mark, final = answer.rpartition("####")
        reference = final.strip().replace(",", "")
        if not question:
            raise UnusableRow("the question is empty")
        if not mark or marked_number(f"#### {reference}") is None:
            raise UnusableRow("the answer has no number after ####")
        return Example(row_id, question, reference, rationale=_CALCULATOR.sub("", worked).strip())

    def question_text(self, example: Example) -> str:
        return example.question

    def reference_completion(self, example: Example) -> str:
        return f"{example.rationale}\n#### {example.reference}".lstrip()

    def grade(self, example: Example, completion: str, truncated: bool = False) -> Grade:
        return grade_number(example.reference, completion, truncated)
