"""Seeing the operators that reach torch's dispatcher."""

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch's, without its compiler: nothing is compiled within one, yet a first call would import it, for seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
