"""What a tiny model can do before anything is tuned: the calibration table of docs/tiny-model.md.

    python -m cotune.models.tiny.calibrate            # both shipped sizes, written into docs/tiny-model.md
    python -m cotune.models.tiny.calibrate --model FOLDER   # any checkpoint, printed only

For each micro task: the seed instruction, twelve other instructions, and a LoRA trained on 1,000 gold completions
under the seed instruction, all on the same test rows, greedy. It is deliberately not a strategy: it uses neither
cotune's engine nor its training loop, so that the instrument is checked without what it will measure.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cotune.models.tiny import TINY_MODELS
from cotune.models.tiny.instructions import INSTRUCTIONS
from cotune.tasks.micro import MicroCosmosQA, MicroGsm8k, MicroHotpotQA, MicroMath
from cotune.values import Example, Outcome, Prompt

MicroTask = MicroGsm8k | MicroMath | MicroHotpotQA | MicroCosmosQA
TASKS: tuple[type[MicroTask], ...] = (MicroGsm8k, MicroMath, MicroHotpotQA, MicroCosmosQA)
BEGIN, END = "<!-- calibration: begin -->", "<!-- calibration: end -->"


@dataclass(frozen=True)
class Calibration:
    """Percent of test rows answered correctly on one task."""

    model: str
    task: str
    rows: int
    seed: float
    instructions: tuple[float, ...]  # in the order of instructions.INSTRUCTIONS
    lora: float

    @property
    def holds(self) -> bool:
        """The four properties that the instrument must have (docs/tiny-model.md)."""
        return (
            10 <= self.seed <= 45
            and max(self.instructions) - min(self.instructions) >= 20
            and self.lora >= self.seed + 10
            and max(self.seed, self.lora, *self.instructions) <= 95
        )


def examples(task: MicroTask, split: str, count: int) -> list[Example]:
    return [task.parse(row, str(i)) for i, row in enumerate(task.generate_rows(split, count))]


@torch.inference_mode()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int, batch: int = 128
) -> list[tuple[str, bool]]:
    """Greedy completions in the order of `prompts`, each with whether it ran into `limit` tokens."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[tuple[str, bool]] = [("", False)] * len(prompts)
    generate: Any = model.generate
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
        made = generate(**inputs, max_new_tokens=limit, do_sample=False)
        for i, ids in zip(rows, made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ended = tokenizer.eos_token_id in ids
            found[i] = (str(tokenizer.decode(ids, skip_special_tokens=True)), not ended)
    return found


def rendered(tokenizer: PreTrainedTokenizerBase, task: MicroTask, example: Example, instruction: str) -> str:
    chat = task.messages(Prompt(instruction), example)
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: MicroTask,
    rows: Sequence[Example],
    instruction: str,
) -> float:
    """Percent correct under `instruction`."""
    prompts = [rendered(tokenizer, task, e, instruction) for e in rows]
    answers = complete(model, tokenizer, prompts, task.max_new_tokens)
    graded = [task.grade(e, text, truncated) for e, (text, truncated) in zip(rows, answers, strict=True)]
    return 100 * sum(g.outcome is Outcome.CORRECT for g in graded) / len(graded)


def train_lora(
    folder: Path, task: MicroTask, rows: Sequence[Example], epochs: int = 5, batch: int = 16, rate: float = 3e-3
) -> Any:
    """Rank 8 on all linear layers, loss on the completion only, linear decay; a fresh model with the adapter merged."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    encoded = []
    for e in rows:
        prompt = rendered(tokenizer, task, e, task.seed_instruction)
        answer = task.reference_completion(e) + tokenizer.eos_token
        asked, wanted = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))
        encoded.append((asked + wanted, len(asked)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    rng = random.Random(0)
    steps = epochs * (len(encoded) // batch)
    for step in range(steps):
        if step % (len(encoded) // batch) == 0:
            rng.shuffle(encoded)
            encoded.sort(key=lambda pair: len(pair[0]) + rng.random() * 20)  # batches of similar length
            starts = list(range(0, len(encoded) - batch + 1, batch))
            rng.shuffle(starts)
        chosen = encoded[starts[step % len(starts)] :][:batch]
        batch_ids, labels = _padded(chosen, int(tokenizer.pad_token_id or 0))
        logits = model(input_ids=batch_ids[:, :-1], use_cache=False).logits
        loss: Any = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.merge_and_unload().eval()


def _padded(pairs: Sequence[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels [B, T]; labels of the prompt and the padding are -100."""
    longest = max(len(ids) for ids, _ in pairs)
    ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in pairs])
    labels = torch.tensor([[-100] * n + i[n:] + [-100] * (longest - len(i)) for i, n in pairs])
    return ids, labels


def calibrate(name: str, folder: Path, task: MicroTask, count: int, train_count: int) -> Calibration:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    test = examples(task, "test", count)
    seed = accuracy(model, tokenizer, task, test, task.seed_instruction)
    others = []
    for instruction in INSTRUCTIONS[task.name.removeprefix("micro-")]:
        others.append(accuracy(model, tokenizer, task, test, instruction))
        print(f"{name} {task.name} {others[-1]:5.1f} {instruction}", file=sys.stderr)
    lora = 0.0
    if train_count:
        tuned = train_lora(folder, task, examples(task, "train", train_count))
        lora = accuracy(tuned, tokenizer, task, test, task.seed_instruction)
    result = Calibration(name, task.name, count, seed, tuple(others), lora)
    print(f"{name} {task.name} seed {seed:.1f} lora {lora:.1f} holds {result.holds}", file=sys.stderr)
    return result


def table(results: Sequence[Calibration]) -> str:
    """The two Markdown tables: the properties, and every instruction by itself."""
    lines = [
        "| model | task | seed prompt | best of 12 | worst of 12 | spread | LoRA, seed prompt | all four hold |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in results:
        best, worst = max(r.instructions), min(r.instructions)
        lines.append(
            f"| {r.model} | {r.task} | {r.seed:.1f} | {best:.1f} | {worst:.1f} | {best - worst:.1f} | {r.lora:.1f} "
            f"| {'yes' if r.holds else 'no'} |"
        )
    models = list(dict.fromkeys(r.model for r in results))
    for task in dict.fromkeys(r.task for r in results):
        lines += ["", f"| {task} | " + " | ".join(models) + " |", "| --- |" + " ---: |" * len(models)]
        for i, text in enumerate(INSTRUCTIONS[task.removeprefix("micro-")]):
            scores = [next(r for r in results if (r.model, r.task) == (m, task)).instructions[i] for m in models]
            lines.append(f"| {text} | " + " | ".join(f"{s:.1f}" for s in scores) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a tiny model can do before anything is tuned.")
    parser.add_argument("--model", type=Path, help="a checkpoint folder (default: both shipped sizes)")
    parser.add_argument("--task", choices=[t.name for t in TASKS])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--train-rows", type=int, default=1000, help="0: no LoRA")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--docs", type=Path, help="Markdown file whose marked part is replaced by the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    models = {str(given.model): given.model} if given.model else TINY_MODELS
    tasks = [t() for t in TASKS if given.task in (None, t.name)]
    results = [calibrate(n, f, t, given.rows, given.train_rows) for n, f in models.items() for t in tasks]
    if given.json:
        print(json.dumps([r.__dict__ | {"holds": r.holds} for r in results], indent=2))
    elif given.docs:
        head, _, rest = given.docs.read_text().partition(BEGIN)
        given.docs.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}")
    else:
        print(table(results))


if __name__ == "__main__":
    main()
