"""Every setting and every default of cotune, in one place.

A config is resolved in layers, later ones winning: the class defaults below (the papers' values where a paper
gives one), the profile of the model (only the packaged tiny models have one), the TOML file, `--set a.b=c`,
the command line's own flags. The result is frozen, and its resolved JSON is what a run records.

Knows nothing of how any setting is used.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cotune.errors import UsageError
from cotune.plugins import nearest
from cotune.values import GREEDY, Aggregation, InferencePlan, digest

TargetModules = Literal["all-linear"] | tuple[str, ...]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)


class DecodingConfig(Section):
    """How every strategy's answers are decoded, in the search and on the test split alike."""

    temperature: float = Field(0.0, ge=0, le=5, description="0 is greedy")
    top_p: Rate = 1.0
    max_new_tokens: Positive | None = Field(None, description="tokens; empty: the task's own limit")


class EngineConfig(Section):
    """How the base model is run. Changes speed and memory, not results (up to near-ties)."""

    batch_size: Positive = Field(32, description="rows per forward pass")
    max_batch_tokens: Positive = Field(32768, description="rows x (prompt + new) tokens per forward pass")
    threads: Positive | None = Field(
        None, description="CPU threads; empty: one for models below 50M parameters (measured), else torch's choice"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="training keeps one input per layer and computes the rest again: less memory, one more forward "
        "pass (not counted in the FLOPs), the same results",
    )
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class VllmConfig(Section):
    """The vllm engine alone (all ours)."""

    sequences: Positive = Field(256, description="rows decoded at once")
    adapters: Positive | None = Field(
        None, description="different adapters among them; more are served in turn; empty: as many as fit adapter_gib"
    )
    adapter_gib: float = Field(1.0, gt=0, description="memory of those adapters, GiB, of the GPU's fraction")
    tensor_parallel: Positive = Field(1, description="GPUs that share one model")
    memory_fraction: float = Field(0.45, gt=0, le=1, description="of the GPU; the model being tuned lies there too")
    cache_gib: float = Field(1.0, gt=0, description="key-value cache on a CPU, GiB")
    max_length: Positive | None = Field(None, description="tokens of prompt and completion; empty: the model's context")
    quantization: str | None = Field(None, description="as vLLM names it, for example fp8; empty: none")
    own_process: bool | None = Field(
        None,
        description="empty: on a GPU, where a fault spoils it for training too; on a CPU it starts three times slower",
    )
    between: Literal["keep", "sleep", "stop"] | None = Field(
        None,
        description="its memory while weights are trained; empty: sleep on a GPU, keep on a CPU (which has no sleep)",
    )
    residents: Literal["both", "in turn"] = Field(
        "both", description="generator and actor in memory together, or one put away while the other generates"
    )


def _no_secret(url: str) -> str:
    """A config is written down and printed, so an address may not carry a password or a key."""
    if "@" in url.partition("//")[2].partition("/")[0] or "?" in url:
        raise PydanticCustomError(
            "secret", "a server's address takes no user, password or query. Keys come from OPENAI_API_KEY alone"
        )
    return url


class OpenAIConfig(Section):
    """The openai engine; what is of the client also for the proposer openai:BASE_URL#MODEL (all ours).

    The key comes from the environment variable OPENAI_API_KEY and is written nowhere.
    """

    base_url: str | None = Field(
        None, description="address of the server, usually ending in /v1, for example http://localhost:8000/v1"
    )
    concurrency: int = Field(8, ge=1, le=256, description="requests at a time")
    requests_per_minute: Positive | None = Field(None, description="of one run; empty: no limit")
    tokens_per_minute: Positive | None = Field(None, description="of one run, read and written; empty: no limit")
    timeout: float = Field(120.0, gt=0, le=3600, description="seconds that one request may take")
    attempts: int = Field(5, ge=1, le=20, description="of one request, with waits of 1, 2, 4 ... seconds between them")
    longest_wait: float = Field(
        120.0, gt=0, le=3600, description="seconds between attempts; a server that asks for more ends the run"
    )
    context_length: Positive | None = Field(
        None,
        description="tokens of prompt and answer, with every byte of a prompt taken for a token: longer prompts are "
        "not tried; empty: what the server says (vLLM does), else no limit",
    )
    limit_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the server calls the most tokens of an answer (newer hosted models: the latter)"
    )

    @field_validator("base_url")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is not None and not _no_secret(value).startswith(("http://", "https://")):
            raise ValueError("an address starts with http:// or https://")
        return value

    def client(self) -> dict[str, Any]:
        """Those settings that are of the client (openai_client.py), whichever server it asks."""
        return self.model_dump(exclude={"base_url", "context_length", "limit_name"})


