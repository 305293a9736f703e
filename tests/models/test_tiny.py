"""The shipped tiny models: format, size, tokenizer, obedience to instructions, rewriting; and the recipe in small."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotune.models.tiny import TINY_MODELS, calibrate, corpus, instructions, recipe
from cotune.rewrite import REWRITE_INSTRUCTION, rewrite_messages
from cotune.tasks.micro import MicroGsm8k
from cotune.values import Outcome

SIZES = {"tiny": (0.8e6, 1.3e6), "tiny-4m": (3.3e6, 4.5e6)}


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    folder = TINY_MODELS["tiny"]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_shipped_checkpoints_are_plain_qwen2_folders(name: str) -> None:
    folder = TINY_MODELS[name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    low, high = SIZES[name]
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert low < sum(p.numel() for p in model.parameters()) < high
    assert model.config.num_hidden_layers >= 4  # MetaTuner shares K/4 to 3K/4 of the layers
    assert model.config.max_position_embeddings >= 8192
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size
    notes = json.loads((folder / "recipe.json").read_text())
    assert notes["cycles_done"] == len(recipe.RECIPES[name].cycles)
    assert notes["recipe"] == json.loads(json.dumps(asdict(recipe.RECIPES[name])))


def test_both_checkpoints_together_are_at_most_16_mb() -> None:
    files = [f for folder in TINY_MODELS.values() for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jinja"}


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = _tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)  # transformers gives Qwen2 that normaliser


def _tokenizer() -> Any:
    if "tokenizer" not in _CACHE:
        _CACHE["tokenizer"] = AutoTokenizer.from_pretrained(TINY_MODELS["tiny"])
    return _CACHE["tokenizer"]


_CACHE: dict[str, Any] = {}


def test_digits_are_single_tokens() -> None:
    pieces = _tokenizer().tokenize("12+345=357")
    assert pieces == ["1", "2", "+", "3", "4", "5", "=", "3", "5", "7"]


def test_the_template_is_what_the_model_was_trained_on() -> None:
    tokenizer = _tokenizer()
    for chat in itertools.islice(corpus.chats("mixture", 3), 30):
        ids, weights = recipe.encode(tokenizer, chat, 0.0)
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
        assert tokenizer.encode(rendered, add_special_tokens=False) == ids
        learned = tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w])
        assert learned == "".join(m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant")


def test_the_corpus_is_seeded_and_has_no_benchmark_question() -> None:
    first = list(itertools.islice(corpus.chats("mixture", 0), 400))
    assert first == list(itertools.islice(corpus.chats("mixture", 0), 400))
    assert first != list(itertools.islice(corpus.chats("mixture", 1), 400))
    seen = {m["content"] for chat in first for m in chat if m["role"] == "user"}
    for kind in calibrate.TASKS:
        task = kind()
        assert not seen & {task.question_text(e) for e in calibrate.examples(task, "test", 300)}


def test_every_completion_of_the_corpus_states_the_reference() -> None:
    """Whatever the reasoning and form: at difficulty 0 only wordings differ, never the answer."""
    for family, kind in instructions.FAMILIES.items():
        task = kind()
        for item in itertools.islice(corpus.items(family, 4), 12):
            for reasoning, form in itertools.product(instructions.REASONINGS, instructions.FORMS[family]):
                text = corpus.completion(item, reasoning, form)
                assert corpus.final(item, form) in text
                # the official HotpotQA metric reads everything unmarked as the answer, so reasoning costs it there
                unmarked = family == "hotpotqa" and form == "short" and reasoning != "none"
                if reasoning != "after" and not unmarked:
                    assert task.grade(item.example, text).outcome is Outcome.CORRECT, text


def test_drills_answer_every_key_from_the_text() -> None:
    kinds = set()
    for chat in itertools.islice(corpus.drills(0), 200):
        text, _, first = chat[1]["content"].rpartition("\n\n")
        asks = [first, *(m["content"] for m in chat[3::2])]
        for ask, answer in zip(asks, (m["content"] for m in chat[2::2]), strict=True):
            kind, _, keys = ask.partition(": ")
            kinds.add(kind)
            for line in answer.split("\n"):
                key, *value = [line] if kind == "Quote" else line.split(": ")
                assert all(part in text for part in (key, *value))
                assert any(word in key for word in keys.split(", "))  # what was asked for is said again
    assert kinds == {"Letter", "Choice", "Quote"}


def test_copies_repeat_their_text() -> None:
    for _, user, assistant in itertools.islice(corpus.copies(0), 20):
        assert user["content"] == assistant["content"]
        assert 10 <= len(user["content"].split()) <= 40


def test_instructions_differ_by_behaviour_and_have_no_open_braces() -> None:
    rng = random.Random(0)
    for family in instructions.FAMILIES:
        made = [instructions.any_instruction(rng, family) for _ in range(300)]
        assert len(set(made)) > 250
        assert not any("|" in text or "{" in text.replace("\\boxed{}", "") for text in made)
        assert len(instructions.INSTRUCTIONS[family]) == len(set(instructions.INSTRUCTIONS[family])) == 12
        assert instructions.FAMILIES[family].seed_instruction not in instructions.INSTRUCTIONS[family]


def test_a_step_by_step_instruction_beats_a_direct_one(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    task = MicroGsm8k()
    rows = calibrate.examples(task, "val", 60)
    steps = calibrate.accuracy(model, tokenizer, task, rows, "Think step by step, then write the answer after ####.")
    direct = calibrate.accuracy(model, tokenizer, task, rows, "Give only the answer after ####.")
    assert steps >= direct + 15


def test_rewriting_gives_diverse_instructions(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    task = MicroGsm8k()
    rows = calibrate.examples(task, "val", 24)
    assert rewrite_messages("Old.", "What?")[0]["content"] == REWRITE_INSTRUCTION
    prompts = [
        tokenizer.apply_chat_template(
            rewrite_messages(task.seed_instruction, task.question_text(e)), tokenize=False, add_generation_prompt=True
        )
        for e in rows
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    made = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=1.0, top_k=0)
    texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rng = random.Random(0)
    words = Counter(
        w for f in instructions.FAMILIES for _ in range(3000) for w in instructions.any_instruction(rng, f).split()
    )
    known = [all(w in words for w in text.split()) for text in texts]
    assert len(set(texts)) > 20
    assert sum(known) >= 16  # most are made of the bank's words; sampling may slip


def test_the_recipe_makes_a_loadable_model_that_learns(tmp_path: Path) -> None:
    cycles = (
        recipe.Cycle(3e-3, (("reading", 50_000), ("mixture", 60_000)), warmup=10_000),
        recipe.Cycle(1e-3, (("finish", 30_000),), warmup=5_000),
    )
    small = replace(
        recipe.RECIPES["tiny"], hidden_size=32, heads=2, kv_heads=1, layers=4, intermediate_size=64,
        cycles=cycles, store="bfloat16", vocab_size=400, tokenizer_chats=200,
    )  # fmt: skip
    recipe.make(small, tmp_path / "a")
    recipe.make(replace(small, cycles=cycles[:1]), tmp_path / "half")
    recipe.make(small, tmp_path / "b", begun=tmp_path / "half")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert len(tokenizer) == 400 == model.config.vocab_size
    assert json.loads((tmp_path / "a/recipe.json").read_text())["final_loss"] < 5.7  # ln 400 = 5.99


def test_a_fresh_model_looks_back_by_one_to_four_tokens() -> None:
    """Attention of the first layer, by the library's own code, on a text in which every token is the same."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODELS["tiny"])
    model = recipe.make_model(recipe.RECIPES["tiny"], tokenizer)
    model.set_attn_implementation("eager")
    ids = torch.full((1, 24), 7)
    (first, *_) = model(input_ids=ids, output_attentions=True).attentions
    for head, weights in enumerate(first[0]):
        assert weights[10:].argmax(-1).tolist() == [position - head - 1 for position in range(10, 24)]


def test_the_calibration_table_says_whether_the_properties_hold() -> None:
    good = calibrate.Calibration("tiny", "micro-gsm8k", 500, 20.0, (20.0,) * 11 + (45.0,), 50.0)
    assert good.holds and not replace(good, lora=29.0).holds and not replace(good, lora=96.0).holds
    assert not replace(good, seed=46.0).holds and not replace(good, instructions=(20.0,) * 12).holds
    text = calibrate.table([good])
    assert "| tiny | micro-gsm8k | 20.0 | 45.0 | 20.0 | 25.0 | 50.0 | yes |" in text
