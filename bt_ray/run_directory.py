"""The run directory: where a sweep keeps everything, and whose it is."""

import fcntl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bt_ray.config import SweepConfig
from bt_ray.errors import ConfigError
from bt_ray.fingerprint import StepKey
from bt_ray.storage import Storage
from bt_ray.store import FinishedStep, StepStore
from bt_ray.strategy import length

SWEEP, CONFIG, RESULT, LOCK = "sweep.json", "config.json", "result.json", ".lock"


def check_run_directory(run_dir: Path, keys: Mapping[str, StepKey], *, accept_changes: bool) -> None:
    """Check that the sweep can be kept in `run_dir`.

    Raises:
        ConfigError: It cannot be written, holds something else, or finished steps that what changed since affects.
    """
    existing = run_dir
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise ConfigError(f"run_dir: {existing} is a file, not a directory.")
        probe = existing / f".bt_ray_probe_{id(keys)}"
        probe.touch()
        probe.unlink()
        if not run_dir.exists() or all(file.name.startswith(".") for file in run_dir.iterdir()):
            return
    except OSError as error:
        raise ConfigError(f"run_dir: {existing} cannot be used ({error.strerror}).") from None
    theirs = Storage(run_dir).read_json(SWEEP)
    if theirs is None:
        raise ConfigError(f"run_dir: {run_dir} holds other files. Choose a new directory with --run-dir.")
    if not _steps(theirs):
        raise ConfigError(f"run_dir: {run_dir} is of another sweep. Choose another directory with --run-dir.")
    if not accept_changes:
        _refuse_changes(run_dir, _steps(theirs), keys)


def _refuse_changes(run_dir: Path, theirs: Mapping[str, Any], keys: Mapping[str, StepKey]) -> None:
    """Raises `ConfigError` if something changed since that finished steps depend on."""
    store = StepStore(Storage(run_dir))
    both = [prefix for prefix in keys if prefix in theirs and store.read(theirs[prefix]["key"])]
    affected = [prefix for prefix in both if theirs[prefix]["key"] != keys[prefix].key]
    if not affected:
        return
    changed = sorted({name for prefix in affected for name in _different(theirs[prefix]["parts"], keys[prefix].parts)})
    valid = [prefix for prefix in both if prefix not in affected]
    raise ConfigError(
        f"run_dir: {run_dir} is of another sweep, or something changed since: {', '.join(changed)}. "
        f"That affects the finished steps {_shown(affected)}{f' but not {_shown(valid)}' if valid else ''}. "
        "Choose another directory with --run-dir, or compute them again with --accept-changes."
    )


def _different(theirs: Mapping[str, str], ours: Mapping[str, str]) -> set[str]:
    return {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)}


def _shown(prefixes: Sequence[str]) -> str:
    return ", ".join(f'"{prefix}"' if prefix else "the baseline" for prefix in prefixes)


def read_steps(run_dir: Path) -> tuple[list[str], dict[str, FinishedStep], set[str]]:
    """The steps of a run directory, shorter ones first; the finished ones by prefix; and those that fine-tune.

    Raises:
        ConfigError: No sweep was run there.
    """
    storage = Storage(run_dir)
    known = _steps(storage.read_json(SWEEP))
    if not known:
        raise ConfigError(f"{run_dir} is no run directory of a sweep: it has no {SWEEP}.")
    found = {prefix: StepStore(storage).read(step["key"]) for prefix, step in known.items()}
    finished = {prefix: step for prefix, step in found.items() if step is not None}
    return sorted(known, key=length), finished, {prefix for prefix, step in known.items() if step["trains"]}


def _steps(values: Any) -> dict[str, Any]:
    steps = values.get("steps") if isinstance(values, dict) else None
    return steps if isinstance(steps, dict) else {}


def prepare_run_directory(storage: Storage, config: SweepConfig, keys: Mapping[str, StepKey]) -> None:
    """Make the directory the sweep's own. Finished steps, and the best program of an earlier run, are kept."""
    for name in ("trials", "tune", RESULT):
        storage.delete(name)
    before = storage.read_json(SWEEP) or {}
    theirs = _steps(before)
    accepted = [prefix for prefix in keys if prefix in theirs and theirs[prefix]["key"] != keys[prefix].key]
    changes = [*before.get("accepted_changes", []), *([{"at": time.time(), "steps": accepted}] if accepted else [])]
    steps = {**theirs, **{prefix: key.to_json() for prefix, key in keys.items()}}
    storage.write_json(SWEEP, {"steps": steps, "accepted_changes": changes})
    storage.write_json(CONFIG, config.without_secrets())


@contextmanager
def held(run_dir: Path) -> Iterator[int]:
    """The run directory, for one driver at a time. Gives how many drivers have held it, this one included.

    Raises:
        ConfigError: Another driver holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run_dir: another sweep is running in {run_dir}. Wait for it, or use --run-dir.") from None
        lock.seek(0)
        drivers = int(lock.read() or 0) + 1
        lock.truncate(0)
        lock.write(str(drivers))
        lock.flush()
        yield drivers
