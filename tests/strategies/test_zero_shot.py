"""The control tunes nothing."""

from pathlib import Path

from toy import bench, fake, problem

from cotune.config import resolve
from cotune.models.base import load
from cotune.strategies.base import Fixed
from cotune.strategies.zero_shot import ZeroShot
from cotune.values import Prompt


def test_start_comes_back_and_nothing_is_spent(random_model_dir: Path) -> None:
    base = load(str(random_model_dir), device="cpu", dtype="float32")
    engine = fake(lambda rendered, adapter: 1.0)
    at = bench(base, engine)
    start = Fixed(Prompt("Add."))
    strategy = ZeroShot.from_config(resolve({"strategy": "zero-shot", "model": "tiny", "task": "micro-gsm8k"}))
    assert strategy.tune(start, problem(base), at) is start
    assert strategy.levers == frozenset()
    assert engine.calls == []
    assert at.ledger.tuning.tokens == 0
