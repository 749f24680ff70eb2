"""Measure how fast an evaluation asks: through a DSPy program against the raw closed loop on the same server.

    python scripts/bench_requests.py                                            # a scripted server that answers at once
    python scripts/bench_requests.py --model models/SmolLM2-135M-Instruct       # real vLLM

One run, side by side, the same number of requests in flight: threads that ask the server over kept connections and nothing
else; `dspy.Evaluate` with `dspy.LM(engine="lm15")`; and `dspy.Evaluate` with the LM of a sweep, which leases, counts, and
refuses answers of other weights. DSPy's cache is off, so that each example is one request.

Then, on the scripted server, whole sweeps whose evaluations are spread over processes (`trial.processes`). There DSPy's
cache is on, and empty: each answer is written to it.
"""

import argparse
import contextlib
import cProfile
import http.client
import io
import itertools
import json
import logging
import os
import pstats
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
sys.path[:0] = [str(ROOT / "tests")]
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import dspy  # noqa: E402 - the environment comes first
from support.scripted_model import write_model  # noqa: E402
from support.slot_models import SlotModels  # noqa: E402

from bt_ray.models import Endpoint  # noqa: E402
from bt_ray.settings.config import make_config  # noqa: E402
from bt_ray.trial.one_core import one_core  # noqa: E402


class Double(dspy.Signature):  # type: ignore[misc]
    """Double the number."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="serve this by vLLM (default: a scripted server)")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--requests", type=int, help="of each measurement (default: 1000, or 96 of vLLM)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="of the sweeps' trials (default: 1 2)")
    parser.add_argument("--profile", action="store_true", help="also show what one thread's time goes into")
    options = parser.parse_args()
    count = options.requests or (96 if options.model else 1000)
    logging.getLogger("dspy").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, served(options.model, Path(folder)) as (models, lm):
        with models.request(models.base.id) as endpoint:
            bodies = prompts(endpoint, count)
        ways: dict[str, Callable[[], float]] = {
            "raw closed loop": lambda: raw(endpoint, bodies, options.in_flight),
            'dspy.Evaluate, engine="lm15"': lambda: evaluated(of_lm15(endpoint), count, options.in_flight),
            "dspy.Evaluate, a sweep's LM": lambda: as_in_a_sweep(lm, count, options.in_flight),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _, (way, measure) in itertools.product(range(options.repeats), ways.items()):
            rates[way].append(count / measure())
        if options.profile:
            print_profile(lm, count)
    reference = statistics.median(rates["raw closed loop"])
    print(f"{count} requests, {options.in_flight} in flight, medians of {options.repeats}")
    for way, found in rates.items():
        rate = statistics.median(found)
        print(f"{way:<30} {rate:8.1f} requests/s  {rate / reference:5.2f} of raw   ({min(found):.1f} - {max(found):.1f})")
    if options.processes and not options.model:
        spread(options.processes, count, options.in_flight, options.repeats)


@contextlib.contextmanager
def served(model: Path | None, folder: Path) -> Any:
    """The models of one slot on this machine, and their LM."""
    values: dict[str, Any] = {"task": "unused:unused", "strategies": ["p"], "num_threads": 32, "lm": {"max_tokens": 24}}
    if model is None:
        write_model(folder / "scripted-model", skill=10)
        values |= {"model": str(folder / "scripted-model")}
        values |= {"server": {"command": [sys.executable, str(SUPPORT / "scripted_server.py")]}}
    else:
        values |= {"model": str(model.resolve()), "server": {"threads": os.cpu_count(), "max_model_len": 2048}}
    models = SlotModels(make_config(values), folder)
    lm = models.lm()
    lm.cache = False
    try:
        yield models, lm
    finally:
        models.close()


PARTS = {
    "dspy/_vendor": "the HTTP client that DSPy brings along (lm15)",
    "dspy/adapters": "DSPy's adapter: prompt and answer",
    "dspy/clients": "DSPy's LM: request, usage, history",
    "dspy": "the rest of DSPy",
    "pydantic": "pydantic",
    "bt_ray": "bt_ray",
    "/json/": "JSON",
    "socket": "waiting for the server, and the sockets",
}
"""What functions are part of, by what is in their file's path, or in their name where they have none; the first counts."""


