"""What the tests of joint tuning look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cotune.models.metatuner.losses import JointItem
from cotune.strategies import joint as joint_module


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[JointItem]]:
    """The items of every loss, in order; losses are computed as always."""
    batches: list[list[JointItem]] = []
    real = joint_module.joint_terms

    def note(tuner: Any, actor: Any, items: Sequence[JointItem]) -> Any:
        batches.append(list(items))
        return real(tuner, actor, items)

    monkeypatch.setattr(joint_module, "joint_terms", note)
    return batches
