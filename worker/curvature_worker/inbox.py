"""Names of files in a child's inbox.

A model lies there under its hash, and stays. What comes for one job and goes after it has names of its own kinds: one
file may be uploaded as a model and as something else, too.
"""


def batch_name(sha256: str) -> str:
    """A batch's name."""
    return f"batch-{sha256}"


def loss_name(sha256: str) -> str:
    """A loss function's name."""
    return f"loss-{sha256}"
