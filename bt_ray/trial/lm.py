"""The DSPy side of a served model: an LM, its engine and its provider.

`ServedLM` is a `dspy.LM` named `openai/<weights id>`, so DSPy's cache never mixes two versions. Its engine asks `Models`
for an endpoint at each request and repeats a request whose server was lost; its provider turns DSPy's `launch`, `kill`
and `finetune` into calls of `Models`. All of them return themselves from `__deepcopy__`: a copy of a program keeps its LM.
"""

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Any, Self

import dspy
from dspy._vendor.lm15.transports import StdlibTransport
from dspy.clients.engines.lm15_engine import LM15Engine
from dspy.clients.provider import Provider, TrainingJob
from dspy.lm15 import ContextLengthError, InvalidRequestError, LM15Error, Request, Response, RouterConfig

from bt_ray.errors import InfrastructureError, ServerError, TaskError
from bt_ray.models import Endpoint, Models
from bt_ray.settings.config import LMConfig
from bt_ray.trial.failure_latch import FailureLatch
from bt_ray.trial.failures import is_lost_answer, is_refusal
from bt_ray.weights import Weights

MODEL_PREFIX = "openai/"
CONTEXT_EXCEEDED = "maximum context length"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 8.0
"""Before a request is repeated whose server failed, doubled each time."""
REFUSALS = 50
"""How often one request may be refused, by servers that went to other weights, until that counts as a failure."""
STEP_SETTING = "bt_ray_step"
"""The name under which DSPy's settings carry the step that a thread works for."""


class EmptyTrainingSet(TaskError):
    """A weight optimizer was left without training data."""


@dataclass(frozen=True)
class Usage:
    """What answers took.

    Attributes:
        requests: Their number.
        prompt_tokens: Tokens in.
        completion_tokens: Tokens out.
        cut_off: Answers that ended because `max_tokens` or the context was full.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut_off: int = 0

    def plus(self, other: "Usage") -> "Usage":
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cut_off + other.cut_off,
        )

    def since(self, earlier: "Usage") -> "Usage":
        return Usage(
            self.requests - earlier.requests,
            self.prompt_tokens - earlier.prompt_tokens,
            self.completion_tokens - earlier.completion_tokens,
            self.cut_off - earlier.cut_off,
        )


def usage_of(response: Response) -> Usage:
    """What one answer took."""
    tokens_in, tokens_out = response.usage.input_tokens or 0, response.usage.output_tokens or 0
    return Usage(1, tokens_in, tokens_out, int(response.finish_reason == "length"))


class ServedLM(dspy.LM):  # type: ignore[misc]
    """A `dspy.LM` whose requests are answered by exactly the weights that its `model` names."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def weights_id(self) -> str:
        return str(self.model).removeprefix(MODEL_PREFIX)


