"""The generations of one HTTP request, one per prompt; choices are numbered across prompts, prompt-major."""

import logging
from collections.abc import AsyncGenerator, Iterable, Sequence

from api.errors import GenerationError
from api.metrics import RequestTimer
from api.requests.builder import Prepared
from api.requests.schemas import CompletionTokensDetails, PromptTokensDetails, UsageInfo
from api.server import Server
from api.streaming import merge
from jaxserve.engine.output_processor import ChoiceDelta, CollectedChoice, GenerationStream, collect_choices
from jaxserve.errors import RequestError, UnavailableError
from jaxserve.request import FinishReason

logger = logging.getLogger(__name__)


class RunningRequest:
    """Starts the generations on construction; `close` must be called however the request ends.

    Attributes:
        id: id of the response.
        model: name of the model in the response.
        generations: one per prompt.

    Args:
        server: shared state of the server.
        endpoint: name of the endpoint in logs and metrics.
        answer_id: id of the response, which clients see and may abort.
        prepared: engine requests, one per prompt.

    Raises:
        NotFoundError: an adapter was unloaded after the request named it.
        RequestError: the id is in use, or there are more choices than can ever run or wait.
        OverloadedError, UnavailableError: not all generations could be queued; those already queued are aborted.
    """

    def __init__(self, server: Server, endpoint: str, answer_id: str, prepared: Sequence[Prepared]) -> None:
        server.check_accepting()
        if answer_id in server.running:
            raise RequestError(f"request id {answer_id!r} is in use", param="rid")
        for item in prepared:
            server.adapters.check_loaded(item.request.adapter_key)
        server.client.check_capacity(sum(item.request.num_choices for item in prepared))
        self._server = server
        self._timer = RequestTimer(server.metrics)
        self._ended = False
        self._endpoint = endpoint
        self.id = answer_id
        self.model = prepared[0].model
        self.generations: list[GenerationStream] = []
        server.running[answer_id] = self.generations
        try:
            for item in prepared:
                generation = GenerationStream(server.client, server.tokenizer, item.request, item.options)
                self.generations.append(generation)
        except BaseException:
            self.close()
            raise
        server.metrics.requests.labels(endpoint).inc()
        server.metrics.prompt_tokens.inc(sum(generation.usage.prompt_tokens for generation in self.generations))

    @property
    def choices_per_prompt(self) -> int:
        """Number of choices per prompt."""
        return self.generations[0].request.num_choices

    @property
    def num_choices(self) -> int:
        """Number of choices over all prompts."""
        return sum(generation.request.num_choices for generation in self.generations)

    async def deltas(self) -> AsyncGenerator[tuple[int, ChoiceDelta]]:
        """Yield each delta with the index of its choice over all prompts."""
        async for prompt, delta in merge([generation.deltas() for generation in self.generations]):
            index = prompt * self.choices_per_prompt + delta.choice
            if delta.text or delta.message_deltas or delta.tokens:
                self._timer.token(index)
            yield index, delta
        self._ended = True

    async def collect(self) -> list[CollectedChoice]:
        """Return all choices once they are complete; raises like `raise_errors`."""
        choices = await collect_choices(self.deltas(), self.num_choices)
        self.raise_errors(choice.end for choice in choices)
        return choices

    def raise_errors(self, ends: Iterable[ChoiceDelta]) -> None:
        """Raise an exception if a choice ended with an error.

        Raises:
            RequestError: the failure is the request's fault.
            UnavailableError: the engine is lost, or the server is shutting down.
            GenerationError: the choice failed for another reason.
        """
        for end in ends:
            if end.finish_reason is FinishReason.ERROR:
                if end.refused:
                    raise RequestError(end.error or "the request cannot be answered")
                self._server.client.check_ready()
                if self._server.draining:
                    raise UnavailableError(end.error or "the server is shutting down")
                raise GenerationError(end.error or "generation failed")

    def close(self) -> None:
        """Release all resources and abort generations that still run. Never waits."""
        for generation in self.generations:
            generation.close()
        self._server.running.pop(self.id, None)
        if not self.generations:
            return
        metrics = self._server.metrics
        metrics.output_tokens.inc(sum(generation.usage.completion_tokens for generation in self.generations))
        if not self._ended:
            metrics.aborts.inc()
        self._timer.end()
        if self._server.settings.log_requests:
            usage = usage_info(self)
            logger.info(
                "%s %s: %d prompt tokens (%d cached), %d output tokens%s",
                self._endpoint,
                self.id,
                usage.prompt_tokens,
                usage.prompt_tokens_details.cached_tokens,
                usage.completion_tokens,
                "" if self._ended else ", aborted",
            )


def usage_info(running: RunningRequest) -> UsageInfo:
    """Return the usage so far, summed over all prompts."""
    usages = [generation.usage for generation in running.generations]
    prompt, completion = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    cached, reasoning = sum(u.cached_tokens for u in usages), sum(u.reasoning_tokens for u in usages)
    return UsageInfo(
        prompt, completion, prompt + completion, PromptTokensDetails(cached), CompletionTokensDetails(reasoning)
    )
