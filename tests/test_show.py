"""The arms of a bandit as `cotune show` tells them."""

from __future__ import annotations

from cotune.show import _arms, arms

EVENTS = [
    {"kind": "candidate", "stage": "tune", "text": "Think.", "score": 0.4},
    {"kind": "arm", "stage": "tune", "text": "Think.", "utility": [0.4, 0.4, 0.55, None], "chosen": True},
    {"kind": "arm", "stage": "tune", "text": "Answer\x1b[2J.", "utility": [0.5, 0.5, None, None], "chosen": False},
    {"kind": "policy", "stage": "tune", "learner": "psst", "samples": 3, "completions": 40},
]


def test_the_best_arm_of_every_n_and_the_chosen_one() -> None:
    found = arms(EVENTS)
    assert found[0] == {"stage": "tune", "prompt": "Think.", "utility": [0.4, 0.4, 0.55, None], "chosen": 3}
    assert found[1]["chosen"] is None
    lines = _arms(found)
    assert lines[1:] == [
        "      N = 1    N = 2    N = 3    N = 4",
        ">    0.400    0.400    0.550*           Think.  (N = 3)",
        "     0.500*   0.500*                    Answer\\x1b[2J.",
    ]


def test_a_run_without_a_bandit_has_none() -> None:
    plans = [{"kind": "policy", "stage": "tune", "by_difficulty": False, "samples": 4}]
    assert arms([EVENTS[0], *plans]) == []
    (arm,) = arms([{"kind": "arm", "stage": "tune/1-i", "utility": [0.25], "chosen": True}, EVENTS[3]])
    assert (arm["prompt"], arm["chosen"]) == (None, None)  # the policy is of another stage
    assert _arms([arm])[2].split() == ["0.250*", "what", "was", "at", "hand"]
