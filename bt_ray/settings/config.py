"""The settings of a sweep: values in, frozen and checked values out.

A person writes `sweep.toml`, which `bt_ray.settings.toml` reads; the run directory keeps the resolved settings as JSON.
Unknown keys are refused, with the nearest right one. This module imports no engine: the options of vLLM are a list of names
that ships with the package. `docs/settings.md` is made of the docstrings here (`scripts/write_settings_page.py`).
"""

import math
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator, model_validator

from bt_ray.errors import ConfigError, amount, nearest
from bt_ray.location import check_location
from bt_ray.weights import model_name


class Section(BaseModel):
    """A table of the TOML file. Frozen; refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LMConfig(Section):
    """`[lm]`: how the student's LM samples, unless a request says otherwise."""

    temperature: float = Field(0.0, ge=0)
    """Sampling temperature."""
    max_tokens: int = Field(1024, ge=1)
    """Tokens of an answer, at most."""


class ServerConfig(BaseModel):
    """`[server]`: the slots of the model servers, and vLLM's own options.

    Every key that is not listed here is an option of `vllm serve`, with underscores: `max_model_len = 4096`. Without
    `dtype`, a server on CPU computes in the data type that is fast on its processor, bfloat16 or float32.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    count: int = Field(1, ge=1)
    """Maximum number of model servers. Each has a slot of its own."""
    gpus: float = Field(0, ge=0)
    """GPUs of each slot. 0: CPU. A fraction: slots share a GPU, and cannot train. Above 1: tensor parallel."""
    accelerator_type: str | None = Field(None, min_length=1)
    """Type of the GPUs, by Ray's name for it: `"H100"`, `"A100"`, `"L4"`. Default: any."""
    cpus: float = Field(1, gt=0)
    """CPU cores that Ray reserves for each slot."""
    threads: int | None = Field(None, ge=1)
    """Threads of vLLM, and of a training on CPU, which also uses idle cores. Default: `cpus`, at least 1."""
    start_timeout_s: float = Field(900, gt=0)
    """Seconds a server may take to start."""
    request_timeout_s: float = Field(600, gt=0)
    """Seconds a request may take."""
    turn_s: float = Field(60, gt=0)
    """Seconds the trials that share a server keep it while others wait for it."""
    idle_timeout_s: float = Field(300, gt=0)
    """Seconds after which an unused server is given back to the cluster. The minimum that the sweep needs stays."""
    drain_timeout_s: float = Field(120, gt=0)
    """Seconds that requests in flight get to finish before a server changes its weights. Then they end with an error."""
    stall_timeout_s: float = Field(60, gt=0)
    """Seconds without an answer, with requests in flight, after which a server is probed for a single token."""
    fine_tunes: Literal["auto", "merged", "adapters"] = "auto"
    """What a LoRA fine-tune leaves. `merged`: a checkpoint; a server serves one at a time. `adapters` (experimental): the
    adapter alone; a server serves several at once, beside their base model. `auto`: merged."""
    max_loras: int = Field(4, ge=1)
    """Maximum number of adapters that a server serves at once."""
    max_lora_rank: int = Field(16, ge=1)
    """Maximum rank of an adapter. vLLM takes 1, 8, 16, 32, 64, 128, 256, 320 and 512."""
    while_training: Literal["auto", "keep", "stop", "sleep"] = "auto"
    """What the slot's server does during a training. `keep`: it keeps its memory. `stop`: it ends. `sleep` (experimental,
    GPU): it frees the memory and stays. `auto`: `keep` on CPU, `stop` on GPU."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables for vLLM and for training. `config.json` leaves them out, since they may be secrets."""
    command: tuple[str, ...] | None = None
    """A program to run in place of vLLM. It gets the arguments and environment of `bt_ray.slot.serving.vllm_main`."""
    models: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Models with slots of their own, each with the settings that differ there: `[server.models."org/large"]`."""

    @field_validator("command", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus = {self.gpus}: above 1, a slot takes whole GPUs")
        if self.accelerator_type is not None and not self.gpus:
            raise ValueError(f"accelerator_type = {self.accelerator_type!r}, and no GPUs: set gpus too")
        known = vllm_options()
        for key in self.engine_options:
            if key in ENGINE_OPTIONS_OF_BT_RAY:
                raise ValueError(f"{key} is set by bt_ray itself: {ENGINE_OPTIONS_OF_BT_RAY[key]}")
            if key not in known:
                own = list(type(self).model_fields)
                raise ValueError(f"unknown key {key!r}.{nearest(key, own + sorted(known))}")
        names = [model_name(model) for model in self.models]
        for model, name in zip(self.models, names, strict=True):
            if names.count(name) > 1:
                raise ValueError(f"models: two are called {name}: their weights could not be told apart")
            if shared := sorted(self.models[model].keys() & OF_ALL_MODELS):
                raise ValueError(f'models."{model}": {shared[0]} is the same for all models')
            try:
                self.of(name)
            except ValidationError as error:
                problem = _first_problem(error, ServerConfig).removeprefix(": ").removesuffix(".")
                raise ValueError(f'models."{model}": {problem}') from None
        return self

    def of(self, name: str) -> "ServerConfig":
        """The settings for the servers of a model, which is named by its `bt_ray.weights.model_name`."""
        for model, own in self.models.items():
            if model_name(model) == name:
                return ServerConfig.model_validate(self._with(own))
        return self

    def _with(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """These values, replaced by a model's own. Its `env` is added to; without GPUs it has no `accelerator_type`."""
        values = {**self.model_dump(exclude={"models"}), **own}
        if isinstance(own.get("env"), Mapping):
            values["env"] = {**self.env, **own["env"]}
        if own.get("gpus") == 0:
            values["accelerator_type"] = own.get("accelerator_type")
        return values

    @property
    def engine_options(self) -> dict[str, Any]:
        """The options of vLLM itself, as written."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def needs(self) -> str:
        """What a slot takes of its node, in words."""
        cpus = amount(self.cpus, "CPU")
        kind = f"{self.accelerator_type} " if self.accelerator_type else ""
        return f"{amount(self.gpus, f'{kind}GPU')} and {cpus}" if self.gpus else cpus

    @property
    def adapters(self) -> int:
        """Maximum number of adapters that a server serves at once; 0 if fine-tunes are merged."""
        return self.max_loras if self.fine_tunes == "adapters" else 0

    @property
    def compute_threads(self) -> int:
        return self.threads or max(1, int(self.cpus))

    @property
    def server_while_training(self) -> Literal["keep", "stop", "sleep"]:
        if self.while_training == "auto":
            return "stop" if self.gpus else "keep"
        return self.while_training


OF_ALL_MODELS = {"models", "fine_tunes", "request_timeout_s"}
"""Keys of `[server]` that a model's own table may not have."""
ENGINE_OPTIONS_OF_BT_RAY = {
    "model": "write `model` at the top level",
    "host": "a server listens where its trials reach it",
    "port": "a free port is bound",
    "uds": "a free port is bound",
    "api_key": "a token is made for each sweep",
    "served_model_name": "requests name the weights that they are for",
    "middleware": "the guard stands in front of all routes",
    "tensor_parallel_size": "it follows `server.gpus`",
    "enable_lora": "it follows `server.fine_tunes`",
    "config": "write vLLM's options into `[server]`",
}


