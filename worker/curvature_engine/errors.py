"""The engine's one exception. Its codes are those of the wire protocol."""

import torch

_NO_MEMORY = ("allocate memory", "out of memory", "bad_alloc")
"""How torch and the C++ library say so."""


class EngineError(Exception):
    """Something about the model, the batch or the request keeps the engine from giving exact numbers.

    Attributes:
        code: machine-readable reason, e.g. `"invalid_targets"`.
        message: what was expected and what came.
        param: the field, file or parameter at fault, if one is.
        remedy: what to do about it.
    """

    def __init__(self, code: str, message: str, *, remedy: str, param: str | None = None) -> None:
        super().__init__(f"{message}; {remedy}")
        self.code = code
        self.message = message
        self.param = param
        self.remedy = remedy


class TooLarge(EngineError):
    """A forward pass keeps more than it may, and was given up."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            "out_of_memory",
            f"the forward pass keeps more than {limit_bytes} bytes",
            remedy="use a smaller batch, or a larger budget",
        )


class DoesNotFit(EngineError):
    """An analysis needs more memory than there is for it.

    Attributes:
        needed_bytes: how much, beside program and batch.
    """

    def __init__(self, needed_bytes: int, most_bytes: int) -> None:
        super().__init__(
            "no_fitting_worker",
            f"the analysis needs {needed_bytes} bytes beside model and batch; it may take {most_bytes}",
            remedy="use a smaller batch, fewer extensions or parameters, or a machine with more memory",
        )
        self.needed_bytes = needed_bytes


def first_line(error: BaseException) -> str:
    """An error's message in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def memory_ran_out(error: BaseException) -> bool:
    """Whether torch failed for want of memory, on whichever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory ran out."""
    while error is not None:
        if memory_ran_out(error) or (isinstance(error, EngineError) and error.code == "out_of_memory"):
            return True
        error = error.__cause__
    return False
