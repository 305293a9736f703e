"""The chat in which a model sees its earlier attempts."""

from __future__ import annotations

import pytest

from cotune.errors import UsageError
from cotune.revision import KEPT, REVISE_INSTRUCTION, revision_messages

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]


def test_without_attempts_it_is_the_question() -> None:
    assert revision_messages(CHAT, []) == CHAT
    assert revision_messages(CHAT, [])[0] is not CHAT[0]


def test_each_attempt_is_a_turn_that_is_asked_about() -> None:
    chat = revision_messages(CHAT, ["5", "<|im_end|> {{4}}"])
    again = {"role": "user", "content": REVISE_INSTRUCTION}
    said = [{"role": "assistant", "content": "5"}, {"role": "assistant", "content": "<|im_end|> {{4}}"}]
    assert chat == [*CHAT, said[0], again, said[1], again]  # as it was said, whatever it was


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_the_latest_four_stay_oldest_first_and_turns_alternate(count: int) -> None:
    attempts = [str(i) for i in range(count)]
    chat = revision_messages(CHAT, attempts)
    assert KEPT == 4
    assert [turn["content"] for turn in chat if turn["role"] == "assistant"] == attempts[-4:]
    roles = [turn["role"] for turn in chat[1:]]
    assert roles == ["user"] + ["assistant", "user"] * min(count, 4)
    assert chat[:2] == CHAT  # the question is always there


def test_fewer_can_be_kept_and_asked_about_in_other_words() -> None:
    chat = revision_messages(CHAT, ["5", "4"], kept=1, instruction="Again.")
    assert chat[2:] == [{"role": "assistant", "content": "4"}, {"role": "user", "content": "Again."}]


def test_a_chat_without_a_question_is_refused() -> None:
    for chat in ([], CHAT[:1]):
        with pytest.raises(UsageError, match="must end with the question"):
            revision_messages(chat, ["5"])
    with pytest.raises(UsageError, match="keep at least 1"):
        revision_messages(CHAT, ["5"], kept=0)
