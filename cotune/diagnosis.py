"""What the events of a run say about the health of its search or its joint training, in plain words.

The failure signatures are those that MetaTuner's readers would look for (ours; the paper names none). Reads events as
plain mappings; knows neither models nor the run folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Events = Sequence[Mapping[str, Any]]

# Where a signature begins. Conventions, to be read as "look here", not tests.
_FEW = 8  # examples below which nothing is said about how different they are
_WEAK = 1e-3  # an update of this share of the weights' norm
_ALIKE = 0.02  # a variation between examples below this
_MOVED = 0.05  # a relative change of a loss


def warnings(events: Events) -> list[str]:
    """One sentence for each signature found; empty for a healthy run."""
    found = [
        _nothing_new(events),
        _nothing_gained(events),
        _one_prompt(events),
        _idle_adapters(events),
        _one_branch(events),
        _hollow_loss(events),
        _blind_verifier(events),
        _one_plan(events),
    ]
    return [sentence for sentence in found if sentence]


def _last(events: Events, kind: str) -> Mapping[str, Any] | None:
    return next((e for e in reversed(events) if e.get("kind") == kind), None)


def _nothing_new(events: Events) -> str | None:
    """Of the first search (there can be several in a sequence) in which no proposal was ever tried."""
    searches: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("kind") == "round":
            searches.setdefault(str(event.get("stage", "")), []).append(event)
    for rounds in searches.values():
        rejected: Counter[str] = sum((Counter(r["rejected"]) for r in rounds), Counter())
        proposed = sum(r["proposed"] for r in rounds)
        if rejected.total() == proposed:
            why = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in rejected.most_common())
            told = f"all {proposed} proposals were rejected ({why})" if proposed else "nothing was proposed"
            return (
                f"The prompt search found no new prompt to try in {len(rounds)} rounds: {told}, so the starting prompt "
                "stayed. Try another prompt.proposer or prompt.method."
            )
    return None


def _nothing_gained(events: Events) -> str | None:
    """Of the first training whose start was better on val than all that it made."""
    for start in (e for e in events if e.get("kind") == "start"):
        made = [
            e["val_score"]
            for e in events
            if e.get("kind") in ("epoch", "validation") and e.get("stage") == start.get("stage")
        ]
        if made and start["val_score"] > max(made):
            return (
                f"Training made the val score worse ({100 * start['val_score']:.1f} before, {100 * max(made):.1f} at "
                "best), so what it started from is handed over. Try a lower learning rate, or another method."
            )
    return None


def _one_prompt(events: Events) -> str | None:
    written = _last(events, "generated_prompts")
    if written is None or written["examples"] < _FEW or written["distinct"] > 1 or written.get("fixed"):
        return None
    if written["fallbacks"] == written["examples"]:
        return "The generator writes no usable prompt for any query (empty or cut off), so the seed prompt stands in."
    return f"All {written['examples']} queries get the same prompt: the prompt branch no longer reads the query."


def _idle_adapters(events: Events) -> str | None:
    made = _last(events, "adapters")
    if made is None:
        return None
    if made["relative_norm"] < _WEAK:
        share = 100 * made["relative_norm"]
        return f"The generated adapters hardly do anything: their update has {share:.2g}% of the weights' norm."
    if made["variation"] < _ALIKE and made["examples"] >= _FEW and not made.get("fixed"):
        return "The generated adapters are nearly the same for every query; one static adapter would do."
    return None


def _thirds(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and the last third; None for fewer than six values."""
    third = len(values) // 3
    return (sum(values[:third]) / third, sum(values[-third:]) / third) if third > 1 else None


def _losses(events: Events, key: str, share: str) -> list[float]:
    """A term's loss per example that it counts, at each step."""
    return [e[key] / e[share] for e in events if e.get("kind") == "step" and e.get(share)]


def _one_branch(events: Events) -> str | None:
    actor = _thirds(_losses(events, "actor_loss", "answered"))
    prompt = _thirds(_losses(events, "prompt_loss", "taught"))
    if actor is None or prompt is None:
        return None
    changes = {"adapter": actor[1] / actor[0] - 1, "prompt": prompt[1] / prompt[0] - 1}
    for better, worse in (("adapter", "prompt"), ("prompt", "adapter")):
        if changes[better] < -_MOVED and changes[worse] > _MOVED:
            return (
                f"The {better} branch improves (loss {100 * changes[better]:+.0f}%) while the {worse} branch decays "
                f"({100 * changes[worse]:+.0f}%): try another joint.alpha or joint.share."
            )
    return None


def _hollow_loss(events: Events) -> str | None:
    scores = [e["val_score"] for e in events if e.get("kind") == "validation" and e.get("val_score") is not None]
    actor = _thirds(_losses(events, "actor_loss", "answered"))
    if len(scores) < 3 or actor is None or scores[-1] >= max(scores) - _MOVED or actor[1] >= actor[0] * (1 - _MOVED):
        return None
    return (
        f"The validation score falls (best {100 * max(scores):.1f}, last {100 * scores[-1]:.1f}) while the loss falls "
        "too: likelihood no longer means right answers; fewer epochs or a lower rate may keep more."
    )


def _blind_verifier(events: Events) -> str | None:
    """Of the last verifier: its training completions scored alike, or it does not rank held-out ones."""
    found = _last(events, "verifier")
    if found is None:
        return None
    more = "Raise verifier.samples or verifier.examples, or tune before the plan (sequential.stages)"
    if found["constant"]:
        return (
            f"All completions that the verifier learned from scored {found['mean_score']:g}, so it rates every one "
            f"alike: best-of is a draw, weighted best-of the majority. {more}."
        )
    auc = found["held_out_auc"]
    if auc is not None and auc <= 0.5 and found["held_out"] >= _FEW:
        return (
            f"The verifier rates the better of two held-out completions higher in {100 * auc:.0f}% of the pairs, no "
            f"more than chance. {more}, or set another scorer."
        )
    return None


def _one_plan(events: Events) -> str | None:
    """Of a choice of plans by difficulty that chose one for all."""
    policy = _last(events, "policy")
    if policy is None or policy.get("by_difficulty", True):
        return None
    gain = ""
    if policy["error"] is not None:
        gain = f" ({policy['gain']:+.3f} of utility, standard error {policy['error']:.3f})"
    count = policy["samples"]
    return (
        f"A plan for each difficulty gains nothing that is sure on the questions that choose it{gain}, so one "
        f"plan of {count} sample{'s' * (count > 1)} answers all."
    )
