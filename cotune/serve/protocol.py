"""What the endpoint takes and gives: the part of OpenAI's chat completions that means something here.

The rest is refused with a sentence rather than ignored. Knows nothing of HTTP, models or batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cotune.engines.base import Sampling
from cotune.plans import recorded, tokens_read
from cotune.values import Completion, Conditioning, Example, Samples


class Refused(Exception):
    """An answer that is an error object; `param` is the parameter it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Message(_Strict):
    role: str
    content: str


class ChatRequest(_Strict):
    """One question: `messages` is one user message. `context` and `choices` for tasks whose questions have them."""

    model: str
    messages: list[_Message]
    context: str | None = None
    choices: list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=64)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, decoding: Sampling) -> Sampling:
        """`decoding` with what is asked for instead. Greedy requests do not differ by what only sampling reads."""
        asked = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        sampling = replace(decoding, n=self.n, **asked)  # type: ignore[arg-type]
        return replace(sampling, seed=decoding.seed, top_p=decoding.top_p) if sampling.temperature == 0 else sampling

    def drawing(self, decoding: Sampling) -> Sampling | None:
        """What an inference plan of several samples draws with. None for a request that says itself how to sample: it
        gets as many single completions as it asks for."""
        if self.temperature is not None or self.top_p is not None or self.n > 1:
            return None
        limit = self.max_completion_tokens or self.max_tokens or decoding.max_new_tokens
        return replace(decoding, max_new_tokens=limit, seed=decoding.seed if self.seed is None else self.seed)


def read(body: bytes, served: str) -> ChatRequest:
    """Raises Refused for what is no request of this form, another model, and what this endpoint does not do."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None
    if request.model != served:
        raise Refused(404, f"There is no model {request.model!r} here, only {served!r}.", "model", "model_not_found")
    if request.stream:
        raise Refused(400, "Answers are not streamed here. Ask without stream.", "stream")
    if request.max_tokens and request.max_completion_tokens:
        raise Refused(400, "max_tokens and max_completion_tokens mean the same. Give one of them.", "max_tokens")
    if len(request.stops) > 4 or not all(request.stops):
        raise Refused(400, "stop takes one to four texts, none of them empty.", "stop")
    roles = [message.role for message in request.messages]
    if roles != ["user"]:
        raise Refused(
            400,
            "Instruction and examples are applied here, so send the question alone, as one user message (there "
            f"{'are' if len(roles) != 1 else 'is'} {', '.join(map(repr, roles)) or 'none'}).",
            "messages",
        )
    if not request.messages[0].content.strip():
        raise Refused(400, "The question is empty.", "messages")
    return request


def _invalid(error: ValidationError) -> Refused:
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "json_invalid":
        return Refused(400, f"The body is not JSON ({first['ctx']['error']}).")
    if first["type"] == "extra_forbidden":
        known = ", ".join(ChatRequest.model_fields)
        return Refused(400, f"There is no parameter {where!r} here. Known: {known}.", where, "unknown_parameter")
    return Refused(400, f"{where or 'The body'} is not valid: {first['msg']}.", where or None)


def example_of(request: ChatRequest, fields: tuple[str, ...], choices: int) -> Example:
    """The question as the task sees it. Raises Refused where context or choices are missing, or there are none."""
    if ("context" in fields) != bool(request.context):
        told = "need their context: send it as" if "context" in fields else "have no context: leave out"
        raise Refused(400, f"Questions of this task {told} the parameter context.", "context")
    if len(request.choices or ()) != choices:
        told = f"have {choices} choices: send them as" if choices else "have no choices: leave out"
        raise Refused(400, f"Questions of this task {told} the parameter choices.", "choices")
    question = request.messages[0].content.strip()
    return Example("request", question, "", request.context or "", choices=tuple(request.choices or ()))


def reply(
    identity: str,
    created: int,
    request: ChatRequest,
    conditioning: Conditioning,
    completions: Sequence[Completion],
    samples: Samples | None = None,
) -> dict[str, Any]:
    """A chat.completion. `usage` counts all that was generated; `cotune` says which instruction and adapter gave it,
    and where a plan made one answer of several `samples`, how many there were, the share that agrees with it, and the
    difficulty bin that chose the plan if one did."""
    generated = samples.completions if samples else completions
    read = tokens_read(samples.plan.chain if samples else 1, [c.prompt_tokens for c in generated])
    written = sum(c.generated_tokens for c in generated)
    adapter = conditioning.adapter.digest if conditioning.adapter else None
    made: dict[str, Any] = {"instruction": conditioning.prompt.instruction, "adapter": adapter}
    if samples:
        made |= {"plan": recorded(samples.plan), "agreement": samples.agreement}
        made |= {"bin": samples.told.bin} if samples.told else {}
    return {
        "id": identity,
        "object": "chat.completion",
        "created": created,
        "model": request.model,
        "choices": [_choice(i, completion, request.stops) for i, completion in enumerate(completions)],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
        "cotune": made,
    }


def _choice(index: int, completion: Completion, stops: list[str]) -> dict[str, Any]:
    """Cut before the first of `stops`, which counts as an end."""
    cut = min((at for stop in stops if (at := completion.text.find(stop)) >= 0), default=None)
    ended = cut is not None or not completion.truncated
    return {
        "index": index,
        "message": {"role": "assistant", "content": completion.text[:cut]},
        "finish_reason": "stop" if ended else "length",
        "logprobs": None,
    }
