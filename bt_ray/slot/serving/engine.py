"""What the guard asks of the engine behind it, and how vLLM's does it. Runs inside the vLLM process."""

import asyncio
import itertools
import os
from collections.abc import Sequence
from typing import Any, Protocol

from bt_ray.slot.arithmetic import ISA_VARIABLES, processor


class Engine(Protocol):
    """The engine of a server whose guard is closed: no prompt is under way, except for `probe`."""

    async def load(self, path: str) -> None:
        """Load the checkpoint in this folder in place of what is loaded, and forget what was computed with that."""

    async def load_adapter(self, name: str, path: str) -> None:
        """Load the LoRA adapter in this folder beside what is loaded, under a name that is never used for two."""

    async def drop_adapter(self, name: str) -> None:
        """Forget an adapter."""

    async def logprobs(self, tokens: Sequence[int], adapter: str | None) -> list[float]:
        """The log-probability of each token but the first, given those before it, by the checkpoint or an adapter on it."""

    async def probe(self) -> None:
        """Return when the engine has given a token, to whomever."""

    def platform(self) -> str:
        """What the last bits of log-probabilities depend on, beside the weights."""

    async def sleep(self) -> None:
        """Free the accelerator's memory."""

    async def wake(self) -> None:
        """Take it back."""


PROGRESS_S = 0.2
TOKEN_COUNTERS = ("vllm:generation_tokens", "vllm:prompt_tokens")


class VllmEngine:
    """vLLM's own, through the client that its server uses.

    Args:
        client: `vllm.v1.engine.async_llm.AsyncLLM`.
        models: `vllm.entrypoints.openai.models.serving.OpenAIServingModels`, which knows what names requests may use.
    """

    def __init__(self, client: Any, models: Any) -> None:
        self._client = client
        self._models = models
        self._numbers = itertools.count()

    async def load(self, path: str) -> None:
        await self._client.collective_rpc("reload_weights", kwargs={"weights_path": path})
        if not await self._client.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not dropped")

    async def load_adapter(self, name: str, path: str) -> None:
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        answer = await self._models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=path))
        if not isinstance(answer, str):
            raise RuntimeError(answer.error.message)

    async def drop_adapter(self, name: str) -> None:
        adapter = self._models.lora_requests.pop(name, None)
        if adapter is not None:
            await self._client.remove_lora(adapter.lora_int_id)

    async def logprobs(self, tokens: Sequence[int], adapter: str | None) -> list[float]:
        output = await self._generate(tokens, adapter, prompt_logprobs=0)
        return [
            float(known[token].logprob)
            for token, known in zip(tokens, output.prompt_logprobs, strict=True)
            if known is not None
        ]

    async def probe(self) -> None:
        # A full engine may keep a new request waiting for minutes: that others get tokens will do.
        before = _tokens_computed()
        token = asyncio.ensure_future(self._generate([1, 2, 3, 4], None))
        try:
            while not (await asyncio.wait({token}, timeout=PROGRESS_S))[0]:
                if _tokens_computed() > before:
                    return
            await token
        finally:
            token.cancel()

    def platform(self) -> str:
        import torch
        import vllm

        config = self._client.vllm_config
        on_gpu = torch.cuda.is_available() and config.device_config.device_type == "cuda"
        device = torch.cuda.get_device_name() if on_gpu else _cpu()
        ranks = config.parallel_config.tensor_parallel_size
        kind, adapters = "gpu" if on_gpu else "cpu", ", adapters" if config.lora_config is not None else ""
        return f"{kind}: vllm {vllm.__version__}, {device}, {config.model_config.dtype}, {ranks} ranks{adapters}"

    async def sleep(self) -> None:
        await self._client.sleep(level=1)

    async def wake(self) -> None:
        await self._client.wake_up()

    async def _generate(self, tokens: Sequence[int], adapter: str | None, **sampling: Any) -> Any:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, **sampling)
        name = f"bt-ray-{next(self._numbers)}"
        lora = None if adapter is None else self._models.lora_requests[adapter]
        last = None
        async for output in self._client.generate({"prompt_token_ids": list(tokens)}, parameters, name, lora_request=lora):
            last = output
        if last is None:
            raise RuntimeError("the engine gave no answer")
        return last


def vllm_engine(state: Any) -> Engine:
    """The engine of vLLM's server, whose application has this state."""
    return VllmEngine(state.engine_client, state.openai_serving_models)


def _tokens_computed() -> float:
    from prometheus_client import REGISTRY

    metrics = [metric for metric in REGISTRY.collect() if metric.name in TOKEN_COUNTERS]
    return sum(float(sample.value) for metric in metrics for sample in metric.samples if sample.name.endswith("_total"))


def _cpu() -> str:
    masked = [value for name in ISA_VARIABLES if (value := os.environ.get(name))]
    return ", ".join([processor(), *masked, f"{os.environ.get('OMP_NUM_THREADS')} threads"])
