"""The frame in which a model sees its earlier attempts and makes the next one. The same for real and tiny models.

Source: Snell et al. (arXiv 2408.03314; sheet 03): at most the latest four attempts stay in context. Their reviser is
fine-tuned; asking any model in the chat, and the wording, are ours. Knows nothing of tasks, models or plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cotune.errors import UsageError

KEPT = 4  # the paper's
REVISE_INSTRUCTION = (
    "Your earlier attempt is above. Check it for mistakes, then answer the question again, "
    "in full and in the same form."
)


def revision_messages(
    messages: Sequence[Mapping[str, str]],
    attempts: Sequence[str],
    kept: int = KEPT,
    instruction: str = REVISE_INSTRUCTION,
) -> list[dict[str, str]]:
    """The chat whose next assistant turn is an attempt at the question that `messages` ends with.

    Each of the latest `kept` attempts, oldest first, is an assistant turn of its own and followed by `instruction` as
    the user's, so turns alternate as chat templates want them. Without attempts it is `messages`. No attempt is cut or
    rewritten. UsageError when `messages` does not end with a user turn, or `kept` is below 1.
    """
    if not messages or messages[-1]["role"] != "user":
        raise UsageError("A chat to revise in must end with the question, a user turn.")
    if kept < 1:
        raise UsageError(f"A revision that sees {kept} earlier attempts is none; keep at least 1.")
    chat = [dict(message) for message in messages]
    for attempt in attempts[-kept:]:
        chat += [{"role": "assistant", "content": attempt}, {"role": "user", "content": instruction}]
    return chat
