"""The best program of a sweep in a folder of its own, for DSPy, transformers and vLLM without bt_ray."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from bt_ray.errors import ConfigError
from bt_ray.layout import RESULT
from bt_ray.run_dir.node_disk import Scratch
from bt_ray.run_dir.results import Candidate, SweepResult
from bt_ray.run_dir.run_directory import read_steps
from bt_ray.slot.node_weights import NodeWeights
from bt_ray.weights import MANIFEST as WEIGHTS_MANIFEST
from bt_ray.weights import Weights
from bt_ray.winner.load import Kept, find_program

FORMAT = 1
PROGRAM, MODEL, CARD, MANIFEST = "program.json", "model", "README.md", "manifest.json"


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        folder: Where.
        models: The folder of each model there, by the id of its weights; a name of the hub for a base model from there.
        size: In bytes.
    """

    folder: Path
    models: dict[str, str]
    size: int


def export(folder: str | Path, to: str | Path, candidate: str | Candidate | None = None) -> Exported:
    """Copy the best program of a sweep, or another candidate, to `to`: with its models, where it comes from, and a card.

    The copy is whole or not there. A base model that comes from the hub is named and not copied.

    Args:
        folder: A sweep's run directory, or its `best` folder: a path, or a URI of an object store.
        to: A folder that is not there yet, or is empty.
        candidate: Which one, if not the best: its name, or one of a result's `candidates`.

    Raises:
        BtRayError: There is no such program, or `to` is not empty.
    """
    kept, target = find_program(folder, candidate), Path(to).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already. Name a folder that is not, or an empty one.")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        (part / PROGRAM).write_bytes(kept.program)
        models = _copy_models(kept, part)
        files = {str(file.relative_to(part)): _sha256(file) for file in sorted(part.rglob("*")) if file.is_file()}
        manifest = {"format": FORMAT, **_lineage(kept), "models": models, "files": files}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        (part / CARD).write_text(_card(target.name, manifest, kept.weights))
        size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return Exported(target, models, size)


def _copy_models(kept: Kept, part: Path) -> dict[str, str]:
    """Copy the checkpoints and adapters of the program's predictors. Returns where each is now, by the id of its weights."""
    models, needed = {}, dict(kept.weights)
    for weights in kept.weights.values():
        if weights.on is not None:
            needed[weights.on.id] = weights.on
    with Scratch("export") as scratch:
        on_this_node = NodeWeights(kept.storage, scratch.folder)
        for number, weights in enumerate(needed.values()):
            if weights.parent is None and not Path(weights.path).is_absolute():
                models[weights.id] = weights.path
                continue
            name = MODEL if number == 0 else f"{MODEL}-{number + 1}"
            with on_this_node.loadable(weights) as loadable:
                on_this_node.check(loadable)
                shutil.copytree(loadable.path, part / name, ignore=shutil.ignore_patterns(WEIGHTS_MANIFEST, ".*"))
            models[weights.id] = name
    return models


def _lineage(kept: Kept) -> dict[str, Any]:
    """Where the program comes from, and how good it was there."""
    manifest, config = kept.manifest, kept.config
    values = {key: manifest[key] for key in ("task", "strategy", "prefix", "score", "predictors", "api_models")}
    sampling = {"temperature": config.lm.temperature, "max_tokens": config.lm.max_tokens}
    values |= {"seed": config.seed, "sampling": sampling, "versions": manifest["versions"]}
    keys, finished = read_steps(kept.storage)
    by_key, key, depends_on = {key.key: key for key in keys.values()}, manifest["step"], {}
    while (found := by_key.get(key)) is not None:
        depends_on[found.prefix or "baseline"], key = found.parts, found.parent
    values["depends_on"] = depends_on
    values["revisions"] = {w.path: w.revision for w in kept.weights.values() if w.revision is not None}
    step = next((step for step in finished.values() if step.key == manifest["step"]), None)
    values["validation_examples"] = len(step.example_scores) if step is not None else None
    if (result := kept.storage.read_json(RESULT)) is not None:
        sweep = SweepResult.from_json(result)
        ours = next((c for c in sweep.candidates if manifest["step"] in c.program and c.test_score is not None), None)
        if ours is not None:
            values |= {"test_score": ours.test_score, "test_examples": len(ours.test_example_scores)}
        values["is_best"] = sweep.best is not None and manifest["step"] in sweep.best.program
    return values


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


CARD_TEXT = Template("""\
---
library_name: dspy
tags: [dspy, bt-ray]
$base---

# $name

A DSPy program with the model that it was optimized for, found by a sweep of BetterTogether strategies.

| | |
|---|---|
| strategy | `$strategy` |
| score on the valset$picked | $score |
| score on the testset | $test |
| seed | $seed |
| task | `$task` |

`manifest.json` has the SHA-256 of each file, the versions of what computed it, and hashes of what it depends on: program,
metric, data, model, settings.

## Use it with DSPy

Serve the model, for example with `vllm serve $model --served-model-name $served`, and give the program its state:

```python
import dspy

program = ...  # as the task's build() makes it: the same class, signature and predictors
program.load("program.json")
program.set_lm(dspy.LM("openai/$served", api_base="http://localhost:8000/v1", api_key="none", $sampling))
```
$several
## Use the model alone

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("$model"), AutoTokenizer.from_pretrained("$model")
```
""")


def _card(name: str, manifest: Mapping[str, Any], weights: Mapping[str, Weights]) -> str:
    models: dict[str, str] = manifest["models"]
    first = next(iter(models.values()), "MODEL")
    sampling = manifest["sampling"]
    hub = [path for path in models.values() if path not in (MODEL, *models) and "/" in path]
    several = ""
    if len(models) > 1:
        rows = "\n".join(f"- `{name}`: `{models[weights_id]}`" for name, weights_id in manifest["predictors"].items())
        several = f"\nIts predictors use different models; give each its LM (`predictor.lm = ...`):\n\n{rows}\n"
    adapters = [w.id for w in weights.values() if w.on is not None]
    if adapters:
        several += f"\nA LoRA adapter is loaded onto its base: {', '.join(f'`{models[name]}`' for name in adapters)}.\n"
    return CARD_TEXT.substitute(
        name=name,
        base=f"base_model: {hub[0]}\n" if hub else "",
        strategy=manifest["prefix"] or "baseline",
        picked=", which picked it" if manifest.get("is_best", True) else "",
        score=_percent(manifest["score"], manifest.get("validation_examples")),
        test=_percent(manifest.get("test_score"), manifest.get("test_examples")),
        seed=manifest["seed"],
        task=manifest["task"],
        model=first,
        served="best",
        sampling=f"temperature={sampling['temperature']:g}, max_tokens={sampling['max_tokens']}",
        several=several,
    )


def _percent(score: float | None, examples: int | None) -> str:
    return "-" if score is None else f"{score:.1f} %{f' of {examples} examples' if examples else ''}"
