"""The errors of this package.

Each is an `StsError` and also the built-in error that a caller would expect: `ValueError` for input that can be corrected,
`RuntimeError` if there can be no result, `ImportError` for a package that is too old. Messages name the field, the value
received, the allowed values and the remedy.
"""

NEEDS_SAE = (
    "This needs an SAE, and raw activations have none: sts-callback sae train --model ID --train FILE --out DIR trains one."
)
"""What stands where features are missing."""


class StsError(Exception):
    """Base class of all errors that this package raises on purpose."""


class VersionError(StsError, ImportError):
    """A package is missing or too old."""


class ConfigError(StsError, ValueError):
    """A setting has a value that is not allowed."""


class DataError(StsError, ValueError):
    """Training data or a domain is missing, empty or cannot be read."""


class ModelError(StsError, ValueError):
    """The model lacks something: a hook point, enough positions, a language-model head."""


class SaeError(StsError, ValueError):
    """The SAE is unknown, unreadable or does not fit the model."""


class CannotTell(StsError, RuntimeError):  # noqa: N818  # an answer rather than a failure
    """The evidence does not allow a verdict."""


class NoGo(StsError, RuntimeError):  # noqa: N818  # an answer rather than a failure
    """The forecast threatens a protected domain, and the user chose `on_forecast="refuse"`."""


def is_short_of_memory(error: Exception) -> bool:
    """Whether a device or the CPU ran out of memory."""
    from accelerate.utils.memory import should_reduce_batch_size  # here: the command line reads this module before it loads torch

    return isinstance(error, MemoryError) or bool(should_reduce_batch_size(error))