class BudgetConfig(Section):
    """Limits on tuning cost (measuring on the test split is free). Empty means no limit."""

    tokens: Count | None = Field(None, description="prompt + generated + trained tokens")
    flops: Annotated[float, Field(ge=0)] | None = Field(None, description="by the ledger's formula")
    seconds: Annotated[float, Field(ge=0)] | None = Field(
        None, description="of generating and training; the batch or step that passes the limit is finished"
    )
    matched: str | None = Field(
        None, description="whose spending `tokens` is (written by `study --match-budget`); limits nothing by itself"
    )


class PromptConfig(Section):
    """Prompt search: one of the methods of the field, and what they have in common (docs/baselines.md)."""

    method: str = Field(
        "opro+bootstrap",
        description="opro | bootstrap (BetterTogether) | opro+bootstrap | cfpo | rlprompt | bpo | mipro | gepa (the "
        "last two are extras)",
    )
    proposer: str = Field("self", description="self | edits | model:NAME | openai:BASE_URL#MODEL")
    rounds: Count = Field(
        6,
        description="how often the method repeats (ours; OPRO runs up to 200 steps): opro a round of candidates, "
        "bootstrap a round of demonstration sets (paper: 1), mipro a round of trials, gepa a round of mutations, "
        "cfpo a round of contents and one of formats in turn, rlprompt rlprompt.steps steps of learning, "
        "bpo a round of own completions to learn from",
    )
    candidates: Positive = Field(
        8,
        description="proposals per round (OPRO); mipro: instructions, and trials per round; gepa: mutations per round; "
        "cfpo: contents, and formats after the round that tries all of them",
    )
    history: Positive = Field(20, description="earlier instructions shown to the proposer (OPRO)")
    exemplars: Count = Field(3, description="training questions shown to the proposer (OPRO)")
    temperature: float = Field(1.0, ge=0, le=5, description="of the proposer (OPRO)")
    max_characters: Positive | None = Field(
        None,
        description="longer instructions are rejected; empty: 500 (OPRO), with gepa 4000 (ours: it collects advice), "
        "with cfpo 2000 (ours: three parts and their layout)",
    )
    demonstrations: Count = Field(3, description="at most, per prompt (BetterTogether); 0: instructions alone")
    demonstration_sets: Count = Field(6, description="random sets tried (BetterTogether); 0: instructions alone")
    search_examples: Positive = Field(100, description="train examples that drive the search (BetterTogether)")
    choice_examples: Positive = Field(250, description="val examples that choose the winner (BetterTogether)")
    racing: Literal[True, False, "adaptive"] = Field(
        True,
        description="drop candidates that a paired test shows to be behind (ours); adaptive: run what decides, "
        "and tell the other scores from alike prompts, for a third of the rollouts; false: all run on all examples",
    )
    minibatch: Positive = Field(
        16, description="examples a candidate runs on at first, and a trial of mipro (ours; DSPy: 35)"
    )
    reflection_minibatch: Positive = Field(
        3, description="answers that a mutation of gepa (GEPA) or a diagnosis of cfpo (ours) is told of"
    )
    beam: Positive = Field(8, description="the best prompts, which a content round of cfpo rewrites (CFPO)")
    finalists: Positive = Field(4, description="candidates scored on the val examples (ours)")

    @field_validator("proposer")
    @classmethod
    def _no_secret_in_an_address(cls, value: str) -> str:
        return _no_secret(value) if value.startswith("openai:") else value

    @model_validator(mode="after")
    def _an_adaptive_race_is_for_methods_that_race(self) -> Self:
        if self.racing == "adaptive" and self.method in ("mipro", "gepa", "bpo"):
            raise ValueError(f"{self.method} does not race, so prompt.racing = 'adaptive' is not for it; leave it true")
        return self

    @property
    def longest(self) -> int:
        """Characters that an instruction may have."""
        return self.max_characters or {"gepa": 4000, "cfpo": 2000}.get(self.method, 500)


