"""A verifier at work: what it reads, what that costs, and how it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from toy import Sums, bench, example, fake

from cotune import verifier
from cotune.bench import MemoryStore
from cotune.engines.base import Sampling
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.models.base import BaseModel
from cotune.models.likelihood import end_states
from cotune.strategies import load_tuned
from cotune.strategies.base import Fixed
from cotune.values import Completion, Conditioning, InferencePlan, Prompt
from cotune.verifier import VerifierHead

PLAN = InferencePlan("best-of", 2, "verifier", 1.0)
PROMPT = "What is 1 + 2 ?"
ENGINE = fake(lambda rendered, adapter: 1.0)


def head(base: BaseModel, scale: float = 0.1) -> VerifierHead:
    weight_D = scale * torch.randn(base.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return VerifierHead(weight_D, torch.tensor(0.5))


def said(base: BaseModel, *texts: str) -> list[Completion]:
    return [Completion(text, tuple(base.encode(text)), 1, False) for text in texts]


def test_the_state_is_that_behind_the_last_token_whatever_stands_beside(random_base: BaseModel) -> None:
    """Against each row alone, by the library's own hidden states."""
    rows = [random_base.encode(text) for text in ("one", "a longer row", "1", "4 + 4")]
    model = random_base.model
    with torch.no_grad():
        found = end_states(model, rows)
        alone = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1] for row in rows]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_a_score_is_the_chance_by_hand_and_equal_completions_are_read_once(random_base: BaseModel) -> None:
    at, own = bench(random_base, ENGINE), head(random_base)
    found = own.score(PROMPT, said(random_base, "3", "13", "3", ""), at)
    ids = [random_base.encode(PROMPT + text) for text in ("3", "13", "")]
    with torch.no_grad():
        states = functional.rms_norm(end_states(random_base.model, ids), (len(own.weight_D),))
    three, thirteen, nothing = torch.sigmoid(states @ own.weight_D + own.bias).tolist()
    assert found == pytest.approx([three, thirteen, three, nothing], abs=1e-6)
    assert len(set(found)) == 3
    assert at.ledger.tuning.prompt_tokens == sum(map(len, ids))
    assert at.ledger.tuning.flops == 2 * random_base.parameters_count * sum(map(len, ids))
    assert own.score(PROMPT, [], at) == []


def test_scores_stay_in_their_range_and_apart(random_base: BaseModel) -> None:
    own = VerifierHead(torch.ones(2), torch.tensor(0.0))
    low, high, higher = own.chances(torch.tensor([[-500.0, -500.0], [8.0, 8.0], [9.0, 9.0]])).tolist()
    assert 0 <= low < 1e-6
    assert high < higher <= 1  # float32 would have made both of them 1


def test_what_does_not_fit_the_context_has_no_score(random_base: BaseModel) -> None:
    long = Completion("", (5,) * random_base.context_length, 1, True)
    at = bench(random_base, ENGINE)
    scores = head(random_base).score(PROMPT, [long, *said(random_base, "3")], at)
    assert scores[0] is None and scores[1] is not None


def test_what_was_read_is_not_read_again_after_an_interruption(
    random_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, own = MemoryStore(), head(random_base)
    completions = said(random_base, "3", "4")
    first = bench(random_base, ENGINE, store=store)
    scores = own.score(PROMPT, completions, first)
    monkeypatch.setattr(verifier, "read", lambda base, rows: pytest.fail("it was read again"))
    again = bench(random_base, ENGINE, store=store)
    assert own.score(PROMPT, completions, again) == scores
    assert again.ledger.tuning == first.ledger.tuning


def test_another_model_is_refused(random_base: BaseModel) -> None:
    own = VerifierHead(torch.ones(3), torch.tensor(0.0))
    with pytest.raises(UsageError, match="width 3, and this one has 64"):
        own.score(PROMPT, said(random_base, "3"), bench(random_base, ENGINE))


def test_a_plan_without_its_verifier_is_refused(random_base: BaseModel) -> None:
    at = bench(random_base, ENGINE)
    with pytest.raises(UsageError, match="none was trained"):
        evaluate(Sums(), [example(0)], [Conditioning(Prompt("Add."), plan=PLAN)], Sampling(16), at)


def test_it_is_saved_and_loaded_with_what_was_tuned(random_base: BaseModel, tmp_path: Path) -> None:
    tuned = Fixed(Prompt("Add."), plan=PLAN, verifier=head(random_base))
    tuned.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"tuned.json", "verifier.safetensors"}
    loaded = load_tuned(tmp_path, random_base)
    (conditioning,) = loaded.condition([example(0)], None)
    assert isinstance(conditioning.verifier, VerifierHead)
    assert conditioning.verifier.digest == head(random_base).digest
    assert loaded.under(InferencePlan("majority", 2, None, 1.0)).condition([example(0)], None)[0].verifier is None
    torch.save({"weight": torch.ones(2)}, tmp_path / "verifier.safetensors")
    with pytest.raises(UsageError, match="missing or damaged"):
        load_tuned(tmp_path, random_base)
    VerifierHead(torch.tensor([torch.nan]), torch.tensor(0.0)).save(tmp_path)
    with pytest.raises(UsageError, match="no finite vector"):
        load_tuned(tmp_path, random_base)
    (tmp_path / "verifier.safetensors").unlink()
    with pytest.raises(UsageError, match="missing or damaged"):
        load_tuned(tmp_path, random_base)
