"""Low-rank adapters: static ones and one per row of a batch, with or without DoRA's magnitudes, behind one context
manager.

`attached` is the only place where factors meet a model; it serves inference, static and generated adapters,
mixed batches and training alike. Knows nothing of engines, tasks or of who made the factors.

Axes: B rows of a batch, T tokens, R rank, I/O features in and out of one linear layer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from cotune.errors import CotuneError, UsageError
from cotune.models.base import BaseModel, hash_tensor
from cotune.models.dora import Gain, column_norm
from cotune.models.peft_files import read_peft, write_peft
from cotune.plugins import nearest
from cotune.values import Adapter

Factors = Mapping[str, tuple[Tensor, ...]]
"""Module name -> (lora_a, lora_b): [R, I] and [O, R] shared by all rows, or [B, R, I] and [B, O, R] per row; with DoRA
(lora_a, lora_b, magnitude), the last one [O] or [B, O]. A row without magnitudes has NaN there (models/dora.py)."""


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One adapter: y = W x + scaling * B (A x) for every named linear layer.

    `factors[name]` is (lora_a [R, I], lora_b [O, R]), one rank R throughout, named as in `model.named_modules()`; of a
    DoRA adapter (lora_a, lora_b, magnitude [O]) in every layer.
    An `Adapter` in the sense of values.py; treat the tensors as frozen.
    """

    factors: Factors
    scaling: float

    def __post_init__(self) -> None:
        if not self.factors:
            raise CotuneError("An adapter needs factors for at least one layer; pass no adapter instead.")
        for name, (lora_a, lora_b, *magnitude) in self.factors.items():
            if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != self.rank or lora_b.shape[1] != self.rank:
                raise CotuneError(
                    f"The factors of {name} must be [R, I] and [O, R] with R = {self.rank}; "
                    f"they are {list(lora_a.shape)} and {list(lora_b.shape)}."
                )
            if len(magnitude) != self.is_dora or any(m.shape != lora_b.shape[:1] for m in magnitude):
                raise CotuneError(
                    f"The magnitudes of {name} must be one for each of its {lora_b.shape[0]} outputs, in every layer "
                    "of a DoRA adapter or in none."
                )
            if not all(bool(m.isfinite().all()) for m in magnitude):  # where rows are stacked, NaN stands for none
                raise CotuneError(f"The magnitudes of {name} are not numbers: training diverged.")

    @classmethod
    def snapshot(cls, factors: Factors, scaling: float) -> LoraFactors:
        """A frozen copy of factors that are being trained."""
        return cls({name: tuple(t.detach().clone() for t in tensors) for name, tensors in factors.items()}, scaling)

    @classmethod
    def zero(cls, model: nn.Module, target_modules: Sequence[str] | str, rank: int) -> LoraFactors:
        """The adapter that changes nothing: both factors zero."""
        linears = target_linears(model, target_modules, rank).items()
        zeros = {
            n: (m.weight.new_zeros(rank, m.in_features), m.weight.new_zeros(m.out_features, rank)) for n, m in linears
        }
        return cls(zeros, 1.0)

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values()))[0].shape[0]

    @property
    def is_dora(self) -> bool:
        """Whether the layers have magnitudes."""
        return len(next(iter(self.factors.values()))) == 3

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of scaling, names, shapes, dtypes and bytes."""
        content = hashlib.sha256(f"{self.scaling:.9g}".encode())  # a scaling survives alpha = scaling * rank to 1e-15
        for name in sorted(self.factors):
            for tensor in self.factors[name]:
                hash_tensor(content, name, tensor)
        return content.hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(tensor.nbytes for tensors in self.factors.values() for tensor in tensors)

    @property
    def is_zero(self) -> bool:
        """Whether the low-rank update is zero by construction: in each layer one of its two factors is all zero."""
        return self.scaling == 0 or not any(bool(a.any()) and bool(b.any()) for a, b, *_ in self.factors.values())

    def save(self, folder: Path, base_model: str | None = None) -> None:
        """Write PEFT's two files, which `peft.PeftModel.from_pretrained` loads unchanged. Atomic per file, config last.

        `base_model` is the id or path that PEFT records as `base_model_name_or_path`.
        """
        write_peft(folder, self.factors, self.scaling, base_model)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> LoraFactors:
        """Read a plain LoRA or DoRA adapter in PEFT format, ours or anyone's. Raises UsageError for anything else."""
        return cls(*read_peft(folder, device))


