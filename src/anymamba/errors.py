"""Every exception the package raises on purpose.

Each message names the offending thing, what was expected and what to do. All of them are
`AnyMambaError`; each is also the built-in error that such a mistake usually raises, so that
code written for other libraries catches it without knowing this one.
"""


class AnyMambaError(Exception):
    """Base of all errors that AnyMamba raises on purpose."""


class ConfigError(AnyMambaError, ValueError):
    """A setting has a value that makes no sense."""


class InputError(AnyMambaError, ValueError):
    """An argument of a call has the wrong shape, type or value."""


class ArgumentError(AnyMambaError, TypeError):
    """A call has an argument that the function does not take, or lacks one."""


class BackendError(AnyMambaError, RuntimeError):
    """A backend was asked for that this machine, or these inputs, cannot have."""


class MissingDependencyError(AnyMambaError, ImportError):
    """An optional package is needed and not installed."""


class NotIncludedError(AnyMambaError, NotImplementedError):
    """The drop-in lacks something that the package it stands for has."""


class MissingModuleError(AnyMambaError, ModuleNotFoundError):
    """The drop-in lacks a module, or a name, that a program imports."""


class CheckpointError(AnyMambaError, OSError):
    """Files of a model are missing, broken, or do not belong to the model."""


class NoTokenizerError(CheckpointError):
    """A text was given or asked for, and the model comes without a tokenizer."""


class HubError(CheckpointError):
    """A model could not be fetched from the hub."""


class StateError(AnyMambaError, ValueError):
    """A saved state does not belong to this model, or its file is broken."""


class OverloadError(AnyMambaError, RuntimeError):
    """A server has more requests than it takes, or is shutting down."""


class TrainingError(AnyMambaError, RuntimeError):
    """Training cannot go on; the last checkpoint is as it was."""
