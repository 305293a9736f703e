import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from cotune.models.attention import GROUPED, share_keys
from cotune.models.base import load


@pytest.fixture(params=["float32", "bfloat16"])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, request.param))
    return made.train(False).requires_grad_(False)


def padded(rows, width):
    """Left-padded ids and mask of random rows with 1 to `width` tokens."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (rows, width), generator=rng)
    length_B = torch.randint(1, width + 1, (rows,), generator=rng)
    length_B[0] = width
    return ids, (torch.arange(width) >= width - length_B[:, None]).long()


def logits_of(model, ids, mask):
    """Of a prompt and of a next token read from the cache."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        first = model(input_ids=ids, attention_mask=mask, position_ids=positions)
        longer = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        second = model(
            input_ids=ids[:, :1],
            attention_mask=longer,
            position_ids=positions[:, -1:] + 1,
            past_key_values=first.past_key_values,
        )
    return torch.cat([first.logits, second.logits], dim=1)


@pytest.fixture
def shared(monkeypatch):
    """Whether each call of torch's attention was told that heads share keys."""
    calls, own = [], functional.scaled_dot_product_attention

    def attend(*tensors, **options):
        calls.append(options.get("enable_gqa", False))
        return own(*tensors, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    return calls


@pytest.mark.parametrize("rows, width", [(2, 7), (5, 33), (64, 90)])
def test_shared_keys_give_the_bits_of_transformers_own_attention(model, rows, width, shared):
    ids, mask = padded(rows, width)
    expected = logits_of(model, ids, mask)
    assert shared == [False] * 4
    share_keys(model)
    assert torch.equal(logits_of(model, ids, mask), expected)
    assert shared == [False] * 4 + [True] * 4


def test_training_keeps_transformers_own_attention(shared):
    model = load("tiny", device="cpu").model
    assert model.config._attn_implementation == GROUPED
    model(input_ids=torch.ones(2, 5, dtype=torch.long), attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1] * 5]))
    assert shared == [False] * model.config.num_hidden_layers


def test_other_attention_is_left_alone(model):
    model.set_attn_implementation("eager")
    share_keys(model)
    assert model.config._attn_implementation == "eager"