class RlpromptConfig(Section):
    """prompt.method = "rlprompt": token prompts by soft Q-learning. Values are RLPrompt's (sheet 10) unless said."""

    tokens: Positive = Field(5, description="of a prompt")
    samples: int = Field(16, ge=2, description="prompts sampled in each step, with prompt.minibatch examples (ours)")
    top_k: Positive = Field(256, description="a token is drawn among so many")
    hidden: Positive = Field(2048, description="width of the trained network")
    steps: Positive = Field(2000, description="in each of prompt.rounds rounds: with 6 of them the paper's 12,000")
    try_every: Positive = Field(10, description="steps between greedy prompts, which are tried when the round ends")
    learning_rate: Rate = 5e-5
    max_grad_norm: Annotated[float, Field(gt=0)] = 5.0
    polyak: Rate = Field(0.001, description="share of the network that goes into its target after each step")
    reward_scale: Annotated[float, Field(gt=0)] = Field(5.0, description="reward of one standard deviation of score")
    checkpoint_every: Positive = Field(50, description="steps (ours)")


class BpoConfig(Section):
    """prompt.method = "bpo": a rewriter of the instruction for each question (BPO, sheet 10).

    The rewriter is the generator; `joint.generator_training` and `joint.generator_rank` say what of it is trained.
    """

    samples: int = Field(8, ge=2, description="own completions of each teaching example, in each round (ours)")
    temperature: float = Field(1.0, gt=0, le=5, description="of those samples (ours)")
    proposer_temperature: float = Field(0.9, ge=0, le=5, description="of the proposer that improves instructions (BPO)")
    max_prompt_tokens: Positive = Field(128, description="longest instruction that is written (ours)")
    epochs: Positive = Field(3, description="passes over the improved instructions (BPO)")
    learning_rate: Rate = Field(2e-4, description="ours, for LoRA; BPO has 2e-5 for all weights")
    batch_size: Positive = Field(32, description="instructions per optimizer step (BPO: 4 on each of 8 GPUs)")
    micro_batch_size: Positive = Field(4, description="of them per forward pass; the result does not depend on it")
    warmup: float = Field(
        0.1, ge=0, le=1, description="fraction of steps (BPO); linear, then cosine decay (BPO: linear)"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="ours")
    checkpoint_every: Positive = Field(50, description="optimizer steps (ours)")


# What a method's own paper says where it differs from the class defaults below. The number of samples is ours for all
# four (DeepSeekMath: 64). At temperature 1 completions differ, and policy gradients need the model's own distribution.
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"samples": 8, "temperature": 1.0, "top_p": 1.0, "beta": 0.1},  # Rafailov et al. 2023
    "kto": {"samples": 8, "temperature": 1.0, "top_p": 1.0, "beta": 0.1},  # Ethayarajh et al. 2024
    "grpo": {"samples": 8, "temperature": 1.0, "top_p": 1.0, "beta": 0.04, "updates": 1},  # Shao et al. 2024
    "ppo": {"samples": 8, "temperature": 1.0, "top_p": 1.0, "beta": 0.02, "updates": 4},  # Ouyang 2022, Ziegler 2019
}