@cache
def vllm_options() -> frozenset[str]:
    """The options of vLLM 0.32's server, with underscores. `scripts/list_vllm_options.py` writes the file."""
    return frozenset(resources.files("bt_ray").joinpath("settings/vllm_options.txt").read_text().split())


class TrainConfig(Section):
    """`[train]`: how a weight optimizer fine-tunes.

    `BootstrapFinetune(train_kwargs={...})` overrides any of these for one optimizer.
    """

    method: Literal["lora", "full"] = "lora"
    """Train a LoRA, or all weights."""
    epochs: float = Field(3, gt=0)
    """Passes over the training data."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(4, ge=1)
    """Conversations in one optimizer step, over all GPUs of the slot."""
    max_length: int = Field(4096, ge=8)
    """Maximum length of a conversation, in tokens. Longer ones are cut at the end."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the LoRA."""
    lora_alpha: int | None = Field(None, ge=1)
    """Scale of the LoRA. Default: twice the rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the LoRA."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = "linear"
    """Schedule of the learning rate, as in transformers."""
    layers: int | None = Field(None, ge=1)
    """Train the last so many layers only. The layers below are frozen, and need no backward pass. Default: all."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of matrix products. `auto`: bfloat16, or float32 on a CPU that is slow in bfloat16."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, which saves memory and takes longer."""
    checkpoint_every_s: float = Field(300, ge=0)
    """Seconds between two checkpoints. A training that is interrupted resumes from the last one."""
    timeout_s: float | None = Field(None, gt=0)
    """Seconds a training may take; then it fails. Default: no limit."""
    command: tuple[str, ...] | None = None
    """A program to run in place of the trainer. It gets the argument of `bt_ray.slot.training.main`."""

    @field_validator("command", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def of_the_result(self) -> dict[str, Any]:
        """The settings that the result depends on, as JSON."""
        values = self.model_dump(mode="json", exclude={"timeout_s", "checkpoint_every_s"})
        if self.dtype == "auto":  # which of the two a node takes changes the last bits, and no result is lost for them
            del values["dtype"]
        if self.layers is None:  # a setting that came later: earlier results are those of its default
            del values["layers"]
        return values


class TrialConfig(Section):
    """`[trial]`: the Ray Tune trials. Most of the time they wait for servers."""

    cpus: float = Field(0.1, gt=0)
    """CPU cores that Ray reserves for each process of a trial."""
    processes: int = Field(1, ge=1)
    """Processes that share each evaluation on the valset or the testset, each with a lease of its own. One sends up to about
    a thousand requests a second. More help if servers answer faster than that, or if the metric computes for long."""
    max_concurrent: int | None = Field(None, ge=1)
    """Maximum number of trials at a time. Default: two for each server of the program's models, since a trial may wait for
    a step that another one computes; without a served model, all."""
    step_retries: int = Field(1, ge=0)
    """How often a step is repeated within its trial after an infrastructure failure."""
    max_failures: int = Field(1, ge=0)
    """How often a trial is run again after an infrastructure failure that its steps' retries did not mend."""
    resume_optimizers: bool = False
    """Keep `ctx.scratch_dir` when a step is repeated, so that `GEPA(log_dir=...)` resumes. GEPA keeps its state as a pickle:
    with this on, anyone who can write to the run directory can run code in the trials."""
    request_retries: int = Field(5, ge=0)
    """How often a request is repeated after its server was lost and recovered."""


