"""Measure what a verified swap of weights saves: against a relaunch of the same server, idle and under load.

    python scripts/bench_swap.py --model models/SmolLM2-135M-Instruct
    python scripts/bench_swap.py --model Qwen/Qwen2.5-1.5B-Instruct --gpus 1 --way adapter      # or reload, sleep

One run on real vLLM in one slot. Each time is from the call to the first correct token: of a swap, file check, reload and
canary are in it; of a relaunch, everything from the start of the process, with the fastest settings and a warm page cache.
Answers after a swap must equal, token by token at temperature 0, those of a server that was just started on these weights.

The ways: `reload` loads a merged checkpoint into the running server; `adapter` another LoRA adapter; `sleep` has the server
give its memory to a training (on GPUs) and wakes it up for the result. The last two compare first tokens.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from bt_ray.models import Endpoint
from bt_ray.run_dir.storage import open_storage
from bt_ray.settings.config import ServerConfig, TrainConfig
from bt_ray.slot.base_models import base_weights
from bt_ray.slot.slot import Slot
from bt_ray.weights import Weights

LABELS = ("amber", "cobalt", "jade")
IN_FLIGHT, ANSWER_TOKENS = 32, 24
UNEQUAL = "not the answers of a fresh start"


def conversation(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Answer with the color of the box, and nothing else."},
        {"role": "user", "content": f"Box number {number} stands in row {number % len(LABELS)}. Which color does it have?"},
    ]


def ask(endpoint: Endpoint, number: int, max_tokens: int = ANSWER_TOKENS) -> list[str]:
    """The tokens of the answer.

    Raises:
        httpx.HTTPStatusError: The server refused.
    """
    body = {"model": endpoint.weights_id, "messages": conversation(number), "max_tokens": max_tokens}
    body |= {"temperature": 0, "logprobs": True}
    answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, headers=endpoint.headers, timeout=300)
    answer.raise_for_status()
    return [token["token"] for token in answer.json()["choices"][0]["logprobs"]["content"]]


def answers(endpoint: Endpoint, count: int) -> list[list[str]]:
    return [ask(endpoint, number) for number in range(count)]


def first_token(slot: Slot, weights: Weights) -> tuple[str, float]:
    """The first token of an answer, and the seconds from the call of `serve` until it was there."""
    began = time.monotonic()
    (token,) = ask(slot.serve(weights), 0, max_tokens=1)
    return token, time.monotonic() - began


def first_tokens(slot: Slot, weights: Weights, count: int) -> list[str]:
    return [answer[0] for answer in answers(slot.serve(weights), count)]


def timed(slot: Slot, weights: Weights, expected: list[str], how: str) -> float:
    """Seconds from the call of `serve` to the first token, which must be right."""
    first, took_s = first_token(slot, weights)
    assert first == expected[0], f"the first token is {first}, not {expected[0]}"
    assert slot.change.how == how, slot.change
    return took_s


def under_load(slot: Slot, now: Weights, then: Weights, expected: dict[str, list[list[str]]]) -> tuple[float, int, int]:
    """The seconds of a swap with requests in flight, and how many were answered, rightly, and refused."""
    endpoint = slot.serve(now)
    ended, lock, answered, refused = threading.Event(), threading.Lock(), 0, 0

    def client(number: int) -> None:
        nonlocal answered, refused
        while not ended.is_set():
            try:
                found = ask(endpoint, number % len(expected[now.id]))
            except httpx.HTTPStatusError as error:
                if error.response.json()["error"]["code"] != "refused":
                    raise
                with lock:
                    refused += 1
                return
            # In a batch the last bits differ, and with them, rarely, a token: the first one tells the weights apart.
            assert found[0] == expected[now.id][number % len(expected[now.id])][0], f"{found} is not by {now.id}"
            with lock:
                answered += 1

    with ThreadPoolExecutor(IN_FLIGHT) as clients:
        running = [clients.submit(client, number) for number in range(IN_FLIGHT)]
        while answered < IN_FLIGHT:
            time.sleep(0.01)
        took_s = timed(slot, then, expected[then.id][0], "swap")
        ended.set()
        for each in running:
            each.result()
    return took_s, answered, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--way", choices=list(WAYS), default="reload")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    options = parser.parse_args()
    measure, settings = WAYS[options.way]
    sizes = {"gpus": options.gpus, "threads": options.threads, "max_model_len": 1024, "max_num_seqs": IN_FLIGHT}
    model = str(options.model.resolve() if options.model.exists() else options.model)
    with tempfile.TemporaryDirectory() as run_dir:
        config = ServerConfig.model_validate({**settings, **sizes})
        slot = Slot("bench", config, token="bench", host="127.0.0.1", storage=open_storage(run_dir))
        try:
            measure(slot, base_weights(model, {}), options.repeats, options.prompts)
        finally:
            slot.close()


def measure_reload(slot: Slot, base: Weights, repeats: int, prompts: int) -> None:
    expected = {base.id: answers(slot.serve(base), prompts)}
    trained = fine_tuned(slot, base)
    expected[trained.id] = fresh_answers(slot, trained, prompts)  # this start fills the page cache
    assert expected[trained.id] != expected[base.id], "the fine-tune changed nothing"
    relaunches = relaunched(slot, trained, expected[trained.id], repeats)
    swaps: dict[str, list[float]] = {base.id: [], trained.id: []}
    for _ in range(repeats):
        for weights in (base, trained):
            swaps[weights.id].append(timed(slot, weights, expected[weights.id][0], "swap"))
            assert answers(slot.serve(weights), prompts) == expected[weights.id], UNEQUAL
    loaded = [under_load(slot, trained, base, expected), under_load(slot, base, trained, expected)]

    show("relaunch", relaunches)
    show("swap to the fine-tune", swaps[trained.id])
    show("swap to the base", swaps[base.id])
    show_ratio(relaunches, swaps[trained.id])
    for took_s, answered, refused in loaded:
        told = f"{answered} answered, none by other weights; {refused} refused"
        print(f"{f'swap, {IN_FLIGHT} in flight':<24}{took_s:7.2f} s   ({told})")
    print(f"Answers after each swap equal those of a fresh start, token by token, on {prompts} prompts.")


def measure_adapter(slot: Slot, base: Weights, repeats: int, prompts: int) -> None:
    """Two adapters on a server that holds one beside the base: each swap drops one and loads the other."""
    slot.serve(base)
    trained = [fine_tuned(slot, base, seed) for seed in (0, 1)]
    expected = {weights.id: fresh_answers(slot, weights, prompts) for weights in trained}
    relaunches = relaunched(slot, trained[-1], expected[trained[-1].id], repeats)
    swaps = []
    for _ in range(repeats):
        for weights in trained:
            swaps.append(timed(slot, weights, expected[weights.id][0], "swap"))
            assert first_tokens(slot, weights, prompts) == [answer[0] for answer in expected[weights.id]], UNEQUAL
    show("relaunch", relaunches)
    show("another adapter", swaps)
    show_ratio(relaunches, swaps)


def measure_sleep(slot: Slot, base: Weights, repeats: int, prompts: int) -> None:
    """From the end of a training, during which the server slept, to the first token of its result."""
    slot.serve(base)
    relaunches, swaps = [], []
    for seed in range(repeats):
        trained = fine_tuned(slot, base, seed)
        first, took_s = first_token(slot, trained)
        assert slot.change.how == "swap", slot.change
        swaps.append(took_s)
        found = [first, *first_tokens(slot, trained, prompts)]
        slot.stop()
        first, took_s = first_token(slot, trained)
        relaunches.append(took_s)
        assert found == [first, *first_tokens(slot, trained, prompts)], UNEQUAL
    show("relaunch", relaunches)
    show("wake and swap", swaps)
    show_ratio(relaunches, swaps)


WAYS: dict[str, tuple[Callable[[Slot, Weights, int, int], None], dict[str, Any]]] = {
    "reload": (measure_reload, {}),
    "adapter": (measure_adapter, {"fine_tunes": "adapters", "max_loras": 1}),
    "sleep": (measure_sleep, {"while_training": "sleep"}),
}


def fine_tuned(slot: Slot, base: Weights, seed: int = 0) -> Weights:
    data = [{"messages": [*conversation(n), {"role": "assistant", "content": LABELS[n % len(LABELS)]}]} for n in range(24)]
    return slot.train(base, data, TrainConfig(epochs=4, learning_rate=1e-3, batch_size=8), seed=seed)


def fresh_answers(slot: Slot, weights: Weights, prompts: int) -> list[list[str]]:
    """Those of a server that was just started on these weights."""
    slot.stop()
    return answers(slot.serve(weights), prompts)


def relaunched(slot: Slot, weights: Weights, expected: list[list[str]], repeats: int) -> list[float]:
    """Seconds of some relaunches."""
    times = []
    for _ in range(repeats):
        slot.stop()
        times.append(timed(slot, weights, expected[0], "start"))
    return times


def show_ratio(relaunches: Sequence[float], swaps: Sequence[float]) -> None:
    print(f"{'ratio, relaunch / swap':<24}{statistics.median(relaunches) / statistics.median(swaps):7.1f}")


def show(name: str, times: Sequence[float]) -> None:
    each = ", ".join(f"{seconds:.2f}" for seconds in times)
    print(f"{name:<24}{statistics.median(times):7.2f} s   (median of {len(times)}: {each})")


if __name__ == "__main__":
    main()
