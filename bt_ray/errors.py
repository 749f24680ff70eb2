"""The exceptions of bt_ray. Whose failure each one is, `bt_ray.trial.failures` decides. It imports nothing."""


class BtRayError(Exception):
    """Any error that bt_ray raises on purpose. The message says what was wrong, where, and what to do."""


class ConfigError(BtRayError):
    """The sweep's configuration is wrong. Raised before anything expensive starts."""


class TaskError(BtRayError):
    """The user's task (program, data, metric, optimizers, teacher) is wrong or failed."""


class StepFailed(TaskError):
    """A step failed for another trial that computed it, and so it has for this one.

    Args:
        message: What failed.
        traceback: As it was where the step was computed.
    """

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


class ResourcesError(BtRayError):
    """The cluster can never give what the sweep asks for."""


class InfrastructureError(BtRayError):
    """Something that the user's program does not answer for was lost: a server, a node, a deadline, the storage.

    Retried by whoever can; never turned into a score.
    """


class ServerError(InfrastructureError):
    """A model server did not start, died, or does not answer. The message ends with the server's last log lines."""


class TrainingError(InfrastructureError):
    """A training process died. The message ends with its last log lines."""


class StorageError(InfrastructureError):
    """The run directory cannot be read or written: full, not permitted, or not reachable."""


class InfrastructureFailure(BaseException):
    """An `InfrastructureError` that outlasted its retries, on its way through DSPy.

    DSPy swallows `Exception` in evaluation, in bootstrapping and around each step, which would turn a lost server into a
    score of 0. This is a `BaseException` so that it arrives where it is handled: at the end of the trial.
    """


def nearest(word: str, known: "list[str]") -> str:
    """`" Did you mean 'x'?"` for the known word that is spelled most like `word`, or `""`."""
    import difflib

    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def amount(number: float, thing: str) -> str:
    """`"1 GPU"`, `"2 GPUs"`."""
    return f"{number:g} {thing}{'' if number == 1 else 's'}"
