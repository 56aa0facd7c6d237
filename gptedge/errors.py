"""Every error gptedge raises on purpose, as one tree. Each carries the exit code the command line ends with.

GptEdgeError                 1  failed
├── UsageError               2  an argument is wrong or out of range
│   └── OutputExistsError    2  the destination exists and --force was not given
├── DataError                1  input text or a data file cannot be used
├── CheckpointError          1  a checkpoint is missing, truncated or inconsistent
├── BundleError              1  a bundle is missing files, or a file is not what its manifest says
├── TokenizerError           1  tokenizer.json or a chat template cannot be used
├── ContextOverflowError     1  more tokens than the model's context holds
├── DownloadError            1  a model could not be fetched
├── MissingExtraError        1  an optional dependency is not installed
├── TrainingError            1  training cannot go on (for example a loss that is not a number)
├── ParityError              3  the exported graph does not compute what its source computes
├── GateFailed               4  a quality, size or baseline gate did not hold
└── UnsupportedModelError    5  the architecture, or a feature of it, is not supported

Messages are one line: what was wrong, the value, the bound, and the next step.
"""

from __future__ import annotations

EXIT_INTERRUPTED = 130


class GptEdgeError(Exception):
    """Base of the tree; `exit_code` is the status of the process when the command line meets it."""

    exit_code = 1
    is_reported = False
    """By another process of the same run; this one has nothing to add."""


class UsageError(GptEdgeError, ValueError):
    exit_code = 2


class OutputExistsError(UsageError):
    pass


class DataError(GptEdgeError):
    pass


class CheckpointError(GptEdgeError):
    pass


class BundleError(GptEdgeError):
    pass


class TokenizerError(GptEdgeError):
    pass


class SchemaError(UsageError):
    """No reply can follow the schema, or not as far as it is understood."""


class ContextOverflowError(GptEdgeError):
    """`advice` is for who may change settings, which whoever sent the prompt may not."""

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(problem + advice)
        self.problem = problem


class DownloadError(GptEdgeError):
    pass


class MissingExtraError(GptEdgeError):
    pass


class TrainingError(GptEdgeError):
    pass


class ParityError(GptEdgeError):
    exit_code = 3


class GateFailed(GptEdgeError):
    exit_code = 4


class UnsupportedModelError(GptEdgeError):
    exit_code = 5
