"""One step of joint training against its two halves trained apart: time, peak memory, and the speed of rollouts.

    python benchmarks/joint_step.py --size tiny --rounds 5 [--json]
    python benchmarks/joint_step.py --device cuda --actor qwen2.5-3b-shape --generator qwen2.5-7b-shape --rollouts

The halves are a supervised step on G (the prompt term alone) and a LoRA step on M (lora-only's loss; rank and layers as
joint's), on the same tokens. All three are `Trainer` steps with the settings of a cotune run: forward, backward, clip,
AdamW. G and M are two networks with random weights, G is trained with LoRA, and every example is in both terms. Floors:
joint takes at most 1.3 times the time of the two halves together, and at most 1.15 times their memory.

Time: the three take turns in every round; medians. On a CPU it is the processor time of this process, to which other
work on the machine adds little; on a GPU it is time on the clock. A joint run looks at the agreement of its terms in
one micro-batch of 11, at the cost of two more backward passes through the shared layers; its share is in `joint`.

Memory: what a step needs resident (weights of the models it uses, trained tensors, AdamW's moments, for joint phi_p')
plus the most that is allocated during the step beyond that: activations, gradients, temporaries. For joint it is a step
with a look. On a GPU the allocator's own peak is read; on a CPU each allocation and release that torch's profiler
reports is added up, which leaves out scratch memory inside BLAS and the allocator's fragmentation and is therefore the
same in every run.

`--parts` says where the time of a joint step goes: the functions that `joint_terms` calls, one after the other, the
backward pass, and what is left of the step (clipping, AdamW, the finite check).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write lines of its own

import torch
from random_models import SHAPES, random_model
from torch import Tensor, nn

from cotune.bench import Bench, MemoryStore
from cotune.config import JointConfig, resolve
from cotune.engines.base import Request, Sampling
from cotune.engines.fake import FakeEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.ledger import Ledger
from cotune.models.base import BaseModel
from cotune.models.checkpointing import checkpointed
from cotune.models.lora import Factors, attached, init_static
from cotune.models.metatuner.encoder import latent
from cotune.models.metatuner.generator import MetaTuner
from cotune.models.metatuner.losses import JointItem, actor_term, joint_loss, joint_terms, prompt_term, watch_agreement
from cotune.strategies.joint import AGREEMENT_EVERY, tuner_arguments
from cotune.supervision import TokenRow, completion_loss
from cotune.training import Cost, Settings, Trainer

QUERY, TARGET, QUESTION, COMPLETION = 120, 40, 120, 80  # mean tokens; rows have 0.75 to 1.25 times as many
SAMPLES = 4  # prompts per query in a rollout
TIME_FLOOR, MEMORY_FLOOR = 1.3, 1.15
HALVES = ("G alone", "M with LoRA alone")


class Forgetful(MemoryStore):
    """A step ends before its checkpoint begins."""

    def save_checkpoint(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        pass


@dataclass
class Variant:
    """One way to train. `resident`: bytes that stay between steps."""

    step: Callable[[], object]
    parameters: Mapping[str, nn.Parameter]
    resident: int


def size_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def items_for(actor: BaseModel, generator: BaseModel, batch: int) -> list[JointItem]:
    rng = torch.Generator().manual_seed(0)

    def tokens(base: BaseModel, mean: int, row: int) -> tuple[int, ...]:
        count = round(mean * (0.75 + 0.5 * row / max(1, batch - 1)))
        return tuple(torch.randint(base.model.config.vocab_size, (count,), generator=rng).tolist())

    return [
        JointItem(
            tokens(generator, QUERY, row),
            tokens(generator, TARGET, row),
            tokens(actor, QUESTION, row),
            tokens(actor, COMPLETION, row),
        )
        for row in range(batch)
    ]


def trained(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[Sequence[Any]], tuple[Tensor, dict[str, float]]],
    items: Sequence[Any],
    settings: JointConfig,
    bases: Sequence[BaseModel],
    recompute: bool,
    copies: Sequence[Tensor] = (),
) -> Variant:
    """`bases` are the models that the step runs, `copies` other tensors that it needs."""

    def loss_of(chosen: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
        with checkpointed(*[base.model for base in bases] if recompute else []):
            return loss(chosen)

    nothing: Any = None
    engine = FakeEngine(lambda *_: "")  # asked only to release its memory
    bench = Bench(nothing, engine, nothing, Ledger(), Forgetful(), seed=0)
    steps = Settings(settings.learning_rate, len(items), settings.micro_batch_size, 0.0, settings.max_grad_norm, 10**9)
    trainer: Trainer[Any] = Trainer(
        name, parameters, loss_of, lambda _: 1.0, lambda _: Cost(0, 0.0), str, steps, 10**6, bench
    )
    own = list(parameters.values())
    moments = 2 * 4 * sum(p.numel() for p in own)  # float32, as are all parameters here
    weights = size_of([p for base in bases for p in base.model.parameters()])
    return Variant(lambda: trainer.run([items]), parameters, weights + size_of([*own, *copies]) + moments)


def variants(
    actor: BaseModel, generator: BaseModel, settings: JointConfig, recompute: bool, items: Sequence[JointItem]
) -> tuple[dict[str, Variant], MetaTuner]:
    arguments, shapes = tuner_arguments(settings, actor, seed=0)
    both, prompts_only = (MetaTuner(generator, shapes, **arguments) for _ in range(2))
    factors = init_static(actor.model, settings.target_modules, settings.rank, torch.Generator().manual_seed(0))
    lora = {f"{name}.{part}": p for name, pair in factors.items() for part, p in zip("ab", pair, strict=True)}

    def joint(chosen: Sequence[JointItem]) -> tuple[Tensor, dict[str, float]]:
        return joint_loss(joint_terms(both, actor, chosen), settings.alpha)

    def joint_with_look(chosen: Sequence[JointItem]) -> tuple[Tensor, dict[str, float]]:
        terms = joint_terms(both, actor, chosen)
        watch_agreement(terms, list(both.prompts.shared.values()), lambda _: None)
        return joint_loss(terms, settings.alpha)

    def prompts(chosen: Sequence[JointItem]) -> tuple[Tensor, dict[str, float]]:
        return joint_loss(joint_terms(prompts_only, actor, chosen), settings.alpha)

    def weights(chosen: Sequence[TokenRow]) -> tuple[Tensor, dict[str, float]]:
        with attached(actor.model, factors, arguments["scaling"]):
            return completion_loss(actor, chosen), {}

    def joint_variant(loss: Callable[[Sequence[JointItem]], tuple[Tensor, dict[str, float]]]) -> Variant:
        frozen = list(both.prompts.frozen.values())
        return trained("joint", both.parameters, loss, items, settings, [generator, actor], recompute, frozen)

    targets = [JointItem(i.query, i.target, (), ()) for i in items]
    rows = [TokenRow(i.question, i.completion, "") for i in items]
    phi = {**prompts_only.prompts.shared, **prompts_only.prompts.own}
    return {
        "joint": joint_variant(joint),
        "joint, with a look": joint_variant(joint_with_look),
        "G alone": trained("prompt", phi, prompts, targets, settings, [generator], recompute),
        "M with LoRA alone": trained("lora", lora, weights, rows, settings, [actor], recompute),
    }, both


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def growth(variant: Variant, device: str) -> int:
    """The most bytes allocated at once during one step, beyond those allocated before it."""
    for parameter in variant.parameters.values():
        parameter.grad = None  # the last step's: gone when a step begins
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        variant.step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in trace if e["name"] == "[memory]")
    now = peak = 0
    for _, _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def parts(
    actor: BaseModel, tuner: MetaTuner, items: Sequence[JointItem], alpha: float, recompute: bool, rounds: int
) -> dict[str, float]:
    """Seconds of each part of a joint step, medians."""
    device = actor.model.device.type
    taken: dict[str, list[float]] = {}
    kept: dict[str, Any] = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        taken.setdefault(name, []).append(seconds(lambda: kept.update({name: work()}), device))

    def decode(pooled_BD: Tensor) -> Factors:
        return tuner.adapters(latent(pooled_BD))

    def answer(factors: Factors) -> Tensor:
        return actor_term(actor, factors, tuner.scaling, items).sum()

    for _ in range(rounds + 1):  # the first is a warm-up
        with checkpointed(*[base.model for base in (tuner.prompts.base, actor)] if recompute else []):
            timed("G forward: latents, term 2", lambda: prompt_term(tuner, items))
            nll_B, pooled_BD, _ = kept["G forward: latents, term 2"]
            timed("parameter decoder forward", partial(decode, pooled_BD))
            factors = kept["parameter decoder forward"]
            timed("M forward: term 1", partial(answer, factors))
            loss = kept["M forward: term 1"] + alpha * nll_B.sum()
            timed("backward", loss.backward)
        kept.clear()
        for parameter in tuner.parameters.values():
            parameter.grad = None
    return {name: statistics.median(each[1:]) for name, each in taken.items()}


def rollout_speed(actor: BaseModel, tuner: MetaTuner, batch: int, device: str) -> dict[str, float]:
    """Tokens per second: prompts sampled from G, answers by M under an adapter per query."""
    generator, rows = tuner.prompts.base, batch * SAMPLES
    queries = [f"{i:03d} " + "x" * (QUERY - 4) for i in range(batch)]  # a token per letter
    adapters = tuner.adapters_at(tuner.latents([generator.encode(q) for q in queries]))
    with tuner.prompts.rewriter() as rewriter:
        asked = [Request(q, rewriter.adapter) for q in queries]
    tasks = {
        "G writes prompts": (generator, asked, Sampling(TARGET, temperature=1.0, n=SAMPLES)),
        "M answers": (
            actor,
            [Request(q + str(s), a) for q, a in zip(queries, adapters, strict=True) for s in range(SAMPLES)],
            Sampling(COMPLETION),
        ),
    }
    speed = {}
    for name, (base, requests, sampling) in tasks.items():
        engine = TransformersEngine(base, batch_size=rows, threads=torch.get_num_threads())

        def generate(engine: Any = engine, requests: Any = requests, sampling: Any = sampling) -> None:
            engine.generate(requests, sampling)

        generate()
        speed[name] = rows * sampling.max_new_tokens / seconds(generate, device)
    return speed


def measure(options: argparse.Namespace, actor_shape: str, generator_shape: str) -> dict[str, Any]:
    device, dtype = options.device, getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    sections = {"strategy": "joint", "task": "micro-gsm8k", "model": actor_shape}  # tiny has a profile of its own
    settings = resolve(sections).joint
    if options.batch:
        settings = settings.model_copy(update={"batch_size": options.batch, "micro_batch_size": options.batch})
    actor, generator = (random_model(shape, device, dtype) for shape in (actor_shape, generator_shape))
    items = items_for(actor, generator, settings.batch_size)
    runs, tuner = variants(actor, generator, settings, options.gradient_checkpointing, items)
    for variant in runs.values():
        variant.step()  # warm-up; AdamW makes its moments in the first step
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, variant in runs.items():
            taken[name].append(seconds(variant.step, device))
    time_s = {name: statistics.median(values) for name, values in taken.items()}
    looks = 1 / (AGREEMENT_EVERY + 1)
    time_s["joint"] = (1 - looks) * time_s["joint"] + looks * time_s["joint, with a look"]
    during = {name: growth(variant, device) for name, variant in runs.items()}
    peak = {name: variant.resident + during[name] for name, variant in runs.items()}

    spent: dict[str, float] = {}
    if options.parts:
        spent = parts(actor, tuner, items, settings.alpha, options.gradient_checkpointing, options.rounds)
        whole = statistics.median(taken["joint"])
        spent["rest of the step"] = whole - sum(spent.values())

    def ratio(figures: Mapping[str, float], joint: str) -> float:
        return figures[joint] / sum(figures[name] for name in HALVES)

    return {
        "actor": actor_shape,
        "generator": generator_shape,
        "device": device,
        "dtype": options.dtype,
        "batch": settings.batch_size,
        "gradient_checkpointing": options.gradient_checkpointing,
        "threads": options.threads,
        "rounds": options.rounds,
        "seconds": time_s,
        "during_bytes": during,
        "peak_bytes": peak,
        "time_ratio": ratio(time_s, "joint"),
        "memory_ratio": ratio(peak, "joint, with a look"),
        "during_ratio": ratio(during, "joint, with a look"),
        "parts_seconds": spent,
        "rollout_tokens_per_second": rollout_speed(actor, tuner, settings.batch_size, device)
        if options.rollouts
        else {},
    }


def show(result: Mapping[str, Any]) -> None:
    print(
        f"M {result['actor']}, G {result['generator']}, batch of {result['batch']}, {result['device']}, "
        f"{result['dtype']}, {result['threads']} thread(s), {result['rounds']} rounds"
        + ", gradient checkpointing"
        * result["gradient_checkpointing"]
    )
    for name, taken in result["seconds"].items():
        during, peak = (result[key][name] / 2**20 for key in ("during_bytes", "peak_bytes"))
        print(f"  {name:20}{taken:10.3f} s   peak {peak:10,.1f} MiB, of which during the step {during:10,.1f} MiB")
    print(f"  joint / (G alone + M alone): time {result['time_ratio']:.2f}x (floor {TIME_FLOOR}x), ", end="")
    print(f"memory {result['memory_ratio']:.2f}x (floor {MEMORY_FLOOR}x), ", end="")
    print(f"of which during the step {result['during_ratio']:.2f}x")
    for name, taken in result["parts_seconds"].items():
        print(f"  {name:28}{taken:10.3f} s")
    for name, speed in result["rollout_tokens_per_second"].items():
        print(f"  {name:20}{speed:10,.0f} tok/s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SHAPES], action="append", help="shape of both M and G (repeatable)")
    parser.add_argument("--actor", choices=[*SHAPES], help="shape of M alone")
    parser.add_argument("--generator", choices=[*SHAPES], help="shape of G alone")
    parser.add_argument("--batch", type=int, help="examples per step, in one micro-batch; empty: joint.batch_size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="empty: bfloat16, on a CPU float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--parts", action="store_true", help="also where the time of a joint step goes")
    parser.add_argument("--rollouts", action="store_true", help="also tokens per second of rollouts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    if options.actor or options.generator:
        pairs = [(options.actor or options.generator, options.generator or options.actor)]
    else:
        pairs = [(size, size) for size in options.size or ("tiny", "105m")]
    failed = False
    for pair in pairs:
        result = measure(options, *pair)
        failed |= result["time_ratio"] > TIME_FLOOR or result["memory_ratio"] > MEMORY_FLOOR
        if options.json:
            print(json.dumps(result))
        else:
            show(result)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
