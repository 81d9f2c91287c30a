"""The exceptions of saehook, each also the builtin that fits.

SaehookError
├── ArgumentError (ValueError)          an argument that cannot be meant: NaN, empty prompt, contradicting options
├── ShapeError (ValueError)             a width or shape that does not fit: SAE against site, tensor against config
├── SiteError (LookupError)             a site that the model does not have, or that several attached SAEs could mean
├── SiteNotExecutedError (RuntimeError) a site that an edit or a reader waited for did not run
├── LatentError (IndexError)            a latent outside 0..d_sae-1
├── ContextLengthError (ValueError)     more tokens than the language model takes
├── MissingStatError (LookupError)      a statistic (maximum, threshold) that the file does not hold
├── FileError (OSError)                 a file or folder that is missing, unreadable or cannot be written
├── FormatError (ValueError)            a file that is not what it should be: damaged, unsafe, of an unknown format
├── ExportError (ValueError)            a program that no weights can hold: what it writes depends on the token
├── TrainingError (RuntimeError)        a run that cannot go on: non-finite loss, no tokens left
└── TrainingInterrupted (RuntimeError)  a run that was asked to stop, and where it can be resumed from

NoEffectWarning (UserWarning) is the one warning of its own: an edit that did nothing.

Every message says what was given, what was expected and what to do.
"""

from __future__ import annotations


class SaehookError(Exception):
    """Base of all errors that saehook raises on purpose."""


class ArgumentError(SaehookError, ValueError):
    """An argument that cannot be meant."""


class ShapeError(SaehookError, ValueError):
    """A width or shape that does not fit."""


class SiteError(SaehookError, LookupError):
    """A site that the model does not have, or that is ambiguous."""


class SiteNotExecutedError(SaehookError, RuntimeError):
    """A site that should have run did not."""


class LatentError(SaehookError, IndexError):
    """A latent outside 0..d_sae-1."""


class ContextLengthError(SaehookError, ValueError):
    """More tokens than the language model takes."""


class MissingStatError(SaehookError, LookupError):
    """A statistic that is needed and that the file does not hold."""


class FileError(SaehookError, OSError):
    """A file or folder that is missing, unreadable or cannot be written."""


class FormatError(SaehookError, ValueError):
    """A file that is not what it should be."""


class ExportError(SaehookError, ValueError):
    """A program that no weights of that kind can hold."""


class TrainingError(SaehookError, RuntimeError):
    """A training run that cannot go on."""


class TrainingInterrupted(SaehookError, RuntimeError):
    """A training run that was asked to stop; the message says where it can be resumed from."""


class NoEffectWarning(UserWarning):
    """An edit selected no token, or changed none of those it selected."""
