"""An inference plan carried out: what it samples, and how its N completions become one answer and one grade.

Choosing reads votes and scores, never the reference; only `judged` does. What a draw of N says of every smaller number
of completions is here too (`block_scores`, `curve`). Knows nothing of engines beyond `Sampling`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from cotune.aggregation import (
    Answer,
    Shares,
    best_of_n,
    check_n,
    expected_score,
    hierarchical,
    majority_vote,
    self_consistency,
    weighted_best_of_n,
)
from cotune.difficulty import probing
from cotune.engines.base import Sampling
from cotune.errors import UsageError
from cotune.scorers import SELF_CONSISTENCY, VERIFIER, scorer
from cotune.tasks.base import Task
from cotune.values import (
    GREEDY,
    AnyPlan,
    Completion,
    Example,
    Grade,
    InferencePlan,
    PlanByDifficulty,
    Samples,
    Told,
    Verifier,
    of_n,
)

logger = logging.getLogger(__name__)

_RANKED = ("best-of", "weighted-best-of")


def check(plan: InferencePlan) -> InferencePlan:
    """The plan itself. Raises UsageError for one that cannot be carried out."""
    check_n(plan.samples)
    if plan.aggregation == "greedy":
        if plan != GREEDY:
            raise UsageError(
                "The plan greedy is one completion, decoded as `decoding` says. For several, choose plan.aggregation "
                "= majority, best-of or weighted-best-of."
            )
    elif plan.chain < 1 or plan.samples % plan.chain:
        raise UsageError(
            f"{plan.samples} samples cannot be chains of {plan.chain} attempts each. Choose plan.chain so that it "
            "divides plan.samples."
        )
    elif plan.samples > plan.chain and plan.temperature == 0:
        what = f"{plan.samples} samples" if plan.chain == 1 else f"{plan.samples // plan.chain} chains"
        raise UsageError(f"At temperature 0 {what} are all the same. Set plan.temperature above 0.")
    if (plan.scorer is None) == (plan.aggregation in _RANKED):
        needs = "needs a scorer: set plan.scorer" if plan.scorer is None else "reads no scorer: leave plan.scorer out"
        raise UsageError(f"The plan {plan.aggregation} {needs}.")
    if plan.scorer is not None:
        scorer(plan.scorer)
    return plan


def check_bins(plan: PlanByDifficulty) -> PlanByDifficulty:
    """The plan itself. Raises UsageError for one that cannot be carried out."""
    falling = all(math.isfinite(edge) for edge in plan.edges) and list(plan.edges) == sorted({*plan.edges})[::-1]
    if not falling or len(plan.plans) != len(plan.edges) + 1:
        raise UsageError(
            "A plan by difficulty needs falling edges and one plan more than edges; this one has "
            f"{len(plan.edges)} edges and {len(plan.plans)} plans."
        )
    check_n(plan.probe)
    for own in map(check, plan.plans):
        if own == GREEDY or own.samples < plan.probe or own.chain > 1:
            raise UsageError(
                f"A probe of {plan.probe} independent samples cannot be part of the plan "
                f"{of_n(own.aggregation, own.samples)}{f' in chains of {own.chain}' if own.chain > 1 else ''}."
            )
    if len({(own.temperature, own.top_p) for own in plan.plans}) > 1:
        raise UsageError("The plans of all difficulties share their first samples, so also temperature and top_p.")
    if plan.scorer == SELF_CONSISTENCY:
        raise UsageError("self-consistency rates no sample apart from the others. Leave the scorer of the probe out.")
    if plan.scorer is not None:
        scorer(plan.scorer)
    return plan


def recorded(plan: AnyPlan) -> dict[str, Any]:
    """A plan as JSON; one without chains stays what it was before there were any."""
    if isinstance(plan, PlanByDifficulty):
        return asdict(plan) | {"plans": [recorded(own) for own in plan.plans]}
    return {name: value for name, value in asdict(plan).items() if (name, value) != ("chain", 1)}


def saved_plan(plan: AnyPlan) -> dict[str, Any]:
    """Its part of tuned.json; nothing for greedy, whose files stay what they were before there were plans."""
    return {} if plan == GREEDY else {"plan": recorded(plan)}


def loaded_plan(content: Mapping[str, Any]) -> AnyPlan:
    """The plan in tuned.json. Raises UsageError for one that cannot be carried out."""
    saved = content.get("plan")
    try:
        if saved is None:
            return GREEDY
        if "edges" in saved:
            parts = {"edges": tuple(saved["edges"]), "plans": tuple(InferencePlan(**p) for p in saved["plans"])}
            return check_bins(PlanByDifficulty(**{**saved, **parts}))
        return check(InferencePlan(**saved))
    except (TypeError, KeyError) as error:
        raise UsageError(
            f"The inference plan {content['plan']!r} is damaged ({error}). Run the tuning again."
        ) from None


def sampling_of(plan: AnyPlan, decoding: Sampling) -> Sampling:
    """What the engine is asked for: `decoding` itself, or `plan.samples` draws at the plan's temperature and top_p.

    Sample s of a prompt is the same whatever N is, so a plan of fewer samples sees the first ones of the larger one.
    Of a plan by difficulty it is the probe.
    """
    if isinstance(plan, PlanByDifficulty):
        each = [sampling_of(own, decoding) for own in check_bins(plan).plans]
        probe = scorer(plan.scorer) if plan.scorer is not None else None
        logprobs = any(own.logprobs for own in each) or (probe is not None and probe.logprobs)
        return replace(each[0], n=plan.probe, logprobs=logprobs)
    check(plan)
    if plan == GREEDY:
        return decoding
    reads = scorer(plan.scorer) if plan.scorer is not None else None
    return replace(
        decoding,
        n=plan.samples,
        temperature=plan.temperature,
        top_p=plan.top_p,
        logprobs=reads is not None and reads.logprobs,
    )


def choose(plan: InferencePlan, votes: Sequence[Answer], scores: Sequence[float | None]) -> Shares:
    """The chance of each vote to be the answer of these completions, by the plan's aggregation.

    Of chains, every attempt votes, or is ranked, wherever in its chain it is: right answers get turned wrong (Snell et
    al.). Weighted best-of is `hierarchical`, over chains of `plan.chain` attempts; of scores that are shares of the
    votes it is the majority too. The best of the chains' best is the best of all.
    A completion without a score counts 0, as low as a score can be: it wins nothing unless none has one (ours).
    """
    if plan.aggregation not in _RANKED:
        return majority_vote(votes)
    known = [score or 0.0 for score in scores] if scores else self_consistency(votes)
    if plan.aggregation == "best-of":
        return best_of_n(votes, known)
    if plan.chain == 1 or not scores:
        return weighted_best_of_n(votes, known)
    starts = range(0, len(votes), plan.chain)
    return hierarchical([votes[i : i + plan.chain] for i in starts], [known[i : i + plan.chain] for i in starts])


def scored(
    plan: AnyPlan,
    prompt: str,
    completions: Sequence[Completion],
    verifier: Verifier | None = None,
    bench: Any = None,
) -> tuple[float | None, ...]:
    """What the plan's scorer gives each completion; empty where the plan has none, or it reads votes alone.

    A scorer that raises, or gives what is no number of at least 0, has no score for the completion: one of them must
    not cost the run. `bench` pays for a verifier. Raises UsageError when a scorer gives another number of scores than
    there are completions, and for a plan that wants a verifier where there is none; BudgetExhausted.
    """
    if plan.scorer == VERIFIER:
        if verifier is None:
            raise UsageError("The plan's scorer is a verifier and none was trained. Give plan.scorer another.")
        return tuple(verifier.score(prompt, completions, bench))
    reads = scorer(plan.scorer) if plan.scorer is not None else None
    if reads is None:
        return ()
    try:
        given = list(reads.score(prompt, completions))
    except Exception as failure:  # it may be anybody's
        logger.warning("The scorer %s has failed: %s: %s", plan.scorer, type(failure).__name__, failure)
        return (None,) * len(completions)
    if len(given) != len(completions):
        raise UsageError(f"The scorer {plan.scorer} gave {len(given)} scores to {len(completions)} completions.")
    return tuple(s if s is not None and math.isfinite(s) and s >= 0 else None for s in given)


def told(
    task: Task,
    example: Example,
    plan: PlanByDifficulty,
    completions: Sequence[Completion],
    ratings: Sequence[float | None],
) -> Told:
    """The bin of a question from the completions of its probe, read as votes, or by the plan's scorer as `ratings`."""
    votes = [task.vote(example, c.text, c.truncated) for c in completions]
    return probing.told(plan.edges, votes, ratings if plan.scorer is not None else None)


