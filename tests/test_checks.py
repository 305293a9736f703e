"""Leaks and validity, counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cotune.checks import near_duplicates, remarks, validity
from cotune.config import resolve
from cotune.record import RunFolder, read_rows
from cotune.values import Conditioning, Demonstration, Example, Prompt

WORDS = [f"w{i}" for i in range(400)]


def text(start: int, words: int = 16) -> str:
    return " ".join(WORDS[start : start + words])


def example(name: str, question: str, **more: Any) -> Example:
    return Example(name, question, "1", **more)


def row(prediction: str | None = "1", truncated: bool = False) -> dict[str, Any]:
    return {"prediction": prediction, "truncated": truncated}


def test_near_means_half_of_the_runs_of_words() -> None:
    other = example("a", text(0))  # 9 runs of 8 words
    shares = {4: False, 5: True, 9: True}
    for shared, near in shares.items():
        mixed = " ".join([*WORDS[: shared + 7], *WORDS[100 : 100 + 9 - shared]])  # 9 runs, `shared` of them in `other`
        assert near_duplicates([example("b", mixed)], [example("x", text(200)), other]) == near, shared
    assert near_duplicates([example("b", text(0).upper().replace(" ", ", "))], [other]) == 1
    assert near_duplicates([example("b", text(0, 7))], [example("a", text(0, 7))]) == 0  # too short to say
    # half from one and half from another example are near to neither
    halves = example("c", " ".join(WORDS[:11] + WORDS[50:61]))
    assert near_duplicates([halves], [example("a", text(0, 11)), example("b", text(50, 11))]) == 0


def copying(prompts: list[Prompt], test: list[Example], val: list[Example]) -> dict[str, int]:
    conditionings = [Conditioning(p) for p in prompts]
    checks = validity({"train": [], "val": val, "test": test}, "test", conditionings, [row()] * len(test), 1, None)
    found: dict[str, int] = checks["prompts_copying"]
    return found


def test_a_prompt_that_copies_is_counted_once() -> None:
    test = [example("t0", text(0)), example("t1", text(20), rationale=text(40))]
    val = [example("v0", text(60), context=text(80))]
    clean = Prompt(f"Answer: {text(300)}")
    assert copying([clean] * 2, test, val) == {"val": 0, "test": 0}
    assert copying([Prompt(text(3, 7))] * 2, test, val) == {"val": 0, "test": 0}
    assert copying([Prompt(text(3, 8))] * 2, test, val) == {"val": 0, "test": 1}
    assert copying([Prompt(text(42, 9))] * 2, test, val) == {"val": 0, "test": 1}  # a solution
    shown = Prompt("Answer.", (Demonstration("x", text(85, 8)), Demonstration(text(20), "y")))
    assert copying([shown] * 2, test, val) == {"val": 1, "test": 1}


def test_a_prompt_written_for_a_query_may_repeat_it() -> None:
    test = [example("t0", text(0)), example("t1", text(20)), example("t2", text(20, 12))]
    own = [Prompt(text(0)), Prompt(text(20)), Prompt(text(20))]
    assert copying(own, test, []) == {"val": 0, "test": 0}
    assert copying([own[1], own[0], own[0]], test, []) == {"val": 0, "test": 2}


def test_remarks_name_what_matters_and_nothing_else() -> None:
    test = [example(f"t{i}", text(i * 20)) for i in range(10)]
    splits = {"train": [], "val": [], "test": test}
    plain = [Conditioning(Prompt("Answer."))] * 10
    assert remarks(validity(splits, "test", plain, [row()] * 9 + [row(None)] * 0 + [row()], 1, None), "test", 10) == []
    splits = {"train": [example("a", text(0))], "val": [], "test": test}
    copies = [Conditioning(Prompt(text(20)))] * 10
    dead = {"examples": 16, "without_effect": 3}
    checks = validity(splits, "test", copies, [row(None, truncated=True)] + [row(None)] * 2 + [row()] * 7, 2, dead)
    assert checks == {
        "near_duplicates": {"val in train": 0, "test in train": 1, "test in val": 0},
        "prompts_copying": {"val": 0, "test": 1},
        "truncated": 0.1,
        "unread": 0.2,
        "times_measured": 2,
        "adapters": dead,
    }
    said = remarks(checks, "test", 10)
    starts = (
        "1 of 10 test examples are nearly train",
        "1 tuned prompts hold text of test",
        "10% of the answers were cut",
    )
    assert all(sentence.startswith(start) for sentence, start in zip(said, starts, strict=False))
    assert "In 20% of the answers the grader found nothing" in said[3]
    assert said[4].startswith("3 of 16 answers began the same without their adapters")
    assert said[5] == "The test split has been measured 2 times with this config in this folder."
    assert len(said) == 6


def test_measuring_is_counted_beside_the_runs(tmp_path: Path) -> None:
    config = resolve({"strategy": "zero-shot", "model": "tiny", "task": "micro-math"})
    for name, expected in (("a", 1), ("b", 2)):
        for _ in range(2):  # an interrupted run that goes on is one
            with RunFolder.open(tmp_path / name, config) as folder:
                assert folder.touched("test") == expected
    with RunFolder.open(tmp_path / "other", config.model_copy(update={"seed": 1})) as folder:
        assert folder.touched("test") == 1
        assert folder.touched("val") == 1
    assert [r["run"] for r in read_rows(tmp_path / "measured.jsonl")] == ["a", "b", "other", "other"]