class ServedEngine:
    """Answers DSPy's requests from `Models`: called only when DSPy's cache misses.

    Args:
        models: Who serves the weights.
        latch: Told when infrastructure is lost for good. None where no sweep is: then the error is raised as it is.
        retries: How often a request is repeated after its server was lost and is served again.
        timeout_s: Seconds that one request may take.
        max_connections: Requests in flight.
    """

    def __init__(
        self, models: Models, latch: FailureLatch | None, *, retries: int, timeout_s: float, max_connections: int
    ) -> None:
        self.models = models
        self.latch = latch
        self.step: str | None = None
        self.usage = Usage()
        """Of the requests that were answered."""
        self._retries = retries
        self._timeout_s = timeout_s
        self._max_connections = max_connections
        self._clients: dict[Endpoint, LM15Engine] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def complete(self, request: Request) -> Response:
        """One answer, by the weights that `request.model` names.

        Raises:
            LM15Error: The model's or the caller's failure, as DSPy knows it (a context that is too long, say).
            InfrastructureFailure: No server answered, however often it was tried (`ServerError` without a latch).
        """
        attempt = 0
        if self.latch is not None:
            self.latch.check()
            attempt = self.latch.attempt
        weights_id = request.model.removeprefix(MODEL_PREFIX)
        try:
            response = self._request_answer(request, weights_id)
        except InfrastructureError as error:
            lost = ServerError(f"No server answered for weights {weights_id}: {error}")
            lost.__cause__ = error
            raise lost if self.latch is None else self.latch.trip(lost, attempt) from error
        self.add(usage_of(response))
        return response

    def add(self, usage: Usage) -> None:
        """Count answers that were asked for elsewhere on this engine's behalf, or here."""
        with self._lock:
            self.usage = self.usage.plus(usage)

    def _request_answer(self, request: Request, weights_id: str) -> Response:
        """The answer, by whatever server serves the weights now; asked for again when a server is lost, or goes away."""
        refusals = failures = 0
        while True:
            self._refuse_ended_step()
            with self.models.request(weights_id) as endpoint:
                try:
                    return self._client(endpoint).complete(request)
                except LM15Error as error:
                    if is_refusal(error) and refusals < REFUSALS:
                        refusals += 1
                        self.models.report_refusal(endpoint)
                        continue
                    if not is_lost_answer(error):
                        raise _as_context_error(error) from None
                    self.models.report_loss(endpoint)
                    if failures == self._retries:
                        raise ServerError(str(error)) from error
            time.sleep(min(FIRST_WAIT_S * 2**failures, LONGEST_WAIT_S))
            failures += 1

    def _refuse_ended_step(self) -> None:
        """Threads that a finished evaluation left behind must not bring old weights back."""
        asking = dspy.settings.get(STEP_SETTING)
        if asking is not None and self.step is not None and asking != self.step:
            raise RuntimeError(f"This step ({asking}) has ended; its requests are refused.")

    def _client(self, endpoint: Endpoint) -> LM15Engine:
        with self._lock:
            if endpoint not in self._clients:
                self._clients[endpoint] = LM15Engine(
                    RouterConfig(
                        api_keys={"openai-chat": endpoint.token},
                        base_urls={"openai-chat": f"{endpoint.url}/v1"},
                        transport=self._transport(),
                        env={},
                    )
                )
            return self._clients[endpoint]

    def _transport(self) -> StdlibTransport:
        """Connections that ignore `HTTP_PROXY`: a model server is on this machine or in this cluster."""
        wait_s = self._timeout_s
        return StdlibTransport(
            read_timeout=wait_s,
            write_timeout=wait_s,
            pool_timeout=wait_s,
            max_connections=self._max_connections,
            trust_env=False,
        )


class AsyncServedEngine:
    """`ServedEngine` for `acall`: the same requests, off the event loop."""

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    async def complete(self, request: Request) -> Response:
        return await asyncio.to_thread(self._engine.complete, request)


def _as_context_error(error: LM15Error) -> LM15Error:
    """`error`, or what DSPy knows a prompt by that does not fit, for which `ReAct` shortens its history.

    vLLM says so in words alone (`vllm.renderers.params`).
    """
    if isinstance(error, InvalidRequestError) and CONTEXT_EXCEEDED in error.message:
        return ContextLengthError(error.message, status=error.status, provider=error.provider)
    return error


class ServedProvider(Provider):  # type: ignore[misc]
    """DSPy's launch, kill and finetune for `ServedLM`s."""

    def __init__(self, models: Models, latch: FailureLatch | None) -> None:
        super().__init__()
        self.finetunable = True
        self._models = models
        self._latch = latch

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def launch(self, lm: ServedLM, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Nothing: a server is taken by the first request."""

    def kill(self, lm: ServedLM, launch_kwargs: dict[str, Any] | None = None) -> None:
        self._models.kill(lm.weights_id)

    def finetune(
        self,
        job: TrainingJob,
        model: str,
        train_data: list[dict[str, Any]],
        train_data_format: Any,
        train_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Fine-tune, and return the `model` of the result. Runs in DSPy's own thread, which passes on `Exception` alone."""
        if not train_data:
            raise EmptyTrainingSet("The metric's filter left no training data.")
        attempt = self._latch.attempt if self._latch is not None else 0
        try:
            weights = self._models.finetune(model.removeprefix(MODEL_PREFIX), train_data, train_kwargs or {})
        except InfrastructureError as error:
            if self._latch is not None:
                self._latch.trip(error, attempt)
            raise
        return f"{MODEL_PREFIX}{weights.id}"


def make_served_lm(weights: Weights, engine: ServedEngine, sampling: LMConfig) -> ServedLM:
    """The LM for `weights`, with an engine that its later versions share."""
    return ServedLM(
        f"{MODEL_PREFIX}{weights.id}",
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        num_retries=0,
        engine=engine,
        async_engine=AsyncServedEngine(engine),
        provider=ServedProvider(engine.models, engine.latch),
    )


def student_lm(program: dspy.Module) -> dspy.LM:
    """The LM that a step's optimizers are built with: that of the first predictor."""
    return program.predictors()[0].lm


def assign_lm(program: dspy.Module, lm: dspy.LM) -> None:
    """Give `lm` to every predictor of `program` that has none."""
    for predictor in program.predictors():
        if predictor.lm is None:
            predictor.lm = lm