class WeightsConfig(Section):
    """LoRA fine-tuning (sheet 01) by one of six methods (docs/baselines.md)."""

    method: Literal["sft", "rft", "dpo", "kto", "grpo", "ppo"] = Field(
        "sft",
        description="sft: reference solutions; rft: own completions that the grader accepts (BetterTogether); dpo and "
        "kto: own right and wrong completions; grpo and ppo: the task's score as reward. The default is the data of "
        "joint, so that every strategy learns from the same completions (ours)",
    )
    samples: Positive = Field(
        1, description="own completions sampled per train example (all but sft; grpo, ppo: in each epoch)"
    )
    temperature: float = Field(0.1, ge=0, le=5, description="of those samples (BetterTogether; dpo to ppo: 1)")
    top_p: Rate = Field(0.97, description="of those samples (BetterTogether; dpo to ppo: 1)")
    beta: float = Field(
        0.1,
        ge=0,
        description="pull towards the model before training: beta of dpo and kto (0.1 in their papers), weight of the "
        "KL in grpo (0.04, DeepSeekMath) and ppo (0.02, InstructGPT)",
    )
    updates: Positive = Field(
        1, description="optimizer steps on each batch of rollouts (grpo: 1, DeepSeekMath; ppo: 4, Ziegler et al. 2019)"
    )
    clip_range: float = Field(0.2, gt=0, lt=1, description="epsilon of grpo and ppo (Schulman et al. 2017)")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="of ppo's advantages (Ziegler et al. 2019)")
    variant: Literal["lora", "rslora", "dora"] = Field(
        "lora",
        description="rslora: scaling = alpha / sqrt(rank) (Kalajdzievski 2023); dora: a trained magnitude for each "
        "output of each layer beside the factors (Liu et al. 2024), on the transformers engine alone",
    )
    rank: Positive = Field(32, description="BetterTogether")
    alpha: Annotated[float, Field(gt=0)] = Field(64.0, description="scaling = alpha / rank (BetterTogether)")
    target_modules: TargetModules = Field(("q_proj", "k_proj"), description="BetterTogether")
    epochs: Count = Field(5, description="passes over what is learned from; grpo, ppo: over train (BetterTogether)")
    learning_rate: Rate = Field(1e-5, description="BetterTogether")
    batch_size: Positive = Field(
        8, description="per optimizer step: completions, pairs (dpo), or questions (grpo, ppo) (BetterTogether)"
    )
    micro_batch_size: Positive = Field(
        8,
        description="of them (grpo, ppo: completions; kto: always the batch) per forward pass; the result does "
        "not depend on it",
    )
    warmup: float = Field(0.1, ge=0, le=1, description="fraction of steps; linear, then cosine decay (ours)")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="ours")
    checkpoint_every: Positive = Field(
        50, description="optimizer steps between checkpoints (grpo, ppo: batches of rollouts)"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, given: Any) -> Any:
        """The method's own defaults, under what is given."""
        return METHODS.get(str(given.get("method")), {}) | given if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _sampled_as_the_method_needs(self) -> Self:
        if self.method in ("dpo", "grpo") and self.samples < 2:
            raise ValueError(f"{self.method} compares completions of one question, so samples must be 2 or more")
        if self.method in ("dpo", "kto") and self.beta == 0:
            raise ValueError(f"with beta = 0 {self.method} has no gradient; 0.1 is its paper's value")
        if self.method in ("grpo", "ppo") and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError(f"{self.method} needs the model's own distribution: temperature = 1 and top_p = 1")
        return self

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)


class PlanConfig(Section):
    """The inference plan that answers are given under, by every strategy alike (docs/inference.md).

    A prompt search scores by it too; what weights learn from, and MetaTuner's rollouts, are single completions.
    """

    aggregation: Aggregation = Field(
        "greedy",
        description="greedy: one completion, decoded as `decoding` says; majority: the answer that most of the samples "
        "give; best-of: the one with the highest score; weighted-best-of: the largest sum of scores",
    )
    samples: Positive = Field(1, description="completions of each question; greedy: 1")
    # Left out where it is the default, so that runs without chains keep the digests they had before there were any.
    chain: Positive = Field(
        1,
        exclude_if=lambda chain: chain == 1,
        description="attempts in a row, each in sight of the latest 4 before it (paper); divides samples. 1: parallel",
    )
    scorer: str | None = Field(
        None,
        description="of best-of and weighted-best-of: log-probability | self-consistency | verifier (trained by the "
        "run); empty: log-probability",
    )
    temperature: float = Field(0.7, ge=0, le=5, description="of the samples (self-consistency, Wang et al. 2023)")
    top_p: Rate = Field(1.0, description="of the samples (ours)")

    @model_validator(mode="after")
    def _one_if_greedy(self) -> Self:
        if self.aggregation == "greedy" and self.samples > 1:
            raise ValueError("greedy is one completion; with samples > 1 choose majority, best-of or weighted-best-of")
        if self.samples % self.chain:
            raise ValueError(
                f"{self.samples} samples cannot be chains of {self.chain} attempts each; chain must divide samples"
            )
        return self

    @property
    def value(self) -> InferencePlan:
        if self.aggregation == "greedy":
            return GREEDY
        scorer = self.scorer if self.aggregation == "majority" else self.scorer or "log-probability"
        return InferencePlan(self.aggregation, self.samples, scorer, self.temperature, self.top_p, self.chain)


