"""What the tests of the vllm engine share: vLLM itself on the packaged tiny model. Skipped where it is not there."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cotune.engines.transformers_engine import TransformersEngine
    from cotune.engines.vllm_engine import VllmEngine
    from cotune.models.base import BaseModel
    from cotune.models.lora import LoraFactors


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith("test_vllm"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # vLLM's own, of every kind
            item.add_marker(pytest.mark.xdist_group("vllm"))
            if find_spec("vllm") is None:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm installs it"))


@pytest.fixture(scope="package")
def base() -> BaseModel:
    from cotune.models.base import load

    return load("tiny")


@pytest.fixture(scope="package")
def engine(base: BaseModel) -> VllmEngine:
    from cotune.engines.vllm_engine import VllmEngine

    return VllmEngine(base, sequences=16, adapters=4, max_rank=8, cache_gib=0.25)


@pytest.fixture(scope="package")
def reference(base: BaseModel) -> TransformersEngine:
    from cotune.engines.transformers_engine import TransformersEngine

    return TransformersEngine(base)


@pytest.fixture(scope="package")
def adapter(base: BaseModel) -> Callable[[int], LoraFactors]:
    """A random adapter of rank 8 on all linear layers, by seed; large enough to change what the model says."""
    import torch

    from cotune.models.lora import LoraFactors, target_linears

    def make(seed: int) -> LoraFactors:
        rng = torch.Generator().manual_seed(seed)
        return LoraFactors(
            {
                name: (
                    torch.randn(8, linear.in_features, generator=rng) / linear.in_features**0.5,
                    torch.randn(linear.out_features, 8, generator=rng) * 0.05,
                )
                for name, linear in target_linears(base.model, "all-linear").items()
            },
            2.0,
        )

    return make
