"""One loaded causal language model with its tokenizer, and how to get it from a name, a folder or the hub.

Knows the chat template, the ends of a turn and what a token costs. Knows nothing of adapters, decoding or tasks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cotune.errors import CotuneError, UsageError
from cotune.ledger import forward_flops
from cotune.models.attention import share_keys
from cotune.models.registry import MODELS
from cotune.plugins import nearest
from cotune.values import digest

logger = logging.getLogger(__name__)

# What chat templates are given beside the turns. Some (Llama 3.2) print today's date, and the same prompt must be the
# same bytes on every day.
TEMPLATE_ARGUMENTS: dict[str, Any] = {"add_generation_prompt": True, "date_string": "26 Jul 2024"}
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
_OTHER_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
_NOT_OURS = ["original/*", "consolidated*"]  # a second copy of the weights in the vendor's own format


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen model that answers: eval mode, no gradients to its weights, on one device in one dtype.

    `source` is the hub id or the folder, `revision` the hub commit (None for a folder), `folder` where the files of
    these very weights are (None when they were made or changed in memory).
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    revision: str | None
    folder: Path | None = None

    @cached_property
    def digest(self) -> str:
        """Content hash of the weights as loaded; `weights_digest` again shows whether they were changed since."""
        return weights_digest(self.model)

    @cached_property
    def parameters_count(self) -> int:
        """All parameters, a tied table counted once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def flops_per_token(self) -> float:
        """FLOPs of one token's forward pass, by the ledger's one formula."""
        return forward_flops(self.parameters_count, 1)

    @property
    def hardware(self) -> list[str]:
        """What it computes on, as far as that decides the last bits of a result."""
        device = self.model.device
        cuda = device.type == "cuda"
        return [device.type, torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()]

    @cached_property
    def context_length(self) -> int:
        """Most tokens of prompt and completion together."""
        positions = int(self.model.config.get_text_config().max_position_embeddings)
        return min(positions, int(self.tokenizer.model_max_length))

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the first is the one the chat template writes, so the one to train on."""
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = [self._template_end_id, self.tokenizer.eos_token_id]
        ids += configured if isinstance(configured, list) else [configured]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @cached_property
    def _template_end_id(self) -> int | None:
        """The special token that the template writes behind an assistant turn; None if it writes none."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "probe"}]
        _, _, behind = self._template(turns, add_generation_prompt=False).rpartition("probe")
        ids = self.encode(behind)
        return ids[0] if ids and ids[0] in self.tokenizer.all_special_ids else None

    @cached_property
    def _takes_system_role(self) -> bool:
        turns = [{"role": "system", "content": "probe-of-system"}, {"role": "user", "content": "x"}]
        try:
            return "probe-of-system" in self._template(turns)
        except TemplateError:
            return False

    def _template(self, messages: Sequence[Mapping[str, str]], **other: bool) -> str:
        turns = [dict(m) for m in messages]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **TEMPLATE_ARGUMENTS | other))

    @property
    def template_digest(self) -> str | None:
        """Content address of the chat template; None where only a server knows it."""
        return digest(self.tokenizer.chat_template)

    def turns(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """The messages as this model's chat template takes them.

        Contents go in `plain`. Where the template refuses or drops the system role (Gemma), a leading system turn is
        put before the first user turn, separated by an empty line.
        """
        turns = [{"role": m["role"], "content": self.plain(m["content"])} for m in messages]
        if turns and turns[0]["role"] == "system" and not self._takes_system_role:
            system, user = turns[0]["content"], turns[1]
            turns[:2] = [{"role": user["role"], "content": f"{system}\n\n{user['content']}".strip()}]
        return turns

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Chat template applied to `turns`, ending where the assistant begins.

        Raises CotuneError when the template refuses them.
        """
        try:
            return self._template(self.turns(messages))
        except TemplateError as error:
            raise CotuneError(f"The chat template of {self.name} refuses these turns: {error}.") from error

    def plain(self, text: str) -> str:
        """`text` with a space inside every special token written out in it: data and models cannot end a turn."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        longest_first = sorted(special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @property
    def special_tokens(self) -> list[str]:
        """What may not be written in a prompt."""
        return list(self.tokenizer.all_special_tokens)

    def token_count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encode(text))

    def content(self, text: str) -> list[int] | str:
        """What the model reads of a rendered prompt, for content addresses: its token ids."""
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written out in `text` count as such, none are added."""
        return list(self._encoded(text))

    @cached_property
    def _encoded(self) -> Callable[[str], tuple[int, ...]]:
        """Remembers the last texts: a prompt is counted for the plan and the budget before it is answered."""
        return lru_cache(8192)(lambda text: tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]))

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Token ids of an assistant turn, its end included: what is trained on."""
        return (*self.encode(self.plain(text)), self.end_of_turn_ids[0])

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens, spaces as generated."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def hash_tensor(content: Any, name: str, tensor: Tensor) -> None:
    """Feed one named tensor to a hashlib object: name, dtype, shape and bytes."""
    content.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    content.update(data.numpy().data)