class SequentialConfig(Section):
    """BetterTogether, Algorithm 1 (sheet 01)."""

    stages: str = Field(
        "p,w,p", description="p (prompt), w (weights) and i (inference plan) in any order; or j,i: joint, then the plan"
    )
    restart: bool = Field(True, description="a later p starts from the original prompt (paper), else from the last one")
    drop_demonstrations: bool = Field(True, description="train on the prompt without its demonstrations")

    @field_validator("stages")
    @classmethod
    def _stages(cls, value: str) -> str:
        stages = [s.strip() for s in value.split(",")]
        if stages != ["j", "i"] and any(s not in ("p", "w", "i") for s in stages):
            raise ValueError("stages are p, w and i joined by commas, for example p,w,p or p,w,i; or they are j,i")
        return ",".join(stages)


class JointConfig(Section):
    """MetaTuner (sheet 02). The paper's hyper-parameters are unknown: every value here is ours unless said."""

    variant: Literal["sum", "alternating"] = Field(
        "sum", description="MetaTuner-J: both terms in every step; MetaTuner-I: in turn"
    )
    alternate_every: Positive = Field(1, description="steps of one term before the other's turn (alternating; ours)")
    prompt_branch: Literal["per-example", "fixed", "off"] = Field(
        "per-example", description="off is the paper's ablation w/o P: every query gets the seed prompt; fixed is ours"
    )
    adapter_branch: Literal["per-example", "fixed", "off"] = Field(
        "per-example", description="off is the paper's ablation w/o F: no generated LoRA; fixed is ours"
    )
    sharing: bool = Field(True, description="one encoder for both branches; false is the paper's ablation w/o S")
    share: float = Field(0.25, gt=0, lt=1, description="k / K, shared fraction of G's layers (paper, 7B: 1/4; 3B: 3/4)")
    rank: Positive = 8
    lora_alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="lambda = lora_alpha / rank")
    target_modules: TargetModules = ("q_proj", "v_proj")
    width: Positive = Field(128, description="m, hidden width of the parameter decoder")
    pooling: Literal["last", "mean"] = Field("last", description="how the encoder's states become h_i")
    layer_embedding: bool = Field(True, description="one decoder for layers of equal shape plus a layer embedding")
    alpha: float = Field(1.0, ge=0, description="weight of the supervised prompt term")
    prompt_signal: Literal["supervised", "gumbel"] = Field(
        "supervised",
        description="gumbel: after the warm-up, term 1 through a relaxed prompt in place of term 2 (paper)",
    )
    gumbel_temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="of the relaxed prompt's softmax")
    generator_training: Literal["full", "lora"] = Field("lora", description="train G's layers, or LoRA on them")
    generator_rank: Positive = 16
    rollouts: Positive = Field(4, description="prompts sampled per train example at each refresh")
    rollout_temperature: Annotated[float, Field(gt=0)] = 1.0
    rollout_examples: Positive = Field(256, description="train examples rolled out at each refresh")
    sync_every: Positive = Field(50, description="steps between copies of phi_p into its frozen copy, and rollouts")
    warmup_epochs: Count = Field(1, description="supervised warm-up of both branches")
    source: Literal["gold", "self", "both"] = Field("gold", description="completions of D1")
    epochs: Count = 3
    learning_rate: Rate = 3e-4
    batch_size: Positive = 8
    micro_batch_size: Positive = 8
    warmup: float = Field(0.1, ge=0, le=1)
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_prompt_tokens: Positive = Field(128, description="longest generated prompt")
    checkpoint_every: Positive = 50

    @model_validator(mode="after")
    def _something_to_tune(self) -> Self:
        if self.prompt_branch == self.adapter_branch == "off":
            raise ValueError("prompt_branch and adapter_branch cannot both be off")
        if self.adapter_branch == "off" and self.alpha == 0:
            raise ValueError("without the adapter branch only the prompt term is left, and alpha = 0 takes it away")
        one_term = "off" not in (self.prompt_branch, self.adapter_branch) and self.variant == "sum"
        if self.prompt_signal == "gumbel" and not one_term:
            raise ValueError("prompt_signal = 'gumbel' has one term through both branches: none off, variant 'sum'")
        return self