def decided(
    task: Task,
    example: Example,
    plan: InferencePlan,
    completions: Sequence[Completion],
    scores: Sequence[float | None],
    told: Told | None = None,
) -> Samples:
    """Votes are counted as the plan says. Of tied votes the one drawn first is given: completions are exchangeable, so
    each is first equally often, and the rule is IAPO's uniform choice among the tied without another random number.
    (Chains are exchangeable, the attempts of one are not: there it is the earliest of the first chain that has one.)"""
    votes = tuple(task.vote(example, c.text, c.truncated) for c in completions)
    shares = choose(plan, votes, scores)
    given = next(vote for vote in votes if vote in shares)
    return Samples(tuple(completions), votes, tuple(scores), shares, _speaker(given, votes, scores), plan, told)


def _speaker(vote: Answer, votes: Sequence[Answer], scores: Sequence[float | None]) -> int:
    """The completion that is shown for a vote: the one with the highest score, else the first."""
    own = [i for i, other in enumerate(votes) if other == vote]
    return max(own, key=lambda i: scores[i] or 0.0) if scores else own[0]


def judged(task: Task, example: Example, samples: Samples) -> tuple[Grade, dict[Answer, float]]:
    """The grade of the answer, and the score of each vote.

    Outcome and prediction are those of the completion that speaks. Score and metrics are expected over tied votes: IAPO
    gives the gold answer 1/t among t. So a tie can be `correct` with a score below 1, and its note says so.
    """
    of = {vote: _speaker(vote, samples.votes, samples.scores) for vote in dict.fromkeys(samples.votes)}
    grades = {
        vote: task.grade(example, samples.completions[i].text, samples.completions[i].truncated)
        for vote, i in of.items()
    }
    grade = grades[samples.votes[samples.chosen]]
    worth = {vote: g.score for vote, g in grades.items()}
    notes = [grade.note] if grade.note else []
    if len(samples.shares) > 1:
        notes.append(f"{len(samples.shares)} answers are tied, each counts 1/{len(samples.shares)}")
        metrics = {
            name: expected_score(samples.shares, {vote: g.metrics.get(name, 0.0) for vote, g in grades.items()})
            for name in grade.metrics
        }
        grade = replace(grade, score=expected_score(samples.shares, worth), metrics=metrics)
    if missing := samples.scores.count(None):
        notes.append(f"{missing} of {len(samples.scores)} completions have no score and count 0")
    return replace(grade, note="; ".join(notes)), worth