class TrackingConfig(Section):
    """`[tracking]`: services that a sweep reports its progress to, beside its run directory."""

    mlflow: str | None = None
    """MLflow's tracking URI: `http://host:5000`, `sqlite:////path/mlflow.db`, `databricks`. Needs `bt-ray[mlflow]`."""
    experiment: str | None = Field(None, min_length=1)
    """Experiment in MLflow. Default: the name of the task's file."""
    autolog: bool = False
    """Have MLflow trace DSPy in the trials (`mlflow.dspy.autolog`). All nodes must have the package and reach the server."""
    tensorboard: str | None = None
    """Folder for TensorBoard's files."""
    wandb: str | None = Field(None, min_length=1)
    """Project at Weights & Biases. Needs `bt-ray[wandb]`, and `WANDB_API_KEY` or `wandb login`."""

    @field_validator("mlflow")
    @classmethod
    def _without_password(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).password:
            raise ValueError("a password in it would be kept in files: set MLFLOW_TRACKING_USERNAME and _PASSWORD instead")
        return value

    @model_validator(mode="after")
    def _of_mlflow(self) -> Self:
        if self.mlflow is None and (self.autolog or self.experiment):
            raise ValueError(f"{'autolog' if self.autolog else 'experiment'} is MLflow's: set tracking.mlflow too")
        return self