class InferenceConfig(Section):
    """Arms (prompt, N) by a bandit (IAPO, PSST; sheet 11): the strategies inference-aware and plan-only."""

    learner: Literal["psst", "psst-screening", "uniform", "epsilon-greedy", "softmax", "ucb", "triple"] = Field(
        "psst", description="what chooses the arms; all but psst are the paper's variant and baselines"
    )
    aggregation: Literal["majority", "best-of", "weighted-best-of"] = Field(
        "majority", description="of the samples (the paper has the first two)"
    )
    samples: Positive = Field(16, description="largest N (paper: 32, where gains fade beyond 16)")
    scorer: str | None = Field(
        None,
        description="of best-of and weighted-best-of: log-probability | self-consistency | verifier (trained before "
        "the pulls); empty: log-probability",
    )
    temperature: float = Field(0.7, ge=0, le=5, description="of the samples (self-consistency, Wang et al. 2023)")
    top_p: Rate = Field(1.0, description="of the samples (ours)")
    completions: Positive = Field(
        5000, description="T, what the pulls may take (paper: good policies from about 5,000)"
    )
    cost_weight: float = Field(
        0.01, ge=0, description="score that 1,000 generated tokens must be worth; 0: samples cost nothing (ours)"
    )
    prompts: Positive = Field(8, description="candidates; plan-only has one (paper: 20 to 48)")
    stockpiling: bool = Field(True, description="psst estimates from all rounds, not the last alone (paper)")
    screened: Positive = Field(4, description="prompts that psst-screening keeps (paper: 1, 4, 8)")
    screening: float = Field(0.2, ge=0, lt=1, description="share of the completions for it (paper)")
    epsilon: float = Field(0.15, ge=0, le=1, description="of epsilon-greedy (paper)")
    tau: float = Field(0.05, gt=0, description="temperature of softmax (authors' code)")
    c: float = Field(0.1, gt=0, description="width of ucb's bound (paper)")

    @model_validator(mode="after")
    def _can_be_pulled(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("at temperature 0 all samples are the same; set temperature above 0")
        if self.aggregation == "majority" and self.scorer is not None:
            raise ValueError("majority reads no scorer; leave scorer out")
        return self


class VerifierConfig(Section):
    """The trained verifier, where plan.scorer or inference.scorer is verifier (Snell et al.; sheet 03)."""

    examples: Positive = Field(256, description="train examples whose completions it learns from, at most (ours)")
    samples: Positive = Field(
        8, description="own completions of each, drawn as the plan draws (ours; paper: 16, each continued 16 times)"
    )
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the examples that choose the epoch (paper)")
    epochs: Positive = Field(10, description="passes over the completions (ours)")
    learning_rate: Rate = Field(1e-2, description="ours, for a linear head; the paper has 3e-5 for all weights")
    batch_size: Positive = Field(32, description="completions per optimizer step (ours; paper: 128)")


class DifficultyConfig(Section):
    """A plan for each difficulty, chosen by plan-only and the stage i (Snell et al., sheet 03; docs/inference.md).

    With more than one bin every pull draws `inference.samples`, and the learner has nothing to choose.
    """

    bins: Positive = Field(1, description="difficulties, each with a plan of its own; 1: one plan for all (paper: 5)")
    probe: Positive = Field(
        4, description="first samples, which tell the difficulty and are part of every plan (ours; paper: 2,048 others)"
    )
    told_by: Literal["entropy", "rating"] = Field(
        "entropy",
        description="of the probe's answers (ours), or their mean rating by inference.scorer (paper: by a verifier)",
    )


class RunConfig(Section):
    """One run: one strategy, one model, one task, one seed."""

    strategy: str
    model: str
    task: str
    train_tasks: tuple[str, ...] = Field(
        (), description="tune on train and val of these tasks and test on `task` (paper: generalization); empty: `task`"
    )
    generator: str | None = Field(None, description="MetaTuner's G; empty: the model itself")
    engine: str = "auto"
    data: str | None = Field(None, description="folder of the benchmark's rows; empty: the hub, or generated rows")
    seed: Count = 0
    limit_train: Positive | None = None
    limit_val: Positive | None = None
    limit_test: Positive | None = None
    measured: Literal["test", "val"] = Field(
        "test", description="val: score the val examples instead, to choose settings without touching test (ours)"
    )
    val_size: Positive = Field(500, description="most examples carved from train when there is no val file (ours)")
    noise_examples: Count | None = Field(
        None,
        description="measured examples answered twice, to see how far the engine repeats itself (ours); empty: 64 "
        "where it does not promise to, else none",
    )
    seed_instruction: str | None = Field(None, description="the starting instruction; empty: the task's own")
    decoding: DecodingConfig = DecodingConfig()
    # Left out of what is written where it is the default, so that greedy runs keep the digests they had before plans.
    plan: PlanConfig = Field(PlanConfig(), exclude_if=lambda plan: plan == PlanConfig())
    runner: EngineConfig = EngineConfig()
    vllm: VllmConfig = VllmConfig()
    openai: OpenAIConfig = OpenAIConfig()
    budget: BudgetConfig = BudgetConfig()
    prompt: PromptConfig = PromptConfig()
    rlprompt: RlpromptConfig = RlpromptConfig()
    bpo: BpoConfig = BpoConfig()
    weights: WeightsConfig = WeightsConfig()
    sequential: SequentialConfig = SequentialConfig()
    joint: JointConfig = JointConfig()
    inference: InferenceConfig = Field(InferenceConfig(), exclude_if=lambda section: section == InferenceConfig())
    verifier: VerifierConfig = Field(VerifierConfig(), exclude_if=lambda section: section == VerifierConfig())
    difficulty: DifficultyConfig = Field(DifficultyConfig(), exclude_if=lambda section: section == DifficultyConfig())

    @field_validator("train_tasks")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a task is named twice")
        return value

    @model_validator(mode="after")
    def _val_is_of_the_task(self) -> Self:
        if self.measured == "val" and self.train_tasks:
            raise ValueError("with train_tasks the val examples are not of the task; measured must be 'test'")
        return self

    @model_validator(mode="after")
    def _generated_adapters_are_low_rank(self) -> Self:
        if self.strategy == "joint" and self.weights.variant == "dora":
            raise ValueError(
                "joint generates low-rank factors and no magnitudes; weights.variant = 'dora' is for lora-only and "
                "sequential"
            )
        return self

    @model_validator(mode="after")
    def _difficulty_can_be_told(self) -> Self:
        given, pulled = self.difficulty, self.inference
        if given.bins == 1:
            return self
        if self.strategy == "inference-aware":
            raise ValueError("inference-aware has one plan for all; difficulty.bins is for plan-only and the stage i")
        if pulled.learner != "psst":
            raise ValueError("with difficulty.bins every pull draws inference.samples; leave inference.learner out")
        if given.probe > pulled.samples:
            raise ValueError(f"difficulty.probe = {given.probe} is more than inference.samples = {pulled.samples}")
        if given.told_by == "entropy" and given.probe == 1:
            raise ValueError("one answer has no entropy; set difficulty.probe to 2 or more")
        if given.told_by == "rating" and (pulled.aggregation == "majority" or pulled.scorer == "self-consistency"):
            raise ValueError(
                "difficulty.told_by = 'rating' needs samples that are rated one by one; set inference.aggregation = "
                "'best-of' and no scorer self-consistency"
            )
        return self

    @property
    def second_model(self) -> str | None:
        """MetaTuner's G, or the proposer `model:NAME`, where it is another than the model that answers."""
        kind, _, proposer = self.prompt.proposer.partition(":")
        name = self.generator or (proposer if kind == "model" else None)
        return None if name == self.model else name

    @property
    def digest(self) -> str:
        """Content address of the whole resolved config; two runs with one digest are the same run."""
        return digest(self.model_dump(mode="json"))

    @property
    def run_name(self) -> str:
        model = Path(self.model).name
        return f"{self.task}_{self.strategy}_{model}_s{self.seed}_{self.digest[:8]}"


# How often a strategy goes round: what a run at another one's budget scales, and so no setting of a contestant there.
REPETITIONS = ("prompt.rounds", "weights.epochs", "joint.epochs", "inference.completions")

# What a 1M-parameter model needs to learn at all: the papers' rates and ranks are for billions of parameters.
# Layers and batches are alike for LoRA and joint. What is marked was chosen by
# experiments/search: eight trials for each strategy, by the mean score on val over the four offline tasks, before any
# study had read test (results/search.md).
TINY: dict[str, Any] = {
    "prompt": {
        "proposer": "edits",
        "method": "opro",  # chosen, of opro and opro+bootstrap
        "rounds": 3,  # chosen, of 3, 6, 12, 24
    },
    "weights": {
        "rank": 8,
        "alpha": 16.0,
        "target_modules": "all-linear",
        "learning_rate": 6e-3,  # chosen, of 1e-3, 3e-3, 6e-3, 1e-2
        "epochs": 10,  # chosen, of 5, 10
        "batch_size": 16,
        "micro_batch_size": 16,
    },
    "sequential": {"stages": "w,p"},  # chosen, of p,w; w,p; p,w,p; w,p,w
    "joint": {
        "share": 0.5,  # chosen, of 0.25, 0.5
        "pooling": "last",  # chosen, of last, mean
        "target_modules": "all-linear",
        "learning_rate": 3e-3,  # chosen, of 1e-3, 3e-3
        "epochs": 4,
        "batch_size": 16,
        "micro_batch_size": 16,
    },
}
PROFILES: dict[str, dict[str, Any]] = {"tiny": TINY, "tiny-4m": TINY}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def read_toml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's settings, laid on those of the file it `extends` (a path relative to it).

    Raises UsageError when a file is missing, is not TOML, or extends itself.
    """
    try:
        layer = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        asked = f" that {above[-1]} extends" if above else ""
        raise UsageError(f"There is no config file {str(path)!r}{asked}. Give the path of a TOML file.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}.") from None
    below = layer.pop("extends", None)
    if below is None:
        return layer
    if not isinstance(below, str):
        raise UsageError(f"{path}: extends = {below!r} is not valid: it names one file.")
    if path.resolve() in (file.resolve() for file in above):
        raise UsageError(f"{path} extends itself. Take one `extends` out.")
    return merged(read_toml(path.parent / below, (*above, path)), layer)


def parse_set(assignments: Iterable[str]) -> dict[str, Any]:
    """`["joint.rank=4"]` -> {"joint": {"rank": 4}}. Values are read as TOML, else taken as a string."""
    out: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {assignment!r} is not of the form key=value, for example --set joint.rank=4.")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        out = merged(out, nested(key.strip(), value))
    return out


_SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15}
_TIMES = {"s": 1, "m": 60, "h": 3600}


def parse_budget(limits: Iterable[str]) -> dict[str, Any]:
    """`["tokens=2M", "seconds=30m"]` -> {"budget": {"tokens": 2000000, "seconds": 1800.0}}.

    Tokens and flops take k, M, G (or B), T, P; seconds take s, m, h. Raises UsageError.
    """
    budget: dict[str, float] = {}
    for limit in limits:
        unit, equals, text = limit.partition("=")
        suffixes = _TIMES if unit == "seconds" else _SUFFIXES
        try:
            if not equals or unit not in ("tokens", "flops", "seconds"):
                raise ValueError(unit)
            number = float(text[:-1]) * suffixes[text[-1]] if text[-1:] in suffixes else float(text)
            budget[unit] = round(number) if unit == "tokens" else number
        except (ValueError, OverflowError):
            raise UsageError(
                f"--budget {limit!r} is not valid. Give tokens=2M, flops=1e15 or seconds=30m (k, M, G, T, P; s, m, h)."
            ) from None
    return {"budget": budget} if budget else {}


def nested(key: str, value: Any) -> dict[str, Any]:
    """`"joint.rank", 4` -> {"joint": {"rank": 4}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def resolve(*layers: Mapping[str, Any]) -> RunConfig:
    """Layers, later ones winning, to a frozen config. Raises UsageError for unknown keys and values out of bounds."""
    given: dict[str, Any] = {}
    for layer in layers:
        given = merged(given, layer)
    profile = PROFILES.get(str(given.get("model")), {})
    try:
        return RunConfig.model_validate(merged(profile, given))
    except ValidationError as error:
        raise UsageError(" ".join(_readable(e) for e in error.errors())) from None


def _readable(error: Any) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"There is no setting {where!r}{nearest(str(where), settings())}"
    if error["type"] == "missing":
        return f"{where!r} is not set. Give --{where} or set it in the config file."
    if error["type"] == "secret":
        return f"{where} is not valid: {error['msg']}."
    whole = isinstance(error["input"], Mapping)  # a section: too much to show
    given = "" if whole else f" = {error['input']!r}"
    return f"{where or 'The config'}{given} is not valid: {error['msg'].removeprefix('Value error, ')}."


def settings(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a config."""
    keys = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += settings(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def filled(dumped: Mapping[str, Any]) -> dict[str, Any]:
    """A dumped config with the sections and settings that are left out of it where they are the default."""
    left_out = {
        "plan": PlanConfig(),
        "inference": InferenceConfig(),
        "verifier": VerifierConfig(),
        "difficulty": DifficultyConfig(),
    }
    return merged({name: dict(section) for name, section in left_out.items()}, dumped)


def dump(config: RunConfig) -> str:
    """The resolved JSON that a run folder keeps."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
