"""Short model names -> where the weights are, at which revision. Knows nothing of torch.

A revision is the full commit on the hub, so a name means the same bytes on every machine. A model given by
its hub id instead of a name here is read at the id's own `@revision`, or at its newest commit, and the
resolved commit is recorded in the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """`location` is a hub id, or a folder inside this package when `revision` is None."""

    location: str
    revision: str | None
    note: str


_PACKAGED = Path(__file__).parent / "tiny"

MODELS: dict[str, Source] = {
    "tiny": Source(str(_PACKAGED / "tiny"), None, "offline test model, about 1M parameters, in this package"),
    "tiny-4m": Source(str(_PACKAGED / "tiny-4m"), None, "offline test model, about 4M parameters, in this package"),
    "qwen-0.5b": Source(
        "Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775", "Apache-2.0, 1 GB in bfloat16"
    ),
    "qwen-1.5b": Source(
        "Qwen/Qwen2.5-1.5B-Instruct", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306", "Apache-2.0, 3 GB in bfloat16"
    ),
    "qwen-3b": Source(
        "Qwen/Qwen2.5-3B-Instruct",
        "aa8e72537993ba99e69dfaafa59ed015b17504d1",
        "Qwen research licence, 6 GB in bfloat16",
    ),
    "qwen-7b": Source(
        "Qwen/Qwen2.5-7B-Instruct", "a09a35458c702b33eeacc393d103063234e8bc28", "Apache-2.0, 15 GB in bfloat16"
    ),
    "llama-3.2-1b": Source(
        "meta-llama/Llama-3.2-1B-Instruct",
        "9213176726f574b556790deb65791e0c5aa438b6",
        "gated: accept the licence on the hub, then `hf auth login`",
    ),
    "llama-3.2-3b": Source(
        "meta-llama/Llama-3.2-3B-Instruct",
        "0cb88a4f764b7a12671c53f0838cd831a0843b95",
        "gated: accept the licence on the hub, then `hf auth login`",
    ),
    "mistral-7b": Source(
        "mistralai/Mistral-7B-Instruct-v0.3",
        "c170c708c41dac9275d15a8fff4eca08d52bab71",
        "Apache-2.0, 15 GB in bfloat16",
    ),
}