class EveryStrategy(Section):
    """`strategies = "all(max_length = 3)"`: every sequence of the optimizers up to a length."""

    max_length: int = Field(ge=1)
    """Maximum number of steps in a strategy."""
    optimizers: tuple[str, ...] | None = None
    """Keys of the optimizers to use. Default: all of the task's."""

    @field_validator("optimizers", mode="before")
    @classmethod
    def _keys(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class StrategySearch(EveryStrategy):
    """`strategies = { search = { max_length = 5, budget = "8 gpu-hours" } }`: the most promising ones, within a budget."""

    budget: str
    """A number of `steps`, `tokens`, `hours` (wall time) or `gpu-hours` (time of the steps, times the GPUs of a server)."""

    @model_validator(mode="after")
    def _check_unit(self) -> Self:
        self.limit  # noqa: B018 - it says what is wrong
        return self

    @property
    def limit(self) -> tuple[float, str]:
        """The budget as a number and its unit."""
        amount, _, unit = self.budget.strip().partition(" ")
        try:
            limit = float(amount)
        except ValueError:
            limit = 0.0
        if limit <= 0 or unit.strip() not in BUDGETS:
            raise ValueError(f'budget = "{self.budget}": write a number of {", ".join(BUDGETS)}, as in "24 steps"')
        return limit, unit.strip()


BUDGETS = ("steps", "tokens", "hours", "gpu-hours")


class SweepConfig(Section):
    """All settings of a sweep: the top level of the TOML file, and its sections."""

    task: str
    """The function that builds the `bt_ray.Task`: `"path/to/file.py:function"` or `"package.module:function"`."""
    model: str | None = None
    """The student's model, for predictors that the task gives no LM: a folder, or a model id of the Hugging Face hub."""
    strategies: tuple[str, ...] | EveryStrategy | StrategySearch
    """The strategies: a list, all up to a length, or a search."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task's function."""
    space: dict[str, Any] = Field(default_factory=dict)
    """Settings to vary, by name. Each has a list of values, or a distribution of Ray Tune's."""
    num_samples: int = Field(1, ge=1)
    """How often to draw from the distributions in `[space]`."""
    run_dir: str | None = None
    """The run directory: a path, or `s3://...` or `gs://...`. Default: a new folder `runs/TASK-DATE-TIME`."""
    reuse: tuple[str, ...] = ()
    """Other run directories (paths or URIs) whose finished steps this sweep takes if it has the same. Only read."""
    reuse_weights: Literal["copy", "reference"] = "copy"
    """How to take the weights of such steps. `copy`: into the run directory. `reference`: they stay where they are."""
    seed: int = 0
    """Seed for the order of the data, optimizers (`ctx.seed`), sampled answers, training, and draws from `[space]`."""
    num_threads: int = Field(16, ge=1)
    """Threads of an evaluation, and so its requests in flight. Optimizers use it as their default."""
    max_errors: int | None = Field(None, ge=1)
    """Number of failed examples that ends an evaluation with an error. Default: DSPy's, 10."""
    valset_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the trainset that is held out for validation if the task has no valset. 0: no validation."""
    shuffle_trainset_between_steps: bool = True
    """Shuffle the trainset before each step, as `dspy.BetterTogether` does."""
    provide_traceback: bool | None = None
    """Log the tracebacks of examples that fail. Default: DSPy's, off."""
    autoscaling: bool = False
    """The cluster adds nodes by itself: wait for nodes that the sweep lacks. Otherwise that is an error at once."""
    lm: LMConfig = LMConfig()
    server: ServerConfig = ServerConfig()
    train: TrainConfig = TrainConfig()
    trial: TrialConfig = TrialConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("strategies", mode="before")
    @classmethod
    def _strategies(cls, value: Any) -> Any:
        if isinstance(value, str) and (found := re.fullmatch(r"all\(\s*max_length\s*=\s*(\d+)\s*\)", value)):
            return EveryStrategy(max_length=int(found[1]))
        if isinstance(value, Mapping) and len(value) == 1 and (kind := next(iter(value))) in ("all", "search"):
            return (EveryStrategy if kind == "all" else StrategySearch).model_validate(value[kind])
        if isinstance(value, list | tuple):
            if not value:
                raise ValueError("no strategy is given")
            return tuple(value)
        if isinstance(value, EveryStrategy | StrategySearch):
            return value
        raise ValueError(
            'write a list, ["p -> w", "w -> p"], or "all(max_length = 3)", or '
            '{ search = { max_length = 5, budget = "24 steps" } }'
        )

    @field_serializer("strategies")
    def _strategies_as_written(self, value: Any) -> Any:
        if isinstance(value, EveryStrategy | StrategySearch):
            return {"search" if isinstance(value, StrategySearch) else "all": value.model_dump(mode="json")}
        return value

    @field_serializer("space", when_used="json")
    def _space_as_json(self, space: dict[str, Any]) -> dict[str, Any]:
        return {key: value if isinstance(value, list | dict) else str(value) for key, value in space.items()}

    @field_validator("reuse", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("run_dir", "reuse")
    @classmethod
    def _check_run_dir(cls, value: Any) -> Any:
        for location in (value,) if isinstance(value, str) else value or ():
            try:
                check_location(location)
            except ConfigError as error:
                raise ValueError(str(error).rstrip(".")) from None
        return value

    def without_secrets(self) -> dict[str, Any]:
        """The settings as JSON, to be kept in a file. `server.env` is left out, since it may hold secrets."""
        values = self.model_dump(mode="json", exclude={"server": {"env"}})
        for own in values["server"]["models"].values():
            own.pop("env", None)
        return values

    @property
    def student_server(self) -> ServerConfig:
        """The settings for the servers of the sweep's own model."""
        return self.server.of(model_name(self.model or ""))

    def concurrent_trials(self, trials: int, servers: int) -> int:
        """Maximum number of trials at a time. More than servers: a trial that waits for another's step holds no server.

        Args:
            trials: Number of trials of the sweep.
            servers: Number of servers that they share; 0 if no model is served.
        """
        return min(self.trial.max_concurrent or 2 * servers or trials, trials)


def make_config(values: Mapping[str, Any], source: str = "config") -> SweepConfig:
    """Check `values`, and make the settings of them.

    Raises:
        ConfigError: Names the first mistake and its place, and for an unknown key the nearest right one.
    """
    if (where := _find_non_finite(values)) is not None:
        raise ConfigError(f"{source}: {where}: settings are kept as JSON, which has no name for this number.")
    try:
        return SweepConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error)}") from None