@dataclass(frozen=True, eq=False)
class PendingLora:
    """An adapter that is made when it is needed, so that thousands of them do not fill the memory.

    An `Adapter` in the sense of values.py. `digest` names the content by what it is made from. `make` may be called
    any number of times.
    """

    digest: str
    make: Callable[[], LoraFactors]


def as_factors(adapter: Adapter | None) -> LoraFactors | None:
    """What an engine can serve. Raises UsageError for an adapter of another kind."""
    if adapter is None or isinstance(adapter, LoraFactors):
        return adapter
    raise UsageError(f"An engine takes LoraFactors as adapters, not {type(adapter).__name__}.")


def target_linears(
    model: nn.Module, target_modules: Sequence[str] | str, rank: int | None = None
) -> dict[str, nn.Linear]:
    """The linear layers to adapt, in model order.

    `target_modules` holds module names or their last parts ("q_proj"), or is "all-linear": every linear layer
    but the output head (as in PEFT). Raises UsageError for a name that matches nothing, with the nearest ones,
    and for a `rank` above min(in, out) of a matched layer.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if target_modules == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found = {name: module for name, module in linears.items() if module is not head}
    else:
        wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        for target in wanted:
            if not any(f".{name}".endswith(f".{target}") for name in linears):
                known = linears if "." in target else {name.rpartition(".")[2] for name in linears}
                raise UsageError(f"The model has no linear layer {target!r}{nearest(target, known)}")
        found = {n: module for n, module in linears.items() if any(f".{n}".endswith(f".{target}") for target in wanted)}
    for name, module in found.items():
        smallest = min(module.in_features, module.out_features)
        if rank is not None and not 1 <= rank <= smallest:
            raise UsageError(
                f"Rank {rank} does not fit layer {name} ({module.in_features} -> {module.out_features}); "
                f"choose 1 to {smallest}, or leave this layer out of target_modules."
            )
    return found


def init_static(
    model: nn.Module, target_modules: Sequence[str] | str, rank: int, generator: torch.Generator, dora: bool = False
) -> dict[str, tuple[nn.Parameter, ...]]:
    """Trainable factors of a fresh adapter: name -> (lora_a [R, I], lora_b [O, R]), in model order, with magnitude [O]
    as the third for `dora`.

    As in PEFT: lora_a is uniform in +-1/sqrt(I) (Kaiming uniform with a = sqrt(5)), lora_b is zero and magnitude the
    norm of the weight's rows, so the first forward pass is that of the base model. Drawn on the CPU in float32
    whatever the model's device and dtype: the same seed gives the same factors everywhere, and small updates are not
    lost in bfloat16.
    Attach them as they are: `attached(model, parameters, alpha / rank)`.
    """
    parameters = {}
    for name, linear in target_linears(model, target_modules, rank).items():
        bound = 1 / math.sqrt(linear.in_features)
        lora_a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        lora_b = torch.zeros(linear.out_features, rank)
        device = linear.weight.device
        factors = [lora_a.to(device), lora_b.to(device)]
        if dora:
            factors.append(column_norm(linear.weight, factors[0], factors[1], 1.0).float())
        parameters[name] = tuple(map(nn.Parameter, factors))
    return parameters


@contextmanager
def attached(model: nn.Module, factors: Factors, scaling: float = 1.0) -> Iterator[Callable[[Tensor], None]]:
    """Within this context the named layers compute y = W x + b + scaling * B (A x), or with a magnitude m (DoRA, eq. 5)
    y = m / ||W + scaling * B A||_c * (W x + scaling * B (A x)) + b.

    Sheet 02's batch form (MetaTuner, arXiv 2509.24245): U = X A_i^T, Y = X W^T + scaling * U B_i^T, two batched
    products per layer; the dense update is never built. Differentiable in both factors and the input.

    `factors[name]` is ([R, I], [O, R]) for all rows or ([B, R, I], [B, O, R]) per row. The model may then see
    B rows, or B * n with each row repeated n times in a block, as `generate` with n samples does. Factors are
    cast to the layer's dtype and device. Where scalings differ by row, fold them into lora_b, as `stack` does.

    Yields `select(rows)`: from then on row i is what was row `rows[i]`, for decoding loops that drop or repeat rows.

    A row whose factors are zero gets exactly the base model's output (y + 0, same batch). Nested contexts add
    up; a magnitude also scales what an outer context adds, and its norm does not know of that (ours: nothing here
    nests them). The norms are those of the factors at entry: enter anew after each optimizer step. On exit, also by an
    exception, the layers' own forward is back. A backward pass that calls forward again finds it gone, unless the graph
    was built with models/checkpointing.py, which remembers it.
    Raises UsageError for names the model lacks or shapes that do not fit.
    """
    modules = dict(model.named_modules()) if factors else {}
    terms: list[tuple[nn.Linear, _LowRank]] = []
    for name, (lora_a, lora_b, *magnitude) in factors.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise UsageError(f"The adapter is for another model, without linear layer {name!r}{nearest(name, modules)}")
        _check_shapes(name, linear, lora_a, lora_b, *magnitude)
        gains = [
            Gain(m.to(linear.weight.device), column_norm(linear.weight, lora_a, lora_b, scaling), linear.bias)
            for m in magnitude
        ]
        terms.append((linear, _LowRank(lora_a.to(linear.weight), lora_b.to(linear.weight), scaling, *gains)))

    def select(rows: Tensor) -> None:
        for _, term in terms:
            term.select(rows)

    with ExitStack() as restore:
        for linear, term in terms:
            outer = linear.__dict__.get("forward")  # of an outer context or a hook; None: the class's own
            restore.callback(*((setattr, linear, "forward", outer) if outer else (delattr, linear, "forward")))
            linear.forward = term.added_to(linear.forward)  # type: ignore[method-assign, assignment]
        yield select


def _check_shapes(
    name: str, linear: nn.Linear, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None = None
) -> None:
    want_a, want_b = [lora_a.shape[-2], linear.in_features], [linear.out_features, lora_a.shape[-2]]
    rows_agree = lora_a.shape[:-2] == lora_b.shape[:-2] and lora_a.dim() in (2, 3)
    if not rows_agree or list(lora_a.shape[-2:]) != want_a or list(lora_b.shape[-2:]) != want_b:
        raise UsageError(
            f"The adapter does not fit layer {name} ({linear.in_features} -> {linear.out_features}): "
            f"lora_a is {list(lora_a.shape)}, lora_b is {list(lora_b.shape)}."
        )
    if magnitude is not None and magnitude.shape != lora_b.shape[:-1]:
        raise UsageError(f"The adapter does not fit layer {name}: its magnitude is {list(magnitude.shape)}.")


@dataclass
class _LowRank:
    """alpha * B (A x) of one layer: `a` [R, I] or [B, R, I], `b` [O, R] or [B, O, R]. `gain` scales all of y."""

    a: Tensor
    b: Tensor
    alpha: float
    gain: Gain | None = None

    def select(self, rows: Tensor) -> None:
        if self.a.dim() == 3:
            self.a, self.b = self.a[rows], self.b[rows]
        if self.gain:
            self.gain.select(rows)

    def added_to(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`forward` plus this term, times the gain."""
        added = self._added_to(forward)
        gain = self.gain
        return added if gain is None else lambda x: gain.times(added(x))

    def _added_to(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:

        def added(x: Tensor) -> Tensor:
            y = forward(x)
            if self.a.dim() == 2:
                return self._plus(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]) @ self.a.T).view_as(y)
            rows = self.a.shape[0]
            if x.dim() == 3 and x.shape[0] == rows:
                return self._plus(y, self._low(x))
            if x.dim() < 3 or x.shape[0] % rows:
                raise CotuneError(
                    f"An adapter per row needs inputs [B, T, I] with B a multiple of {rows}, got {list(x.shape)}; "
                    "if this layer flattens its batch (experts), leave it out of target_modules."
                )
            low = self._low(x.reshape(rows, -1, x.shape[-1]))
            return self._plus(y.reshape(rows, -1, y.shape[-1]), low).view_as(y)

        return added

    def _low(self, x_BTI: Tensor) -> Tensor:
        """A x, [B, T, R]. As A x^T: factors that are not in the cache are read twice as fast as by x A^T on a CPU."""
        return torch.bmm(self.a, x_BTI.mT).mT

    def _plus(self, y: Tensor, low: Tensor) -> Tensor:
        """y + alpha * low B^T, fused; in place in inference (not under autocast, which casts only the other form)."""
        in_place = not torch.is_grad_enabled() and y.dtype == self.b.dtype
        if self.b.dim() == 2:
            return (y.addmm_ if in_place else y.addmm)(low, self.b.T, alpha=self.alpha)
        return (y.baddbmm_ if in_place else y.baddbmm)(low, self.b.mT, alpha=self.alpha)