def print_profile(lm: dspy.LM, count: int) -> None:
    """Print what an answer's time goes into, where one thread asks for one after the other."""
    program, adapter = dspy.Predict(Double), dspy.ChatAdapter(use_json_adapter_fallback=False)
    program.set_lm(lm)
    profile = cProfile.Profile()
    with dspy.context(adapter=adapter), profile:
        for number in range(count):
            program(question=f"number {number}")
    spent: Counter[str] = Counter()
    for (file, _, name), (_, _, own_time, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        where = name if file == "~" else file
        spent[next((part for found, part in PARTS.items() if found in where), "Python itself")] += own_time
    print(f"One thread, {1000 * sum(spent.values()) / count:.2f} ms an answer while profiled:")
    for part, seconds in spent.most_common():
        print(f"  {seconds / sum(spent.values()):4.0%}  {part}")


def spread(processes: list[int], count: int, in_flight: int, repeats: int) -> None:
    """Print the rates of a sweep's evaluations, by the processes that share them."""
    import ray

    import bt_ray
    from bt_ray.driver.ray_session import DRIVER_ENVIRONMENT
    from bt_ray.run_dir.run_directory import read_steps
    from bt_ray.run_dir.storage import open_storage

    rates: dict[int, list[float]] = {number: [] for number in processes}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= DRIVER_ENVIRONMENT | {"DSPY_CACHEDIR": f"{folder}/dspy_cache"}
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
        for repeat, number in itertools.product(range(repeats), processes):
            name = f"model-{repeat}-{number}"  # whose answers no cache knows
            write_model(Path(folder, name), skill=10)
            values: dict[str, Any] = {
                "model": f"{folder}/{name}",
                "run_dir": f"{folder}/{name}-run",
                "args": {"valset": count},
                "strategies": ["p"],
                "num_threads": in_flight,
                "server": {"command": [sys.executable, str(SUPPORT / "scripted_server.py")], "cpus": 0.5},
                "trial": {"processes": number},
            }
            bt_ray.sweep(f"{SUPPORT / 'tasks.py'}:large", values)
            _, steps = read_steps(open_storage(values["run_dir"]))
            rates[number].append(count / steps["p"].seconds)  # its optimizer asks nothing
        ray.shutdown()
    alone = statistics.median(rates[processes[0]])
    for number, found in rates.items():
        way, rate = f"a sweep, {number} {'process' if number == 1 else 'processes'}", statistics.median(found)
        print(f"{way:<30} {rate:8.1f} requests/s  {rate / alone:5.2f} times   ({min(found):.1f} - {max(found):.1f})")


def of_lm15(endpoint: Endpoint) -> dspy.LM:
    """DSPy's own way to the same server."""
    settings = {"temperature": 0.0, "max_tokens": 24, "num_retries": 0, "cache": False}
    address = {"api_base": f"{endpoint.url}/v1", "api_key": endpoint.token}
    return dspy.LM(f"openai/{endpoint.weights_id}", engine="lm15", **address, **settings)


def prompts(endpoint: Endpoint, count: int) -> list[bytes]:
    """The bodies of the requests that DSPy makes for the examples."""
    signature, adapter = Double, dspy.ChatAdapter()
    bodies = []
    for number in range(count):
        messages = adapter.format(signature, [], {"question": f"number {number}"})
        body = {"model": endpoint.weights_id, "messages": messages, "temperature": 0.0, "max_tokens": 24}
        bodies.append(json.dumps(body).encode())
    return bodies


def raw(endpoint: Endpoint, bodies: list[bytes], in_flight: int) -> float:
    """Seconds that threads need who do nothing but ask."""
    address = urlsplit(endpoint.url)
    own = threading.local()
    headers = {"Content-Type": "application/json", **endpoint.headers}

    def ask(body: bytes) -> None:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=300)
        own.connection.request("POST", "/v1/chat/completions", body, headers)
        answer = own.connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status

    with ThreadPoolExecutor(in_flight) as threads:
        list(threads.map(ask, bodies[:in_flight]))
        began = time.monotonic()
        list(threads.map(ask, bodies))
        return time.monotonic() - began


def as_in_a_sweep(lm: dspy.LM, count: int, in_flight: int) -> float:
    """Seconds of an evaluation in a process that is looked after as a trial's."""
    with one_core():
        evaluated(lm, count // 4, in_flight)  # a trial's process has done this and that before
        return evaluated(lm, count, in_flight)


def evaluated(lm: dspy.LM, count: int, in_flight: int) -> float:
    """Seconds of an evaluation, in which each example is one request."""
    program = dspy.Predict(Double)
    program.set_lm(lm)
    devset = [dspy.Example(question=f"number {n}", answer=str(2 * n)).with_inputs("question") for n in range(count)]
    threads = {"num_threads": in_flight, "max_errors": count + 1, "display_progress": False}
    evaluate = dspy.Evaluate(devset=devset, metric=lambda *_: True, **threads)
    # A small model breaks the format; asking again in another would be a second request.
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with contextlib.redirect_stderr(io.StringIO()), dspy.context(adapter=adapter):
        began = time.monotonic()
        evaluate(program)
        return time.monotonic() - began


if __name__ == "__main__":
    main()
