"""MATH: competition problems in LaTeX whose answer is an expression in the last box (Hendrycks et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from cotune.tasks.base import HubSource, Task, UnusableRow
from cotune.tasks.grading import final_expression, grade_math, last_boxed, read
from cotune.values import Example, Grade

_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


class Math(Task):
    """Rows have `problem`, `level`, `type` and `solution`; the answer is the last `\\boxed{...}` of the solution."""

    name: ClassVar[str] = "math"
    columns: ClassVar[tuple[str, ...]] = ("problem", "solution")
    unanswered: ClassVar[Mapping[str, Any]] = {"solution": "\\boxed{0}"}
    seed_instruction: ClassVar[str] = "Solve the problem. Put the final answer in \\boxed{}."
    max_new_tokens: ClassVar[int] = 1024

    hub: ClassVar[HubSource | None] = HubSource(
        "EleutherAI/hendrycks_math",
        "21a5633873b6a120296cce3e2df9d5550074f4a3",
        {split: tuple(f"{s}/{split}-00000-of-00001.parquet" for s in _SUBJECTS) for split in ("train", "test")},
    )

    def parse(self, row: Mapping[str, Any], row_id: str) -> Example:
        problem, solution = str(row["problem"] or "").strip(), str(row["solution"] or "").strip()
        if not problem:
            raise UnusableRow("the problem is empty")
        reference = last_boxed(solution)
        if reference is None:
            raise UnusableRow("the solution has no balanced \\boxed{...}")
        if not reference.strip():
            raise UnusableRow("the last \\boxed{} of the solution is empty")
        return Example(row_id, problem, reference.strip(), rationale=solution)

    def read_reference(self, text: str, choices: tuple[str, ...] = ()) -> str:
        return (last_boxed(text) or text).strip()

    def question_text(self, example: Example) -> str:
        return example.question

    def reference_completion(self, example: Example) -> str:
        return example.rationale

    def vote(self, example: Example, completion: str, truncated: bool = False) -> str | None:
        """Answers vote together when they differ in spaces alone. (That two expressions are equal takes a proof for
        every pair, see equality.py; which of the equal ones to count would depend on their order.)"""
        prediction = read(final_expression, completion, truncated)
        return None if prediction is None else "".join(prediction.split())

    def grade(self, example: Example, completion: str, truncated: bool = False) -> Grade:
        return grade_math(example.reference, completion, truncated)