def stack(adapters: Sequence[LoraFactors | None]) -> tuple[Factors, float]:
    """(factors, scaling) for `attached`: row i under `adapters[i]`.

    All rows under the same adapter (the same object, or equal factors): its own [R, I] form. All None: no factors.
    Otherwise [B, R, I] with ranks padded by zeros, zero factors where a row's adapter is None or lacks a layer,
    and scalings that differ folded into lora_b. As soon as one adapter has magnitudes, every row gets some: NaN, which
    stands for none, where its own adapter has none or lacks the layer.
    """
    first = adapters[0]
    if all(adapter is first or _equal(adapter, first) for adapter in adapters):
        return ({}, 1.0) if first is None else (first.factors, first.scaling)
    some = [adapter for adapter in adapters if adapter is not None]
    scaling = first.scaling if first and all(adapter.scaling == first.scaling for adapter in some) else 1.0
    rank = max(adapter.rank for adapter in some)
    dora = any(adapter.is_dora for adapter in some)
    factors: dict[str, tuple[Tensor, ...]] = {}
    for name in dict.fromkeys(name for adapter in some for name in adapter.factors):
        like_a, like_b, *_ = next(adapter.factors[name] for adapter in some if name in adapter.factors)
        nothing = like_a.new_zeros(rank, like_a.shape[1]), like_b.new_zeros(like_b.shape[0], rank)
        rows = [_padded(a, name, rank, scaling) if a and name in a.factors else nothing for a in adapters]
        factors[name] = (torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows]))
        if dora:
            none = torch.full_like(like_b[:, 0], torch.nan)
            own = [a.factors[name][2] if a and a.is_dora and name in a.factors else none for a in adapters]
            factors[name] += (torch.stack(own),)
    return factors, scaling


