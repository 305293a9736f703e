"""The frame in which a generator rewrites an instruction for one question. The same for real and tiny models.

Source: MetaTuner (sheet 02), G(p~, x_i) -> p_i; the wording is ours. Knows nothing of tasks, models or strategies.
"""

from __future__ import annotations

REWRITE_INSTRUCTION = "Rewrite the instruction for the question. Reply with the new instruction only."


def rewrite_messages(
    instruction: str, question_text: str, rewrite_instruction: str = REWRITE_INSTRUCTION
) -> list[dict[str, str]]:
    """The chat whose next assistant turn is a new instruction for `question_text`, or (if empty) for any question."""
    asked = f"\n\nQuestion:\n{question_text}" if question_text else ""
    return [
        {"role": "system", "content": rewrite_instruction},
        {"role": "user", "content": f"Instruction: {instruction}{asked}"},
    ]
