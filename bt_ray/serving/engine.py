"""What the guard asks of the engine behind it, and how vLLM's does it. Runs inside the vLLM process."""

import asyncio
import itertools
import os
import platform as machine
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """The engine of a server whose guard is closed: no prompt is under way, except for `probe`."""

    async def load(self, path: str) -> None:
        """Load the checkpoint in this folder in place of what is loaded, and forget what was computed with that."""

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """The log-probability of each token but the first, given those before it."""

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
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._numbers = itertools.count()

    async def load(self, path: str) -> None:
        await self._client.collective_rpc("reload_weights", kwargs={"weights_path": path})
        if not await self._client.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not dropped")

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        output = await self._generated(tokens, prompt_logprobs=0)
        return [
            float(known[token].logprob)
            for token, known in zip(tokens, output.prompt_logprobs, strict=True)
            if known is not None
        ]

    async def probe(self) -> None:
        # A full engine may keep a new request waiting for minutes: that others get tokens will do.
        before = _tokens_computed()
        token = asyncio.ensure_future(self._generated([1, 2, 3, 4]))
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
        device = torch.cuda.get_device_name() if on_gpu else f"{_processor()}, {os.environ.get('OMP_NUM_THREADS')} threads"
        ranks = config.parallel_config.tensor_parallel_size
        kind = "gpu" if on_gpu else "cpu"
        return f"{kind}: vllm {vllm.__version__}, {device}, {config.model_config.dtype}, {ranks} ranks"

    async def sleep(self) -> None:
        await self._client.sleep(level=1)

    async def wake(self) -> None:
        await self._client.wake_up()

    async def _generated(self, tokens: Sequence[int], **sampling: Any) -> Any:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, **sampling)
        name = f"bt-ray-{next(self._numbers)}"
        last = None
        async for output in self._client.generate({"prompt_token_ids": list(tokens)}, parameters, name):
            last = output
        if last is None:
            raise RuntimeError("the engine gave no answer")
        return last


def vllm_engine(client: Any) -> Engine:
    return VllmEngine(client)


def _tokens_computed() -> float:
    from prometheus_client import REGISTRY

    metrics = [metric for metric in REGISTRY.collect() if metric.name in TOKEN_COUNTERS]
    return sum(float(sample.value) for metric in metrics for sample in metric.samples if sample.name.endswith("_total"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), machine.machine())