def _find_non_finite(value: Any) -> str | None:
    """Where NaN or infinity stands in nested settings, and which; None if nowhere."""
    if isinstance(value, float):
        return None if math.isfinite(value) else str(value)
    named = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in named:
        if (found := _find_non_finite(inner)) is not None:
            return f"{key}.{found}" if isinstance(inner, Mapping | list | tuple) else f"{key} = {found}"
    return None


def override_train(train: TrainConfig, overrides: Mapping[str, Any] | None) -> TrainConfig:
    """`[train]`, overridden by an optimizer's `train_kwargs`.

    Raises:
        ConfigError: `[train]` has no such key, or it does not take the value.
    """
    try:
        return TrainConfig.model_validate({**train.model_dump(), **(overrides or {})})
    except ValidationError as error:
        raise ConfigError(f"train_kwargs: {_first_problem(error, TrainConfig)}") from None


def _first_problem(error: ValidationError, root: type[BaseModel] = SweepConfig) -> str:
    problem = error.errors(include_url=False)[0]
    *sections, key = [str(part) for part in problem["loc"]] or [""]
    where = ".".join([*sections, key])
    if problem["type"] == "extra_forbidden":
        known = _keys(root, sections)
        return f"unknown key {where!r}.{nearest(key, known)} Known keys: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{where!r} is missing."
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = "" if isinstance(given, dict | BaseModel) else f" (it is {given!r})"
    return f"{where}: {message}{shown}."


def _keys(root: type[BaseModel], sections: list[str]) -> list[str]:
    for section in sections:
        annotation = root.model_fields[section].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        root = annotation
    return list(root.model_fields)
