"""What could make a score worth less than it looks: test text in what was learned from, or in the tuned prompts; a test
split measured again; answers that were cut off or that the grader could not read.

`validity` counts, `remarks` says in words what a reader must know. Knows nothing of how anything was tuned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cotune.proposers.filters import word_runs
from cotune.values import Conditioning, Example, Prompt

# Shares from which a remark is made; all ours.
NEAR = 0.5  # of an example's word runs that are in one other example
MANY_NEAR = 0.01  # of the measured examples
MANY_TRUNCATED = 0.1
MANY_UNREAD = 0.1


def validity(
    splits: Mapping[str, Sequence[Example]],
    measured: str,
    conditionings: Sequence[Conditioning],
    rows: Sequence[Mapping[str, Any]],
    touches: int,
    adapters: Mapping[str, int] | None,
) -> dict[str, Any]:
    """The `checks` of a summary.

    `splits` are the examples of a run by name, `conditionings` and `rows` (as in predictions.jsonl) those of the
    `measured` split, `touches` how often it has been measured with this config, `adapters` what canary.py found. Shares
    are of the measured examples.
    """
    names = list(splits)
    pairs = [(a, b) for i, b in enumerate(names) for a in names[:i]]
    copied = {name: _copying(conditionings, splits[measured], splits[name], name == measured) for name in names[1:]}
    n = len(rows)
    return {
        "near_duplicates": {f"{b} in {a}": near_duplicates(splits[b], splits[a]) for a, b in pairs},
        "prompts_copying": copied,
        "truncated": sum(row["truncated"] for row in rows) / n,
        "unread": sum(row["prediction"] is None and not row["truncated"] for row in rows) / n,
        "times_measured": touches,
        "adapters": adapters,
    }


def near_duplicates(examples: Sequence[Example], others: Sequence[Example]) -> int:
    """How many examples share at least NEAR of their runs of words with one of the others.

    Examples that are too short to have such a run are never near; equal ones do not reach this point (tasks/data.py
    keeps splits apart).
    """
    where: dict[int, list[int]] = {}
    for i, other in enumerate(others):
        for run in _hashes(_asked(other)):
            where.setdefault(run, []).append(i)
    found = 0
    for example in examples:
        runs = _hashes(_asked(example))
        shared = Counter(i for run in runs for i in where.get(run, ()))
        found += bool(shared) and max(shared.values()) >= NEAR * len(runs)
    return found


def _copying(
    conditionings: Sequence[Conditioning], measured: Sequence[Example], examples: Sequence[Example], same: bool
) -> int:
    """How many different prompts hold a run of words of these examples.

    Where prompts are written per example, each has read its own question, so what it has of that is no copy.
    """
    known: dict[int, set[str]] = {}
    for example in examples:
        for run in _hashes((example.question, example.context, example.rationale, *example.choices)):
            known.setdefault(run, set()).add(example.id)
    readers: dict[Prompt, list[Example]] = {}
    for conditioning, example in zip(conditionings, measured, strict=True):
        readers.setdefault(conditioning.prompt, []).append(example)
    copies = 0
    for prompt, own in readers.items():
        runs = _hashes((prompt.instruction, *(t for d in prompt.demonstrations for t in (d.question, d.answer))))
        read = {run for e in own for run in _hashes(_asked(e))} if same and len(readers) > 1 else set()
        copies += any(run in known for run in runs - read)
    return copies


def _asked(example: Example) -> tuple[str, ...]:
    return example.question, example.context, *example.choices


def _hashes(texts: Iterable[str]) -> set[int]:
    return {hash(run) for text in texts for run in word_runs(text)}


def remarks(checks: Mapping[str, Any], measured: str, n: int) -> list[str]:
    """One sentence for each finding that a reader of the score must know."""
    said = []
    for where, count in checks["near_duplicates"].items():
        if where.startswith(f"{measured} in ") and count > MANY_NEAR * n:
            said.append(
                f"{count} of {n} {measured} examples are nearly {where.removeprefix(f'{measured} in ')} examples "
                "(they share half or more of their runs of eight words): scores may flatter what was trained on them."
            )
    for split, count in checks["prompts_copying"].items():
        if count:
            said.append(f"{count} tuned prompts hold text of {split} examples: the score on them is not clean.")
    if checks["truncated"] >= MANY_TRUNCATED:
        said.append(
            f"{checks['truncated']:.0%} of the answers were cut off at the token limit; raise decoding.max_new_tokens."
        )
    if checks["unread"] >= MANY_UNREAD:
        said.append(f"In {checks['unread']:.0%} of the answers the grader found nothing to grade (wrong format).")
    adapters = checks["adapters"]
    if adapters and adapters["without_effect"]:
        said.append(
            f"{adapters['without_effect']} of {adapters['examples']} answers began the same without their adapters, to "
            "the last log-probability: what is reported there is the base model."
        )
    if checks["times_measured"] > 1:
        said.append(
            f"The {measured} split has been measured {checks['times_measured']} times with this config in this folder."
        )
    return said
