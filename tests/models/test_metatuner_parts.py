"""MetaTuner's encoder and parameter decoder, alone, against slow references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.errors import UsageError
from cotune.models.base import BaseModel, load
from cotune.models.metatuner.encoder import decoder_layers, hidden_after, latent, pool, shared_depth
from cotune.models.metatuner.lora_generator import LoraGenerator, decode
from tests.reference import metatuner as slow

SHAPES = {"layers.0.q": (6, 4), "layers.0.v": (6, 2), "layers.1.q": (6, 4), "layers.1.v": (6, 2)}


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    model = load(str(random_model_dir))
    model.model.double()
    return model


# --- encoder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "layers", "depth"),
    [(0.25, 28, 7), (0.75, 36, 27), (0.25, 4, 1), (0.1, 4, 1), (0.99, 4, 3), (0.5, 1, 1), (0.9, 2, 1)],
)
def test_shared_depth_is_the_papers_and_never_everything(share: float, layers: int, depth: int) -> None:
    assert shared_depth(share, layers) == depth


def test_encoder_is_the_hidden_state_behind_layer_k_whatever_the_padding(base: BaseModel) -> None:
    rows = [[5, 6, 7, 8, 9], [10, 11]]
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 0, 0, 0]])
    got = hidden_after(base.model, 1, ids)
    last, mean = pool(got, [5, 2], "last"), pool(got, [5, 2], "mean")
    for i, row in enumerate(rows):
        expected = slow.hidden(base.model, 1, row)
        torch.testing.assert_close(last[i], expected[-1], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(mean[i], expected.mean(0), atol=1e-10, rtol=1e-10)


def test_encoder_runs_no_layer_above_k(base: BaseModel) -> None:
    _, layers = decoder_layers(base.model)
    ran: list[int] = []
    handles = [layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    ids = torch.tensor([[5, 6]])
    hidden_after(base.model, 1, ids)
    assert ran == [0]
    base.model(input_ids=ids)  # and the hook that stops is gone
    assert ran == [0, 0, 1]
    for handle in handles:
        handle.remove()


def test_latent_has_unit_length_and_survives_a_zero_state() -> None:
    h = latent(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(h, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_a_model_that_is_no_stack_is_refused() -> None:
    with pytest.raises(UsageError, match="decoder layers"):
        decoder_layers(torch.nn.Linear(2, 2))


# --- parameter decoder -----------------------------------------------------------------------------------------------


def generator(layer_embedding: bool, **changes: Any) -> LoraGenerator:
    settings = {"latent_size": 5, "width": 3, "rank": 2} | changes
    made = LoraGenerator(SHAPES, layer_embedding=layer_embedding, rng=torch.Generator().manual_seed(0), **settings)
    for parameter in made.up_b.values():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return made


def test_decoder_is_the_papers_formula() -> None:
    made = generator(layer_embedding=False).double()
    h = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    factors = made(h)
    assert list(factors) == list(SHAPES)
    for name, (features_in, features_out) in SHAPES.items():
        key = name.replace(".", ":")
        for i in range(3):
            expected_a = slow.theta(h[i], made.down_a, made.up_a[key], (2, features_in))
            expected_b = slow.theta(h[i], made.down_b, made.up_b[key], (features_out, 2))
            torch.testing.assert_close(factors[name][0][i], expected_a, atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(factors[name][1][i], expected_b, atol=1e-12, rtol=1e-12)


def test_layer_embedding_is_the_formula_on_a_latent_with_the_layer_index_appended() -> None:
    rng = torch.Generator().manual_seed(4)
    h, down, up, embedding = (torch.randn(*s, generator=rng) for s in ((2, 5), (3, 5), (3, 8), (4, 3)))
    got = decode(h, down, up, embedding)
    for i in range(2):
        for layer in range(4):
            index = torch.eye(4)[layer]
            expected = slow.theta(torch.cat([h[i], index]), torch.cat([down, embedding.T], 1), up, (1, 8))
            torch.testing.assert_close(got[i, layer], expected[0], atol=1e-5, rtol=1e-5)


def test_parameter_counts() -> None:
    """Sheet 02: |phi_q| = 2 m d + m r sum(in + out); with a layer embedding each kind counts once, plus 2 m a layer."""
    d, m, r = 5, 3, 2
    count = lambda made: sum(p.numel() for p in made.parameters())  # noqa: E731
    assert count(generator(False)) == 2 * m * d + m * r * sum(i + o for i, o in SHAPES.values())
    assert count(generator(True)) == 2 * m * d + m * r * ((6 + 4) + (6 + 2)) + 2 * m * len(SHAPES)
    # The sheet's example: q and v of a 3B actor, d = 3584, r = 8, m = 128.
    actor = {f"{i}.q": (2048, 2048) for i in range(36)} | {f"{i}.v": (2048, 256) for i in range(36)}
    with torch.device("meta"):
        made = LoraGenerator(actor, 3584, 128, 8, True, None)  # type: ignore[arg-type]
    assert sum(p.numel() for p in (*made.up_a.values(), *made.up_b.values())) == 128 * 8 * 230_400 // 36
    assert made.work == 2 * 128 * 3584 + 128 * 8 * 230_400


def test_fresh_update_is_zero_and_lora_a_has_pefts_spread() -> None:
    shapes = {f"layers.{i}.q": (300, 200) for i in range(8)}
    for layer_embedding in (True, False):
        made = LoraGenerator(shapes, 256, 512, 8, layer_embedding, torch.Generator().manual_seed(0))
        h = latent(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)))
        factors = made(h)
        assert not any(bool(b.any()) for _, b in factors.values())
        spread = torch.stack([a for a, _ in factors.values()]).std().item()
        assert spread == pytest.approx((3 * 300) ** -0.5, rel=0.1)


def test_generator_forced_to_constants_is_the_static_adapter() -> None:
    """W_d = 0 and embedding l = unit vector l: row l of W_u is layer l's static factors, for every query."""
    made = generator(layer_embedding=True)
    static = {name: (torch.randn(2, i), torch.randn(o, 2)) for name, (i, o) in SHAPES.items()}
    for down in (made.down_a, made.down_b):
        down.data.zero_()
    for kind, names in made.kinds.items():
        for place, which in ((made.embedding_a, 0), (made.embedding_b, 1)):
            place[kind].data = torch.eye(len(names), 3)
            up = (made.up_a, made.up_b)[which][kind]
            up.data = torch.stack([static[n][which].flatten() for n in names] + [torch.zeros(up.shape[1])])
    factors = made(torch.randn(4, 5))
    for name, (lora_a, lora_b) in static.items():
        assert torch.equal(factors[name][0], lora_a.expand(4, -1, -1))
        assert torch.equal(factors[name][1], lora_b.expand(4, -1, -1))
