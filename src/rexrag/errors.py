"""Every error rexrag raises on purpose.

RexragError                      catch this to catch them all
├── ConfigError      (ValueError)       a config file, an override or an argument
├── PluginError      (ValueError)       a plug-in that cannot be imported, or returns what it must not
├── DataError        (ValueError)       a question, corpus or trace file; names file, row and field
├── ModelError       (ValueError)       a model folder or tokenizer that cannot be used
├── IndexFolderError (ValueError)       an index that is missing, damaged or built for something else
├── MethodError      (ValueError)       an argument of a formula in `rexrag.method`
│   ├── CueError        (LookupError)       an empty pool, or a cue that is not in it
│   ├── AlphaError                          a mixture share outside [0, 1), or one the clip range cannot carry
│   ├── FailureRateError                    z outside (0, 1]
│   ├── CutError        (IndexError)        a cut outside its rollout
│   ├── ShapeError                          tensors that do not agree
│   └── NonFiniteError  (ArithmeticError)   NaN or infinity where a log-probability belongs
├── RetrievalError   (ConnectionError)  a search that failed after every retry
├── EndpointError    (ConnectionError)  a policy's server that failed after every retry, or answers nonsense
├── TrainingError    (ArithmeticError)  updates that are not finite, several in a row
├── EvaluationError                     too many questions of an evaluation failed
├── CheckpointError  (OSError)          a checkpoint that is damaged or belongs to another run
└── RunFolderError   (OSError)          an output folder that cannot be written

`exit_code` is what the command line returns: 2 where the caller can mend the input, 1 where we failed.
"""

from __future__ import annotations


class RexragError(Exception):
    """Base class of rexrag's errors. The message is one line."""

    exit_code = 2


class ConfigError(RexragError, ValueError):
    """A config file, an override or an argument is wrong."""


class PluginError(RexragError, ValueError):
    """A plug-in cannot be imported, takes other arguments, or returned something unusable."""


class DataError(RexragError, ValueError):
    """An input file is wrong. `where` names file, row and field as far as they are known."""

    def __init__(
        self, message: str, *, file: object = None, row: int | None = None, field: str | None = None
    ) -> None:
        where = [str(file)] if file is not None else []
        where += [f"row {row}"] if row is not None else []
        where += [f"field '{field}'"] if field is not None else []
        super().__init__(f"{', '.join(where)}: {message}" if where else message)


class ModelError(RexragError, ValueError):
    """A model folder or its tokenizer cannot be used."""


class IndexFolderError(RexragError, ValueError):
    """A retrieval index is missing, damaged, or was built from another corpus or encoder."""


class MethodError(RexragError, ValueError):
    """An argument of a formula is outside its domain."""

    exit_code = 1


class CueError(MethodError, LookupError):
    """The cue pool is empty, or a cue is not in it."""


class AlphaError(MethodError):
    """The mixture share alpha is outside [0, 1), or too large for the clip range."""


class FailureRateError(MethodError):
    """The failure rate z is outside (0, 1]."""


class CutError(MethodError, IndexError):
    """A cut lies outside its rollout."""


class ShapeError(MethodError):
    """Tensors that must agree in shape do not."""


class NonFiniteError(MethodError, ArithmeticError):
    """A log-probability is NaN or infinite where a number is needed."""


class RetrievalError(RexragError, ConnectionError):
    """A search failed after every retry. It never becomes an empty result.

    refused: the service is there and does not want this request, so trying again is of no use.
    """

    exit_code = 1

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class EndpointError(RexragError, ConnectionError):
    """A policy's server failed after every retry, or what it answers is no completion."""

    exit_code = 1


class TrainingError(RexragError, ArithmeticError):
    """Several updates in a row were dropped as not finite."""

    exit_code = 1


class EvaluationError(RexragError):
    """More questions of an evaluation failed than are allowed."""

    exit_code = 1


class CheckpointError(RexragError, OSError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class RunFolderError(RexragError, OSError):
    """The output folder cannot be created or written."""
