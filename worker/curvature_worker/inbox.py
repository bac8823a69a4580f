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


PARTS = "parts.json"
"""What the child is told of a data set's shards."""


def part_name(part: int, group: int) -> str:
    """The state of one of a shard's groups."""
    return f"part-{part}-{group}"
