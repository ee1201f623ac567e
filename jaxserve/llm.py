"""Offline use of the engine: `LLM("demo").generate(["Hello"], SamplingParams(max_tokens=8))`."""

import asyncio
import os
import threading
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from jaxserve.config import EngineConfig, adapter_name_problem
from jaxserve.engine.builder import build_engine
from jaxserve.engine.in_process_client import InProcessEngineClient
from jaxserve.engine.messages import EngineStats
from jaxserve.engine.output_processor import CollectedChoice, GenerationStream, TextOptions, Usage, collect_choices
from jaxserve.errors import AdapterError, NotFoundError, RequestError
from jaxserve.loading.generation_config import find_generation_config
from jaxserve.loading.hub import find_model
from jaxserve.request import AdapterSource, FinishReason, Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.tokenizer import load_tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class ChoiceOutput:
    """One finished choice.

    Attributes:
        text: output text, without the stop string unless `keep_stop` is set.
        token_ids: output tokens, without a hidden stop token.
        logprobs: log-probabilities of these tokens if requested with `num_logprobs`, else empty.
        finish_reason: why the choice ended.
        matched_stop: the token id or string that ended the choice.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    matched_stop: int | str | None


@dataclass(frozen=True)
class GenerationOutput:
    """The finished choices of one prompt."""

    prompt_token_ids: tuple[int, ...]
    choices: tuple[ChoiceOutput, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


class LLM:
    """A model that runs in this process. Also a context manager.

    Args:
        model: `demo`, a folder, a `.gguf` file or a Hugging Face id.
        chat_template: a Jinja template that replaces the model's.
        options: fields of `EngineConfig`, such as `dtype`, `tp_size`, `context_length`.

    Raises:
        LaunchError: the model cannot be loaded.
    """

    def __init__(self, model: str, *, chat_template: str | None = None, **options: Any) -> None:
        config = EngineConfig(model_path=model, show_progress=False, **options)
        path = find_model(model, config.revision, config.download_dir)
        self._tokenizer = load_tokenizer(path, chat_template)
        built = build_engine(msgspec.structs.replace(config, model_path=str(path)), lambda items, *_: items)
        self.info = built.info
        self._lora = config.lora
        # Adapter keys by adapter name.
        self._adapters = {key: key for key in built.info.adapters or ()}
        generation = find_generation_config(model, path)
        self._default_sampling = SamplingParams(**generation.sampling)
        ends = {*built.info.eos_token_ids, *self._tokenizer.eos_token_ids, *generation.eos_token_ids}
        self._eos_token_ids = tuple(sorted(ends))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()

        async def connect() -> InProcessEngineClient:
            return InProcessEngineClient(built.engine, built.info)

        self._client = self._wait(connect())

    @property
    def stats(self) -> EngineStats:
        """The engine's gauges and counters."""
        return self._client.stats

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        *,
        num_choices: int = 1,
        adapter: str = "",
        options: TextOptions | None = None,
    ) -> list[GenerationOutput]:
        """Continue prompts, all in one batch; outputs are in the order of the prompts.

        Args:
            prompts: one text, or several texts or lists of token ids.
            sampling: sampling parameters for all prompts; the model's defaults if None.
            num_choices: number of continuations of each prompt.
            adapter: name of the LoRA adapter to apply; empty for none.
            options: stop strings and other options for converting tokens to text.

        Raises:
            RequestError: a prompt or parameter is invalid.
        """
        return self._wait(self._generate(prompts, sampling, options, num_choices=num_choices, adapter=adapter))

    async def agenerate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        *,
        num_choices: int = 1,
        adapter: str = "",
        options: TextOptions | None = None,
    ) -> list[GenerationOutput]:
        """`generate` for async callers, on any event loop."""
        work = self._generate(prompts, sampling, options, num_choices=num_choices, adapter=adapter)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        num_choices: int = 1,
        adapter: str = "",
        options: TextOptions | None = None,
    ) -> GenerationOutput:
        """Answer a conversation through the model's chat template."""
        ids = self._render(messages, chat_template_kwargs)
        return self.generate([ids], sampling, num_choices=num_choices, adapter=adapter, options=options)[0]

    async def achat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        num_choices: int = 1,
        adapter: str = "",
        options: TextOptions | None = None,
    ) -> GenerationOutput:
        """`chat` for async callers."""
        ids = self._render(messages, chat_template_kwargs)
        return (await self.agenerate([ids], sampling, num_choices=num_choices, adapter=adapter, options=options))[0]

    def load_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Load a LoRA adapter that fits the slots of `LoraConfig`; `generate` accepts its name from then on.

        Raises:
            AdapterError: the adapter cannot be read or does not fit, or its name is in use.
        """
        if (problem := adapter_name_problem(name)) is not None:
            raise AdapterError(problem)
        self._wait(self._load_adapter(name, str(folder)))

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter; returns when the last call that uses it has ended.

        Raises:
            NotFoundError: the adapter is not loaded.
        """
        key = self._adapter_key(name)
        del self._adapters[name]
        self._wait(self._client.unload_adapter(key))

    def close(self) -> None:
        """Stop the engine; unfinished calls are dropped."""
        self._client.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _render(self, messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any] | None) -> list[int]:
        prompt = self._tokenizer.chat_template.render(messages, kwargs or {})
        return self._tokenizer.encode(
            prompt, add_special_tokens=False, max_tokens=self.info.context_length, param="messages"
        )

    async def _generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling: SamplingParams | None,
        options: TextOptions | None,
        **fields: Any,
    ) -> list[GenerationOutput]:
        sampling = sampling or self._default_sampling
        sampling.check_token_ids(self.info.vocab_size)
        requests = [
            self._request(prompt, sampling, **fields) for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        ]
        generations = [
            GenerationStream(self._client, self._tokenizer, request, options or TextOptions()) for request in requests
        ]
        try:
            return list(await asyncio.gather(*(_collect(generation) for generation in generations)))
        finally:
            for generation in generations:
                generation.close()

    def _request(
        self, prompt: str | Sequence[int], sampling: SamplingParams, *, adapter: str, **fields: Any
    ) -> Request:
        limit = self.info.context_length
        if isinstance(prompt, str):
            prompt = self._tokenizer.encode(prompt, add_special_tokens=True, max_tokens=limit, param="prompts")
        if not prompt or len(prompt) + sampling.max_tokens > limit:
            raise RequestError(
                f"a prompt must have 1 to {limit - sampling.max_tokens} tokens (context length minus max_tokens), "
                f"got {len(prompt)}",
                param="prompts",
            )
        if not all(0 <= token_id < self.info.vocab_size for token_id in prompt):
            raise RequestError(f"token ids must be in [0, {self.info.vocab_size})", param="prompts")
        return Request(
            id=uuid.uuid4().hex,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            eos_token_ids=self._eos_token_ids,
            adapter_key=self._adapter_key(adapter) if adapter else "",
            **fields,
        )

    async def _load_adapter(self, name: str, folder: str) -> None:
        if name in self._adapters:
            raise AdapterError(f"the adapter {name!r} is already loaded")
        if self._lora is not None and not self._lora.fits_slots(num_pinned=len(self._lora.pinned), num_others=1):
            raise AdapterError("all LoRA slots are used by pinned adapters")
        key = f"{name}:{uuid.uuid4().hex}"
        self._adapters[name] = key  # reserves the name while the adapter is loading
        try:
            await self._client.load_adapter(AdapterSource(key=key, folder=folder))
        except BaseException:
            del self._adapters[name]
            raise

    def _adapter_key(self, name: str) -> str:
        if name not in self._adapters:
            loaded = ", ".join(self._adapters) or "none"
            raise NotFoundError(f"the adapter {name!r} does not exist; loaded: {loaded}", param="adapter")
        return self._adapters[name]


async def _collect(generation: GenerationStream) -> GenerationOutput:
    deltas = ((delta.choice, delta) async for delta in generation.deltas())
    choices = await collect_choices(deltas, generation.request.num_choices)
    for choice in choices:
        if choice.end.finish_reason is FinishReason.ERROR:
            raise RuntimeError(choice.end.error)
    return GenerationOutput(
        generation.request.prompt_token_ids,
        tuple(_choice_output(choice) for choice in choices),
        generation.usage,
    )


def _choice_output(choice: CollectedChoice) -> ChoiceOutput:
    assert choice.end.finish_reason is not None
    return ChoiceOutput(
        text=choice.text,
        token_ids=tuple(choice.token_ids),
        logprobs=tuple(token.logprobs.logprob for token in choice.tokens),
        finish_reason=choice.end.finish_reason,
        matched_stop=choice.end.matched_stop,
    )
