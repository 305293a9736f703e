"""Ready-made sentences for instructions: what every task can use, and what suits one family of tasks.

Plain data, written by hand (ours). Three kinds, in the order in which an instruction reads best: how to work, what to
watch, how to answer. Knows nothing of any model, the packaged ones included.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrases:
    """Sentences by kind; an instruction usually needs at most one of each."""

    work: tuple[str, ...]
    watch: tuple[str, ...]
    answer: tuple[str, ...]

    def __add__(self, other: Phrases) -> Phrases:
        return Phrases(self.work + other.work, self.watch + other.watch, self.answer + other.answer)

    @property
    def kinds(self) -> tuple[tuple[str, ...], ...]:
        return self.work, self.watch, self.answer


GENERAL = Phrases(
    work=(
        "Think step by step.",
        "Work through the problem one step at a time.",
        "Reason carefully before you answer.",
        "First make a short plan, then carry it out.",
        "Break the question into smaller parts and solve each.",
        "Explain your reasoning in a few short sentences.",
        "Answer directly without any explanation.",
    ),
    watch=(
        "Read every word of the question.",
        "Check your result before you finish.",
        "Do not guess.",
        "Use only the information that is given.",
        "Keep every step short and clear.",
        "Say what is asked before you begin.",
    ),
    answer=(
        "End with the final answer.",
        "Write the final answer on the last line.",
        "Give only the final answer.",
        "State the answer once, clearly, at the end.",
    ),
)

FAMILIES: dict[str, Phrases] = {
    "gsm8k": Phrases(
        work=(
            "Write each calculation on its own line.",
            "Write one equation for each step.",
            "Name the known amounts, then compute what is missing.",
            "Keep track of every amount as it changes.",
            "Show the arithmetic of each step.",
        ),
        watch=(
            "Double-check each sum and product.",
            "Mind the units.",
            "Use every number that matters and ignore the others.",
        ),
        answer=(
            "Finish with #### and the number.",
            "After the last step write #### followed by the final number.",
            "The last line must be #### and the answer as a plain number.",
        ),
    ),
    "math": Phrases(
        work=(
            "Simplify step by step.",
            "Write every transformation of the equation on its own line.",
            "Isolate the unknown, then evaluate it.",
            "Derive the result with short formulas.",
        ),
        watch=(
            "Simplify fractions completely.",
            "Watch the signs.",
            "Check the solution by putting it back into the problem.",
            "Give an exact value, not a decimal approximation.",
        ),
        answer=(
            "Put the final answer in \\boxed{}.",
            "Write the final answer inside \\boxed{} and nothing after it.",
            "Show your steps and box the result with \\boxed{}.",
        ),
    ),
    "hotpotqa": Phrases(
        work=(
            "Find the paragraphs that matter and connect their facts.",
            "Name the sentence that supports the answer before you give it.",
            "First find the entity that links the two facts, then answer.",
            "Look up each fact that the question needs, one after the other.",
        ),
        watch=(
            "Ignore paragraphs that do not help.",
            "Copy names exactly as the text writes them.",
            "Answer yes or no when the question asks for it.",
        ),
        answer=(
            "Answer with the shortest phrase that is correct.",
            "Give only a name, a date or a few words from the text.",
            "Finish with the answer alone, without a full sentence.",
        ),
    ),
    "cosmosqa": Phrases(
        work=(
            "Think about what the people in the story want and why.",
            "Compare each option with the story before choosing.",
            "Rule out the options that contradict the story.",
            "Use common sense to fill in what the story leaves out.",
        ),
        watch=(
            "Choose the option that fits the story best.",
            "Pick none of the above only if no other option fits.",
            "Read all four options.",
        ),
        answer=(
            "Answer with the letter of the option.",
            "Reply with one letter: A, B, C or D.",
            "Finish with the letter of the best option.",
        ),
    ),
}


def phrases(*tasks: str) -> Phrases:
    """The bank for tasks by name; a micro task uses its family's, an unknown task the general part."""
    families = dict.fromkeys(name.removeprefix("micro-") for name in tasks)
    return sum((FAMILIES[family] for family in families if family in FAMILIES), GENERAL)
