"""Accounts and limits."""

from __future__ import annotations

import pytest

from cotune.errors import BudgetExhausted
from cotune.ledger import Ledger, Spent, forward_flops, training_flops
from cotune.serving import per_example


def test_flops_by_hand() -> None:
    assert forward_flops(1_000, 10) == 2 * 1_000 * 10
    assert training_flops(frozen=1_000, trained=0, tokens=10) == 4 * 1_000 * 10
    # everything trained is the usual 6 N D
    assert training_flops(frozen=0, trained=1_000, tokens=10) == 6 * 1_000 * 10


def test_measuring_is_booked_apart_and_has_no_limit() -> None:
    ledger = Ledger(tokens=10)
    ledger.allow(10, 0)
    ledger.book(Spent(calls=1, prompt_tokens=4, generated_tokens=5))
    with pytest.raises(BudgetExhausted, match="10 tuning tokens"):
        ledger.allow(2, 0)
    with ledger.measuring():
        ledger.allow(1_000, 0)
        ledger.book(Spent(calls=7, prompt_tokens=1_000))
    ledger.allow(1, 0)
    ledger.book(Spent(trained_tokens=1))
    assert ledger.report()["tuning"]["tokens"] == 10
    assert ledger.report()["measuring"]["tokens"] == 1_000


def test_a_flops_limit_holds_too() -> None:
    ledger = Ledger(flops=100.0)
    ledger.allow(10**9, 100.0)
    with pytest.raises(BudgetExhausted, match="FLOPs"):
        ledger.allow(0, 101.0)


def test_zero_budget_allows_nothing() -> None:
    with pytest.raises(BudgetExhausted):
        Ledger(tokens=0).allow(1, 0.0)


def test_a_limit_of_seconds_lets_the_last_work_finish() -> None:
    ledger = Ledger(seconds=10)
    ledger.allow(10**9, 1e30)
    ledger.book(Spent(seconds=9.9))
    ledger.allow(1, 1.0)
    ledger.book(Spent(seconds=5.0))
    with pytest.raises(BudgetExhausted, match="10 seconds of tuning"):
        ledger.allow(1, 1.0)
    with ledger.measuring():
        ledger.allow(1, 1.0)
    with pytest.raises(BudgetExhausted):
        Ledger(seconds=0).allow(0, 0.0)


def test_restore_sets_the_tuning_account_alone() -> None:
    ledger = Ledger()
    with ledger.measuring():
        ledger.book(Spent(calls=3))
    ledger.book(Spent(calls=1, seconds=2.0))
    ledger.restore(Spent(calls=9, seconds=4.0))
    assert ledger.tuning == Spent(calls=9, seconds=4.0)
    assert ledger.measuring_account == Spent(calls=3)


def test_parts_are_what_is_booked_inside() -> None:
    ledger = Ledger()
    ledger.book(Spent(calls=1))
    with ledger.measuring(), ledger.parts() as outer:
        ledger.book(Spent(calls=2), "prompts")
        with ledger.parts() as inner:
            ledger.book(Spent(calls=4, encoded_tokens=9))
        ledger.book(Spent(calls=8))
    assert inner == {"answers": Spent(calls=4, encoded_tokens=9)}
    assert outer == {"prompts": Spent(calls=2), "answers": Spent(calls=8)}
    assert ledger.measuring_account == Spent(calls=14, encoded_tokens=9)
    assert ledger.report()["measuring"]["tokens"] == 0  # what the encoder reads, prompt generation has booked


def test_serving_is_per_example_and_empty_where_nothing_was_generated() -> None:
    answers = Spent(calls=4, prompt_tokens=40, generated_tokens=8, flops=100.0, seconds=2.0)
    alone = per_example({"answers": answers}, 4)
    mean = {"read_tokens": 10.0, "written_tokens": 2.0, "flops": 25.0, "seconds": 0.5}
    assert alone == {
        "examples": 4, "prompts": None, "adapters": None, "answers": mean, "flops": 25.0, "seconds": 0.5,
    }  # fmt: skip
    adapters = Spent(encoded_tokens=20, flops=4.0, seconds=1.0)
    both = per_example({"answers": answers, "adapters": adapters}, 4)
    assert both["adapters"] == {"read_tokens": 5.0, "flops": 1.0, "seconds": 0.25}
    assert (both["flops"], both["seconds"]) == (26.0, 0.75)
