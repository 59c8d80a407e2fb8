"""Every error hf_qep raises on purpose: one class per situation that a caller may want to catch.

All of them are `QepError`; those that mean "you gave me something wrong" are also `ValueError`, so that code written
for transformers catches them without knowing this package.
"""

from __future__ import annotations


class QepError(Exception):
    """Base of all errors of this package."""


class ConfigError(QepError, ValueError):
    """An option is out of range or contradicts another one."""


class BitsError(ConfigError):
    """The requested bits per weight cannot be had with this method or shape."""


class UnknownNameError(QepError, ValueError):
    """No method, format or task of this name."""


class FormatVersionError(QepError, ValueError):
    """The checkpoint was written by a newer hf_qep."""


class ArchitectureError(QepError, ValueError):
    """The model has no structure that can be quantised; the message says why."""


class CheckpointError(QepError, ValueError):
    """Files of a checkpoint are missing, truncated, contradictory or point outside their folder."""


class NonFiniteError(QepError, ValueError):
    """Weights or activations hold NaN or Inf."""


class CalibrationError(QepError, ValueError):
    """The calibration data is empty, unreadable or of the wrong kind."""


class KernelError(QepError, RuntimeError):
    """The kernels that an environment variable asks for cannot be had."""


class IllConditionedError(QepError, ArithmeticError):
    """A damped Hessian has no Cholesky factor."""


class OutputExistsError(QepError, FileExistsError):
    """The output folder already holds something."""


class ResumeError(QepError, ValueError):
    """An unfinished job cannot be gone on with; the message says which part of it is another one."""


class LostProcessError(QepError, RuntimeError):
    """One of several processes that work together has ended, or does not answer."""


class DiskSpaceError(QepError, OSError):
    """Not enough free space for the output."""


class AlreadyQuantizedError(QepError, ValueError):
    """The model is quantised already."""


class NotMergeableError(QepError, RuntimeError):
    """Float values cannot be merged into packed weights."""


class ExtraMissingError(QepError, ImportError):
    """A feature needs an optional package that is not installed."""


class CardError(QepError, ValueError):
    """A model card cannot be made: a measurement is missing, or does not belong to these weights."""


class PublishError(QepError, ValueError):
    """A push or a check of a published repository is refused or incomplete; the message says what is missing."""


class UnsafeContentError(PublishError):
    """A file must not be published: a secret, a link out of the folder, code, or a name that is not allowed."""


class SpaceError(QepError, RuntimeError):
    """A Space cannot be made, run or deployed."""


class ExportError(QepError, ValueError):
    """A model or its tokenizer cannot be said in the format of another program; the message says which part of it."""
