"""What joint tuning hands over: for each example a prompt that G writes and an adapter generated from G's lower layers.

Of the prompt method bpo it is the prompts alone. Also the two generations that training itself needs (prompts sampled,
adapters as they are now), so that a rollout and a final answer go through the same code. Knows nothing of losses or
schedules.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cotune.bench import Bench
from cotune.engines.base import Engine, Request, Sampling
from cotune.errors import UsageError
from cotune.ledger import Spent
from cotune.models.base import BaseModel
from cotune.models.lora import LoraFactors, PendingLora
from cotune.models.metatuner.generator import MetaTuner
from cotune.plans import loaded_plan, saved_plan
from cotune.rewrite import rewrite_messages
from cotune.tasks import task as make_task
from cotune.tasks.base import Task
from cotune.values import (
    GREEDY,
    AnyPlan,
    Completion,
    Conditioning,
    Demonstration,
    Example,
    Prompt,
    Tuned,
    Verifier,
)
from cotune.verifier import loaded_verifier

Branch = Literal["per-example", "fixed", "off"]
_WEIGHTS = "metatuner.safetensors"


@dataclass(frozen=True)
class Branches:
    """What each branch makes: one for every example (the method), one for all of them, or none.

    `adapter` off is the paper's ablation w/o F, `prompt` off its w/o P. "fixed" is ours: it shows what generating for
    each query is worth.
    """

    prompt: Branch = "per-example"
    adapter: Branch = "per-example"
    max_prompt_tokens: int = 128


@dataclass(frozen=True)
class MetaTuned(Tuned):
    """`seed` is p~, `settings` and `shapes` are what MetaTuner was made with, `actor` is the digest of M's weights.

    `adapter` answers every query where none is generated (ours: bpo beside a stage that tunes weights).
    """

    tuner: MetaTuner
    task: Task
    seed: Prompt
    branches: Branches
    generator: BaseModel
    actor: str
    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int]]
    plan: AnyPlan = GREEDY
    verifier: Verifier | None = None
    adapter: LoraFactors | None = None
    _engines: list[Engine] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def create(
        cls,
        task: Task,
        seed: Prompt,
        branches: Branches,
        generator: BaseModel,
        actor: str,
        settings: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, int]],
    ) -> MetaTuned:
        """With an untrained MetaTuner."""
        tuner = MetaTuner(generator, shapes, **settings)
        return cls(tuner, task, seed, branches, generator, actor, settings, shapes)

    def condition(self, examples: Sequence[Example], bench: Bench) -> list[Conditioning]:
        """p_i = G(p~, x_i), decoded greedily, and theta_i = F(p~, x_i) for each example.

        Where G writes nothing, or does not come to an end, p~ stands in; an event counts these. Nothing is generated
        twice for one query.
        """
        self._check_actor(bench)
        prompts = self.greedy_prompts(examples, bench)
        adapters = self.adapters(examples, bench)
        return [Conditioning(p, a, self.plan, self.verifier) for p, a in zip(prompts, adapters, strict=True)]

    def under(self, plan: AnyPlan, verifier: Verifier | None = None) -> MetaTuned:
        return replace(self, plan=plan, verifier=verifier)

    def greedy_prompts(self, examples: Sequence[Example], bench: Bench, frozen: bool = False) -> list[Prompt]:
        """One prompt per example from G_(phi_s, phi_p), or with `frozen` from G_(phi_s, phi_p')."""
        if self.branches.prompt == "off":
            return [self.seed] * len(examples)
        rows = self.sample_prompts(examples, Sampling(self.branches.max_prompt_tokens), bench, frozen)
        texts = [usable(row[0]) for row in rows]
        bench.emit(
            "generated_prompts",
            examples=len(examples),
            distinct=len(set(texts)),
            diversity=len(set(texts)) / max(1, len(texts)),
            fallbacks=texts.count(None),
            fixed=self.branches.prompt == "fixed",
            mean_tokens=sum(len(row[0].token_ids) for row in rows) / max(1, len(rows)),
        )
        return [self.seed if text is None else replace(self.seed, instruction=text) for text in texts]

    def sample_prompts(
        self, examples: Sequence[Example], sampling: Sampling, bench: Bench, frozen: bool = False
    ) -> list[list[Completion]]:
        """What G writes for each example, `sampling.n` times; the same for examples with the same query."""
        queries = [self.query(example, self.branches.prompt) for example in examples]
        distinct = list(dict.fromkeys(queries))
        with self.tuner.prompts.rewriter(frozen) as rewriter:
            written = bench.generate(
                [Request(query, rewriter.adapter) for query in distinct],
                sampling,
                base=self.generator,
                engine=self._engine(rewriter.base, bench),
                version=rewriter.version,
                part="prompts",
                label="prompts",
            )
        of = dict(zip(distinct, written, strict=True))
        return [of[query] for query in queries]

    def _engine(self, base: BaseModel, bench: Bench) -> Engine:
        """The engine of the network that G computes with, made once."""
        if base is bench.base:
            return bench.engine
        if not self._engines:
            self._engines.append(bench.make_engine(base))
        return self._engines[0]

    def adapters(self, examples: Sequence[Example], bench: Bench) -> Sequence[PendingLora | LoraFactors | None]:
        """theta_i of each example under the current weights; None where the update is zero (before any training).

        Examples with the same query share one adapter. Encoded here, decoded when a batch is answered; the FLOPs of
        both are booked here.
        """
        if self.branches.adapter == "off":
            return [self.adapter] * len(examples)
        if self.tuner.scaling == 0 or self.tuner.adapters.is_zero:
            return [None] * len(examples)
        latents_UD, which = self.encode(examples, bench)
        flops = self.tuner.decoding_flops(len(latents_UD))
        bench.ledger.allow(0, flops)
        began = time.perf_counter()
        pending = self.tuner.pending_at(latents_UD)
        bench.ledger.book(Spent(flops=flops, seconds=time.perf_counter() - began), "adapters")
        return [pending[i] for i in which]

    def encode(self, examples: Sequence[Example], bench: Bench) -> tuple[torch.Tensor, list[int]]:
        """h_i of each distinct query, [U, D], and which of them each example has; booked."""
        queries, which = self._queries(examples)
        tokens = sum(map(len, queries))
        flops = self.tuner.encoding_flops(tokens)
        bench.ledger.allow(0, flops)
        began = time.perf_counter()
        latents_UD = self.tuner.latents(queries)
        if latents_UD.is_cuda:
            torch.cuda.synchronize(latents_UD.device)  # so that the seconds are those of the work
        seconds = time.perf_counter() - began
        bench.ledger.book(Spent(encoded_tokens=tokens, flops=flops, seconds=seconds), "adapters")
        return latents_UD, which

    def latents(self, examples: Sequence[Example]) -> torch.Tensor:
        """h_i of each example as the adapter branch reads it, [B, D]; for diagnostics, so not booked."""
        queries, which = self._queries(examples)
        return self.tuner.latents(queries)[which]

    def _queries(self, examples: Sequence[Example]) -> tuple[list[list[int]], list[int]]:
        """The distinct tokenized queries of the adapter branch, and which of them each example has."""
        queries = [self.query(example, self.branches.adapter) for example in examples]
        index = {query: i for i, query in enumerate(dict.fromkeys(queries))}
        return [self.generator.encode(query) for query in index], [index[query] for query in queries]

    def adapters_at(self, latents_BD: torch.Tensor) -> list[LoraFactors | None]:
        """The adapter of each latent; None where the update is zero."""
        if self.branches.adapter == "off":
            return [self.adapter] * len(latents_BD)
        return [None if a.is_zero else a for a in self.tuner.adapters_at(latents_BD)]

    def sizes(self) -> dict[str, dict[str, int]]:
        sizes = self.tuner.sizes
        unused = {"prompt_decoder"} if self.branches.prompt == "off" else set()
        unused |= {"parameter_decoder", "adapter_encoder"} if self.branches.adapter == "off" else set()
        return {part: size for part, size in sizes.items() if part not in unused}

    def query(self, example: Example, branch: Branch) -> str:
        """(p~, x_i) as a branch reads it; p~ alone where it is fixed."""
        question = "" if branch == "fixed" else self.task.question_text(example)
        return self.generator.render(rewrite_messages(self.seed.instruction, question))

    def _check_actor(self, bench: Bench) -> None:
        if bench.base.digest != self.actor:
            raise UsageError(
                f"These adapters were learned for another model than {bench.base.name} (weights {self.actor}, "
                f"not {bench.base.digest}). Use the model of the run that made them."
            )

    def save(self, folder: Path) -> None:
        """`metatuner.safetensors` with phi_s, phi_p and phi_q, and `tuned.json` with what they mean; a verifier, and
        the one adapter for all in `adapter/`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.verifier:
            self.verifier.save(folder)
        if self.adapter:
            self.adapter.save(folder / "adapter")
        save_file({name: p.detach().cpu().contiguous() for name, p in self.tuner.parameters.items()}, folder / _WEIGHTS)
        content = {
            "kind": "metatuner",
            "task": self.task.name,
            "seed": asdict(self.seed),
            "branches": asdict(self.branches),
            "generator": {
                "name": self.generator.name,
                "source": self.generator.source,
                "revision": self.generator.revision,
                "digest": self.generator.digest,
            },
            "actor": self.actor,
            **({"adapter": True} if self.adapter else {}),
            "settings": dict(self.settings),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            **saved_plan(self.plan),
        }
        (folder / "tuned.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, content: Mapping[str, Any], generator: BaseModel) -> MetaTuned:
        """Raises UsageError when `generator` is not the one that was trained, or the weights file does not fit."""
        wanted = content["generator"]
        if generator.digest != wanted["digest"]:
            raise UsageError(
                f"The prompts of {folder} are written by {wanted['name']} (weights {wanted['digest']}), "
                f"but the generator given is {generator.name} (weights {generator.digest}). Give --generator "
                f"{wanted['name']}."
            )
        demonstrations = tuple(Demonstration(**d) for d in content["seed"]["demonstrations"])
        tuned = cls.create(
            make_task(content["task"]),
            Prompt(content["seed"]["instruction"], demonstrations),
            Branches(**content["branches"]),
            generator,
            content["actor"],
            content["settings"],
            {name: (shape[0], shape[1]) for name, shape in content["shapes"].items()},
        )
        try:
            tensors = load_file(folder / _WEIGHTS)
            tuned.tuner.load(tensors)
        except (FileNotFoundError, SafetensorError, KeyError, RuntimeError) as error:
            raise UsageError(f"{folder / _WEIGHTS} is missing or damaged ({error}); run the tuning again.") from None
        plan = loaded_plan(content)
        adapter = LoraFactors.load(folder / "adapter") if content.get("adapter") else None
        return replace(tuned.under(plan, loaded_verifier(folder, plan)), adapter=adapter)


def usable(completion: Completion) -> str | None:
    """The instruction in what G wrote; None if it is empty or was cut off."""
    text = completion.text.strip()
    return None if completion.truncated or not text else text
