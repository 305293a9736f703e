"""Statistics in plain words: what a comparison shows, and what it does not. Knows nothing of tables or runs."""

from __future__ import annotations

from collections.abc import Sequence

from cotune.compare.crossed import Arm
from cotune.compare.stats import Estimate, Finding


def difference(ours: str, theirs: str, tested: Finding, shown: int) -> str:
    """For example "joint is better than sequential by 3.1 points (95% 0.9 to 5.3)."

    Without a star it says that no difference is shown, and which difference this design could have seen. `shown`: how
    many differences Holm's correction was over.
    """
    mean = tested.estimate.mean
    if tested.significant:
        word = "better" if mean > 0 else "worse"
        return _with_seeds(
            f"{ours} is {word} than {theirs} by {points(abs(mean))} points{_interval(tested, mean)}", tested
        )
    if not mean and not tested.estimate.standard_error:
        where = "every example" if tested.estimate.n > 1 else "the one example there is"
        claim = f"{ours} scores the same as {theirs} on {where}: no difference shown"
        return _with_seeds(claim + _seen(tested), tested)
    return _with_seeds(f"{ours} against {theirs}: {_not_shown('difference', tested, shown)}", tested)


def interaction(strategy: str, tested: Finding, shown: int) -> str:
    """Whether prompt and weights together give more or less than the sum of what each gives alone."""
    mean = tested.estimate.mean
    if tested.significant:
        word = "more" if mean > 0 else "less"
        amount = f"{points(abs(mean))} points {word} than the sum of what each gains alone"
        return _with_seeds(f"{strategy}: prompt and weights together gain {amount}{_interval(tested, mean)}", tested)
    if not mean and not tested.estimate.standard_error:
        return _with_seeds(f"{strategy}: no interaction of prompt and weights on any example", tested)
    return _with_seeds(f"{strategy}: {_not_shown('interaction of prompt and weights', tested, shown)}", tested)


def effect(strategy: str, of: Sequence[str], levers: Sequence[str], tested: Finding, shown: int) -> str:
    """What one lever gives, or several beyond their sum, over both settings of the other `levers` (factorial.py)."""
    rest = [lever for lever in levers if lever not in of]
    who = f"{strategy}, averaged over {listed(rest)} seed and tuned" if rest else strategy
    mean, one = tested.estimate.mean, len(of) == 1
    what = f"effect of the {of[0]}" if one else f"interaction of {listed(of)}"
    if tested.significant:
        amount, word = f"{points(abs(mean))} points", "more" if mean > 0 else "less"
        if one:
            claim = f"tuning the {of[0]} {'gains' if mean > 0 else 'loses'} {amount}"
        elif len(of) == 2:
            claim = f"{listed(of)} together gain {amount} {word} than the sum of what each gains without the other"
        else:
            claim = f"what {listed(of[:-1])} gain beyond their sum is {amount} {word} once the {of[-1]} is tuned too"
        return _with_seeds(f"{who}: {claim}{_interval(tested, mean)}", tested)
    if not mean and not tested.estimate.standard_error:
        return _with_seeds(f"{who}: no {what} on any example", tested)
    return _with_seeds(f"{who}: {_not_shown(what, tested, shown)}", tested)


def relative_gain(ours: str, theirs: str, tested: Finding) -> str:
    """The gain relative to the baseline, averaged over tasks; it has no star: it is the difference in another unit."""
    interval = _span(tested.estimate)
    return f"{ours} against {theirs}: relative gain {100 * tested.estimate.mean:+z.1f}%" + (
        f" (95% {interval})." if interval else " (no interval)."
    )


def answer(theirs: str, tested: Sequence[tuple[str, Finding]]) -> str:
    """All differences to one baseline in one sentence, without its full stop: who is better, who is worse, who is not
    shown to be either. It ranks nobody among those that are better: that was not tested.
    """
    better = [(name, t) for name, t in tested if t.significant and t.estimate.mean > 0]
    worse = [(name, t) for name, t in tested if t.significant and t.estimate.mean < 0]
    unclear = [name for name, t in tested if not t.significant]
    parts = [
        f"{few([n for n, _ in some])} {'is' if len(some) == 1 else 'are'} {word} than {theirs} by {_amounts(some)}"
        for word, some in (("better", better), ("worse", worse))
        if some
    ]
    if unclear and not parts:
        return f"no difference is shown between {theirs} and {'any of ' * (len(unclear) > 1)}{few(unclear)}"
    if unclear:
        parts.append(f"no difference from {theirs} is shown for {few(unclear)}")
    return "; ".join(parts)


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def few(names: Sequence[str]) -> str:
    """Up to five names; of more, three and how many others."""
    return listed(names if len(names) <= 5 else [*names[:3], f"{len(names) - 3} more"])


def _amounts(some: Sequence[tuple[str, Finding]]) -> str:
    means = [abs(t.estimate.mean) for _, t in some]
    if len(some) == 1:
        return f"{points(means[0])} points{_interval(some[0][1], some[0][1].estimate.mean)}"
    low, high = points(min(means)), points(max(means))
    return f"{low} points each" if low == high else f"{low} to {high} points"


def uncovered(sides: Sequence[tuple[str, Arm]]) -> str:
    """Which seeds the interval of a score (one side) or of a difference (two) does not cover; "" when it covers all."""
    few = [(name, "one seed" if arm.seeds == 1 else "two seeds") for name, arm in sides if arm.blind]
    counts = {count for _, count in few}
    if not few:
        return ""
    if len(counts) == 1 and all(arm.blind or arm.constant for _, arm in sides):
        return f"{counts.pop()}: other seeds are not covered"
    return "; ".join(f"{name} has {count}: its other seeds are not covered" for name, count in few)


def points(fraction: float) -> str:
    return f"{100 * fraction:z.1f}"


def p_value(p: float | None) -> str:
    """Three decimals; a fourth where three could not tell the side of 0.05."""
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.4f}" if f"{p:.3f}" == "0.050" else f"{p:.3f}"


def _not_shown(what: str, tested: Finding, shown: int) -> str:
    mean = tested.estimate.mean
    span = _span(tested.estimate)
    found = f"{100 * mean:+z.1f} points, " + (f"95% {span}" if span else "no interval: too few or too equal examples")
    if tested.lost_to_holm:
        alone = f"below 0.05 alone (p {p_value(tested.p)}), not among the {shown} shown (p {p_value(tested.p_holm)})"
        return f"no {what} shown ({found}; {alone}){_seen(tested)}"
    aside = "; the test and the interval, made apart, fall on two sides" if tested.estimate.excludes_zero else ""
    return f"no {what} shown ({found}{aside}){_seen(tested)}"


def _seen(tested: Finding) -> str:
    return "" if tested.detectable is None else f"; this design could have seen {points(tested.detectable)} points"


def _interval(tested: Finding, mean: float) -> str:
    """Turned so that it reads along with an amount that is said without its sign."""
    e = tested.estimate
    if e.low is None or e.high is None:
        return " (every example differs alike: no interval)"
    low, high = (e.low, e.high) if mean > 0 else (-e.high, -e.low)
    aside = "" if e.excludes_zero else "; the test and the interval, made apart, fall on two sides"
    return f" (95% {points(low)} to {points(high)}{aside})"


def _span(e: Estimate) -> str:
    return "" if e.low is None or e.high is None else f"{points(e.low)} to {points(e.high)}"


def _with_seeds(sentence: str, tested: Finding) -> str:
    return f"{sentence}. {tested.uncovered[:1].upper()}{tested.uncovered[1:]}." if tested.uncovered else f"{sentence}."
