"""What can go wrong, in kinds that a program can tell apart.

Every error is an `StsError` and also the built-in that a caller would expect (`ValueError` for input that can be corrected,
`RuntimeError` for a result that cannot be had). Messages name the field, the value received, what is allowed and the remedy.
"""


class StsError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigError(StsError, ValueError):
    """A setting has a value that is not allowed."""


class DataError(StsError, ValueError):
    """Training data or a domain is missing, empty or in a form that cannot be read."""


class ModelError(StsError, ValueError):
    """The model lacks what is asked for: a hook point, enough positions, a language-model head."""


class SaeError(StsError, ValueError):
    """The SAE is unknown, unreadable or does not fit the model."""


class CannotTell(StsError, RuntimeError):  # noqa: N818  # an answer rather than a failure
    """The evidence does not allow a verdict."""


class NoGo(StsError, RuntimeError):  # noqa: N818  # an answer rather than a failure
    """The forecast threatens a protected domain and the user asked to be refused (`on_forecast="refuse"`)."""


def is_short_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice, on a device or on the CPU."""
    from accelerate.utils.memory import should_reduce_batch_size  # here: the command line reads this module before it loads torch

    return isinstance(error, MemoryError) or bool(should_reduce_batch_size(error))