# ---- one draw of N, read for every smaller n ----


def block_scores(
    plan: InferencePlan,
    votes: Sequence[Answer],
    scores: Sequence[float | None],
    worth: Mapping[Answer, float],
    n: int,
) -> list[float]:
    """The expected score of the answer of each disjoint block of n neighbours, floor(N / n) of them (IAPO)."""
    starts = range(0, len(votes) // n * n, n)
    return [expected_score(choose(plan, votes[i : i + n], scores[i : i + n]), worth) for i in starts]


def served(plan: InferencePlan, n: int) -> list[int]:
    """The lengths l of chains for which a draw of the plan says what n completions are worth, n / l chains of l each.

    Those are the first l attempts of each of n / l neighbouring chains: l divides n, l <= chain and n / l <= N / chain.
    An attempt depends on those before it alone, so the beginning of a chain is a chain, and such blocks are unbiased.
    No other part of a draw is: attempts from the middle of a chain have seen more. Without chains it is l = 1.
    """
    wide = plan.samples // plan.chain
    return [length for length in range(1, plan.chain + 1) if n % length == 0 and n // length <= wide]


def row_of(samples: Samples, worth: Mapping[Answer, float]) -> dict[str, Any]:
    """`plan` and `samples` of a row of predictions.jsonl: all that `samples_of`, `curve` and a new grading need.

    `votes` are places in `answers`, whose scores are `worth`. Under a plan by difficulty also what the probe has told.
    """
    answers = list(worth)
    return {
        "plan": recorded(samples.plan),
        **({"difficulty": asdict(samples.told)} if samples.told else {}),
        "samples": {
            "answers": answers,
            "worth": [worth[answer] for answer in answers],
            "votes": [answers.index(vote) for vote in samples.votes],
            **({"scores": list(samples.scores)} if samples.scores else {}),
            "completions": [c.text for c in samples.completions],
            "truncated": [c.truncated for c in samples.completions],
            "generated_tokens": [c.generated_tokens for c in samples.completions],
            **({"prompt_tokens": [c.prompt_tokens for c in samples.completions]} if samples.plan.chain > 1 else {}),
        },
    }


def tokens_read(chain: int, prompt_tokens: Sequence[int]) -> int:
    """By the samples of one answer, chains of `chain` one after another: the question once, then what each revision
    reads, question and earlier attempts."""
    return prompt_tokens[0] + sum(read for place, read in enumerate(prompt_tokens) if place % chain)


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The score at n = 1, 2, 4, ... and N completions, from rows that drew N each; empty unless all have one plan.

    Empty too where a probe has chosen it: fewer samples than the probe's would have told another bin, or none.

    Mean over examples of the mean over an example's disjoint blocks. `generated_tokens` are those of n completions, on
    average. The last entry is the score of the rows themselves. Of chains there is an entry for every length that the
    draw serves (`served`), and `read_tokens` are the prompts of n completions: revisions also read earlier attempts.
    """
    if not rows or any(row.get("plan") != rows[0].get("plan") for row in rows) or "plan" not in rows[0]:
        return []
    if any("difficulty" in row for row in rows):
        return []
    plan = InferencePlan(**rows[0]["plan"])
    sizes = [n for n in (1 << i for i in range(plan.samples.bit_length())) if n < plan.samples] + [plan.samples]
    if plan.chain > 1:
        return [_of_chains(plan, rows, n, length) for n in sizes for length in served(plan, n)]
    tokens = sum(sum(row["samples"]["generated_tokens"]) for row in rows) / len(rows) / plan.samples
    return [
        {"samples": n, "score": math.fsum(_at(plan, row["samples"], n) for row in rows) / len(rows)}
        | {"generated_tokens": n * tokens}
        for n in sizes
    ]


def _of_chains(plan: InferencePlan, rows: Sequence[Mapping[str, Any]], n: int, length: int) -> dict[str, Any]:
    """The curve's entry for n completions, of which `length` are in a row."""
    chains, shorter = plan.samples // plan.chain, replace(plan, chain=length)
    share = n / length / chains  # of the chains, in one block
    scores, written, read = [], [], []
    for row in rows:
        kept = row["samples"]
        begun = {
            name: [value for place, value in enumerate(kept[name]) if place % plan.chain < length]
            for name in ("votes", "scores", "generated_tokens", "prompt_tokens")
            if name in kept
        }
        scores.append(_at(shorter, kept | begun, n))
        written.append(sum(begun["generated_tokens"]) * share)
        once = begun["prompt_tokens"][0]
        read.append(once + (tokens_read(length, begun["prompt_tokens"]) - once) * share)
    means = {
        name: math.fsum(values) / len(rows)
        for name, values in (("score", scores), ("generated_tokens", written), ("read_tokens", read))
    }
    return {"samples": n, "chain": length, **means}


def by_bin(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each difficulty bin that rows are in: its plan, how many examples, their share of all rows, their samples on
    average, with which the plan and its probe are paid for, and their score; empty without a plan by difficulty."""
    bins: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "difficulty" in row:
            bins.setdefault(row["difficulty"]["bin"], []).append(row)
    return [
        {
            "bin": number,
            "plan": own[0]["plan"],
            "examples": len(own),
            "share": len(own) / len(rows),
            "samples": sum(len(row["samples"]["votes"]) for row in own) / len(own),
            "score": math.fsum(row["score"] for row in own) / len(own),
        }
        for number, own in sorted(bins.items())
    ]


def _at(plan: InferencePlan, kept: Mapping[str, Any], n: int) -> float:
    answers = kept["answers"]
    worth = dict(zip(answers, kept["worth"], strict=True))
    found = block_scores(plan, [answers[i] for i in kept["votes"]], kept.get("scores", ()), worth, n)
    return math.fsum(found) / len(found)


def regraded(task: Task, example: Example, row: Mapping[str, Any]) -> tuple[Grade, dict[str, Any]]:
    """The grade of a row that has samples, by the grader of this version, and what of the row follows the choice."""
    plan, kept = InferencePlan(**row["plan"]), row["samples"]
    read = kept.get("prompt_tokens") or [row["prompt_tokens"]] * len(kept["completions"])
    columns = zip(kept["completions"], kept["truncated"], kept["generated_tokens"], read, strict=True)
    completions = [Completion(text, (), asked, cut, counted=count) for text, cut, count, asked in columns]
    probed = Told(**row["difficulty"]) if "difficulty" in row else None  # what was drawn was drawn for this bin
    samples = decided(task, example, plan, completions, kept.get("scores", ()), probed)
    grade, worth = judged(task, example, samples)
    speaks = samples.completions[samples.chosen]
    return grade, row_of(samples, worth) | {"completion": speaks.text, "truncated": speaks.truncated}