def _padded(adapter: LoraFactors, name: str, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """One layer's lora_a and lora_b at a larger rank and for another scaling; unchanged where both are its own."""
    lora_a, lora_b, *_ = adapter.factors[name]
    if adapter.rank < rank:
        extra = rank - adapter.rank
        lora_a, lora_b = nn.functional.pad(lora_a, (0, 0, 0, extra)), nn.functional.pad(lora_b, (0, extra))
    return lora_a, lora_b if adapter.scaling == scaling else lora_b * (adapter.scaling / scaling)


def _equal(one: LoraFactors | None, other: LoraFactors | None) -> bool:
    """Same content, found out without hashing: unequal factors differ in the first tensor compared."""
    if one is None or other is None:
        return one is other
    return (
        one.scaling == other.scaling
        and one.rank == other.rank
        and one.is_dora == other.is_dora
        and one.factors.keys() == other.factors.keys()
        and all(torch.equal(x, y) for n in one.factors for x, y in zip(one.factors[n], other.factors[n], strict=True))
    )


def canary(base: BaseModel, adapter: LoraFactors, prompt_ids: Sequence[int]) -> None:
    """Stop the run when an adapter that should change the model changes nothing.

    Compares next-token log-probabilities at every position of the prompt with and without the adapter. Raises
    CotuneError when they are identical although the adapter is not a fresh one (the layers were replaced by fused
    ones, or the update is below the model's precision), and when the adapter makes them not a number.
    """
    ids = torch.tensor([list(prompt_ids)], device=base.model.device)
    with torch.no_grad():
        without = base.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        with attached(base.model, adapter.factors, adapter.scaling):
            under = base.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    # Factors too: attention on a CPU can swallow a NaN and go on with finite nonsense.
    if not all(bool(t.isfinite().all()) for tensors in (*adapter.factors.values(), (under,)) for t in tensors):
        raise CotuneError(f"Adapter {adapter.digest} holds or yields values that are not numbers: training diverged.")
    if torch.equal(without, under) and not _is_fresh(base.model, adapter):
        raise CotuneError(
            f"Adapter {adapter.digest} is attached but changes no log-probability of {base.name}; "
            "its layers do not run through the attached forward, so this run would report the base model."
        )


def _is_fresh(model: nn.Module, adapter: LoraFactors) -> bool:
    """Whether the adapter changes nothing by construction: no update, and magnitudes that are the weight's own."""
    return adapter.is_zero and all(
        torch.equal(m, column_norm(model.get_submodule(name).weight, a, b, adapter.scaling).to(m))  # type: ignore[arg-type]
        for name, (a, b, *magnitude) in adapter.factors.items()
        for m in magnitude
    )
