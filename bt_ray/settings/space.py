"""The space of a sweep: which settings each of its variants has. Every strategy runs under every variant.

A list stands for each of its values, and a distribution of Ray Tune's for one that is drawn: the same in each run with the
same seed. Source: `ray.tune.search.variant_generator`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bt_ray.errors import ConfigError, nearest
from bt_ray.settings.config import SweepConfig, make_config
from bt_ray.strategy import variant_name

DISTRIBUTIONS = (
    "choice", "uniform", "quniform", "loguniform", "qloguniform", "randn", "qrandn", "randint", "qrandint", "lograndint",
    "qlograndint",
)  # fmt: skip
SHARED = {
    "task": "a sweep has one task; give it arguments in [args]",
    "strategies": "each strategy runs under every variant anyway",
    "run_dir": "a sweep has one run directory",
    "reuse": "all variants take what is theirs from the same directories",
    "reuse_weights": "a sweep has one run directory",
    "autoscaling": "all variants share the cluster",
    "server": "all variants share the servers",
    "trial": "all variants share the trials",
    "tracking": "a sweep is tracked as a whole",
    "space": "it is the space",
    "num_samples": "it belongs to the space",
}


@dataclass(frozen=True)
class Variant:
    """One point of the space.

    Attributes:
        values: The settings that differ between variants, by their names in the TOML: `"train.learning_rate"`.
        config: All settings.
    """

    values: dict[str, Any]
    config: SweepConfig

    @property
    def name(self) -> str:
        """Names it among the variants of its sweep; `""` in a sweep without a space."""
        return variant_name(self.values)


def variants(config: SweepConfig) -> list[Variant]:
    """The variants of a sweep, in the order in which they are written.

    Raises:
        ConfigError: A key that cannot vary, or a value that its setting cannot have.
    """
    if not config.space:
        return [Variant({}, config)]
    import numpy
    from ray.tune.search.sample import Domain
    from ray.tune.search.variant_generator import generate_variants

    spec = {key: _spec(key, value) for key, value in config.space.items()}
    draws = any(isinstance(value, Domain) for value in spec.values())
    if config.num_samples > 1 and not draws:
        raise ConfigError(f"num_samples = {config.num_samples}: the space has no distribution to draw from.")
    chance = numpy.random.RandomState(config.seed)
    found = {}
    for _ in range(config.num_samples):
        for _, values in generate_variants(spec, random_state=chance):
            own = {key: _plain(values[key]) for key in config.space}
            variant = Variant(own, apply_values(config, own))
            found[variant.name] = variant
    return list(found.values())


def _spec(key: str, value: Any) -> Any:
    """What Ray Tune's generator makes of a value of the TOML."""
    from ray import tune
    from ray.tune.search.sample import Domain

    if (reason := SHARED.get(key.partition(".")[0])) is not None:
        raise ConfigError(f"space: {key!r} cannot vary: {reason}.")
    if isinstance(value, Domain):
        return value
    if isinstance(value, list | tuple):
        if not value:
            raise ConfigError(f"space: {key!r} is an empty list.")
        return {"grid_search": list(value)}
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, arguments),) = value.items()
        if name not in DISTRIBUTIONS:
            raise ConfigError(f"space: {key!r}: unknown distribution {name!r}.{nearest(name, list(DISTRIBUTIONS))}")
        try:
            return tune.choice(arguments) if name == "choice" else getattr(tune, name)(*arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"space: {key!r}: {name} = {arguments!r}: {error}") from None
    raise ConfigError(
        f"space: {key!r} = {value!r}: write a list of values, or a distribution of Ray Tune's, as in "
        "{ loguniform = [1e-5, 1e-3] }."
    )


def _plain(value: Any) -> Any:
    """A drawn value as TOML and JSON have it."""
    return value.item() if hasattr(value, "item") else value


def apply_values(config: SweepConfig, values: Mapping[str, Any]) -> SweepConfig:
    """The settings of the variant that has these values of the space.

    Raises:
        ConfigError: A value that its setting cannot have.
    """
    changed: dict[str, Any] = config.model_dump(exclude={"space", "num_samples"})
    for key, value in values.items():
        *sections, name = key.split(".")
        inner = changed
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"space: {key!r}: {section!r} is no section.")
        inner[name] = value
    return make_config(changed, source=f"space: {variant_name(values)}")