def weights_digest(model: torch.nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over all parameters as they are now (about 1 GB a second)."""
    content = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        hash_tensor(content, name, parameter)
    return content.hexdigest()[:16]


def load(name: str, *, device: str = "auto", dtype: str = "auto") -> BaseModel:
    """The model behind a registry name, a local folder or a hub id (`org/model` or `org/model@revision`).

    `device` auto: cuda if there is one, else cpu. `dtype` auto: bfloat16 on a GPU, float32 on the CPU.
    Reads safetensors and JSON only; code and pickled weights that come with a model are never run.
    Raises UsageError for what cannot be loaded, with the fix.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source, revision, folder = _locate(name)
    _check_folder(name, folder)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    chosen = _dtype(device) if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype):
        raise UsageError(f"There is no dtype {dtype!r}. Known: auto, float32, bfloat16, float16.")
    model = _load_model(name, folder, chosen)
    tokenizer = _load_tokenizer(name, folder)
    try:
        torch.nn.Module.to(model, device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it lacks
        raise UsageError(
            f"{name} cannot be put on device {device!r} ({error}); choose --set runner.device=cpu."
        ) from error
    share_keys(model)
    model.train(False).requires_grad_(False)
    return BaseModel(name, model, tokenizer, source, revision, folder)


def outline(name: str) -> BaseModel:
    """The model of `load` without its weights (on torch's meta device): for counting parameters and tokens.

    Fetches no weights from the hub. Raises UsageError like `load`.
    """
    source, revision, folder = _locate(name, weights=False)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no model: there is no config.json in it. Give the folder that has one.")
    tokenizer = _load_tokenizer(name, folder)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return BaseModel(name, model, tokenizer, source, revision)


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _locate(name: str, weights: bool = True) -> tuple[str, str | None, Path]:
    """(source, hub commit, folder with the files)."""
    if name in MODELS:
        location, revision, _ = MODELS[name]
        if revision is None:
            if not (Path(location) / "config.json").is_file():
                raise UsageError(f"The packaged model {name} is not in this installation; run `make tiny-model`.")
            return f"package:{Path(location).name}", None, Path(location)
        return location, *_download(location, revision, weights)
    if Path(name).is_dir():
        return name, None, Path(name)
    organisation, _, rest = name.partition("/")
    repository, _, wanted = rest.partition("@")
    if not organisation or not repository or "/" in repository or name.startswith((".", "/", "~")):
        raise UsageError(
            f"There is no model {name!r}: not a known name, a folder, or a hub id like org/model{nearest(name, MODELS)}"
        )
    return f"{organisation}/{repository}", *_download(f"{organisation}/{repository}", wanted or None, weights)


def _download(repository: str, revision: str | None, weights: bool) -> tuple[str, Path]:
    """(commit, folder) of a hub snapshot, from the cache when the files are there."""
    fetch = partial(
        snapshot_download,
        repository,
        revision=revision,
        allow_patterns=[*(_WEIGHT_FILES if weights else ()), *_OTHER_FILES],
        ignore_patterns=_NOT_OURS,
    )
    try:
        folder = Path(fetch())
    except GatedRepoError as error:
        raise UsageError(
            f"{repository} is gated: accept its licence on its hub page, then run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(
            f"{repository} has no revision {revision!r} on the hub; check what is behind the @."
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"The hub has no model {repository!r} (or it is private: `hf auth login`).") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        try:  # a cached commit whose list of files is not cached: hub 1.x asks the network for it all the same
            folder = Path(fetch(local_files_only=True))
        except LocalEntryNotFoundError:
            at = f" --revision {revision}" if revision else ""
            raise UsageError(
                f"{repository} is not in the local cache and the hub cannot be reached. On a machine with a connection "
                f"run `hf download {repository}{at} --local-dir FOLDER`, copy FOLDER here and give its path as the "
                "model; or use --model tiny, which is packaged."
            ) from error
    return folder.name, folder


def _check_folder(name: str, folder: Path) -> None:
    """What can be said about a checkpoint before loading it."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UsageError(f"{folder} holds no model: there is no config.json in it. Give the folder that has one.")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise UsageError(f"{config_file} is not valid JSON ({error}); copy the model again.") from error
    if not list(folder.glob("*.safetensors")):
        pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
        reason = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no weights"
        raise UsageError(
            f"{name} has {reason}. cotune reads safetensors only: convert it with model.save_pretrained(folder), "
            "or choose another model."
        )
    architectures = config.get("architectures") or []
    if architectures and not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        raise UsageError(f"{name} is a {architectures[0]}, not a causal language model; choose one that is.")
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UsageError(f"{name} has no tokenizer (tokenizer.json) beside its weights; save it into {folder}.")


def _load_model(name: str, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise UsageError(f"{name} cannot be loaded as a causal language model: {_first_sentence(error)}") from error
    model: PreTrainedModel = loaded[0]
    if loaded[1]["missing_keys"]:
        missing = sorted(loaded[1]["missing_keys"])
        raise UsageError(f"The checkpoint of {name} lacks {len(missing)} weights ({missing[0]} ...); copy it again.")
    return model


def _load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(f"The tokenizer of {name} cannot be loaded: {_first_sentence(error)}") from error
    if not tokenizer.chat_template:
        raise UsageError(
            f"{name} has no chat template, so it is a base model: take its instruction-tuned sibling, or put a "
            "chat_template.jinja beside its tokenizer."
        )
    return tokenizer


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
