"""A data set as given: an iterable of batches, whose files are uploaded while the next is prepared.

Given: a DataLoader, a generator, or a list of batches, each in one of the forms of `_batches`. A pair of tensors is one
batch; a list of pairs is a data set. The user's iterator runs in the calling thread alone.
"""

import operator
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from curvature_client._batches import Batch
from curvature_client._errors import APIStatusError, refusal
from curvature_client._parallel import Uploads
from curvature_client._progress import ProgressBar
from curvature_client._transport import Transport
from curvature_protocol.names import INPUTS, TARGETS
from curvature_protocol.requests import MOST_PARTS

_MOST_TIMES = 3
"""So often a data set is uploaded whose parts the server loses before the job holds them."""

_LOADER = "a data set of single samples goes through a loader: DataLoader(dataset, batch_size=64)"


class DataSet:
    """Several batches as one, in their order.

    Attributes:
        repeatable: whether it can be read more than once; a generator cannot.
    """

    def __init__(self, given: Iterable[Any]) -> None:
        self._given = given
        self.repeatable = not isinstance(given, Iterator)

    def batches(self) -> Iterator[Batch]:
        """The batches one after another, held against the first.

        Raises:
            UnprocessableError: one of them is no batch, or its tensors differ from the first's in name, type or number
                of axes; there are none, or too many.
            Exception: whatever the user's iterator raises.
        """
        first: Batch | None = None
        place = -1
        for place, item in enumerate(self._given):
            if place == MOST_PARTS:
                raise refusal(
                    "invalid_batch",
                    f"a data set has at most {MOST_PARTS:,} parts; more came",
                    param="batch",
                    remedy="make larger batches",
                )
            batch = _part(item, place)
            first = first or batch
            _check_alike(first, batch, place)
            yield batch
        if place < 0:
            raise refusal("empty_batch", "the data set has no batches", param="batch", remedy="give at least one")

    def first(self) -> Batch:
        """The first batch, where reading it loses nothing.

        Raises:
            UnprocessableError: it would be lost; and as `batches`.
        """
        if not self.repeatable:
            raise refusal(
                "invalid_batch",
                "of a data set the first batch is looked at here, and an iterator would lose it",
                param="batch",
                remedy="give one batch, a list of batches or a DataLoader",
            )
        return next(self.batches())

    def __length_hint__(self) -> int:
        """How many batches there are; 0 where nobody knows."""
        return operator.length_hint(self._given)


class UploadedDataSet:
    """A data set whose parts the server has, to be named in a request.

    Args:
        transport: the server.
        data_set: what the user gave.
        folder: holds large parts until they are sent.
        progress: whether to show a bar; None shows it where somebody sees it.
        show: is shown every batch before it is sent.

    Raises:
        Exception: as `DataSet.batches`, and `show`; an upload's error. Nothing is being sent any more then.
    """

    def __init__(
        self,
        transport: Transport,
        data_set: DataSet,
        folder: Path,
        progress: bool | None,
        show: Callable[[Batch], object],
    ) -> None:
        self._transport, self._data_set, self._folder, self._progress = transport, data_set, folder, progress
        self._times = 0
        self._parts = self._upload(show)

    def reference(self) -> dict[str, Any]:
        """As a request names it."""
        return {"parts": self._parts}

    def mend(self, error: APIStatusError) -> bool:
        """Whether the same request may do now: the server had lost a part, and was sent it again."""
        if error.code != "batch_not_found" or not (error.param or "").startswith("batch.parts."):
            return False
        if not self._data_set.repeatable:
            error.remedy = "an iterator can be read only once: run it anew, or give a list of batches or a DataLoader"
            return False
        if self._times == _MOST_TIMES:
            return False
        self._parts = self._upload(lambda _: None)
        return True

    def _upload(self, show: Callable[[Batch], object]) -> list[dict[str, Any]]:
        self._times += 1
        parts = []
        with ProgressBar(self._progress) as bar, Uploads(self._transport, "batches", bar.part_sent) as uploads:
            bar.parts(operator.length_hint(self._data_set))
            for batch in self._data_set.batches():
                show(batch)
                own = Path(tempfile.mkdtemp(dir=self._folder))
                payload = batch.payload(own)
                parts.append({"sha256": payload.sha256, "samples": batch.samples})
                uploads.add(payload, partial(shutil.rmtree, own, ignore_errors=True))
        return parts


def read_batch(given: Any) -> Batch | DataSet:
    """What the user gave as `batch`: one, or several.

    Raises:
        UnprocessableError: it is neither, or could be both.
    """
    if isinstance(given, str | os.PathLike | Mapping | type) or hasattr(given, "__array__"):
        return Batch(given)
    if isinstance(given, tuple | list):
        return DataSet(given) if _holds_batches(given) else Batch(given)
    if isinstance(given, Iterable):
        return DataSet(given)
    if hasattr(given, "__getitem__"):
        raise refusal(
            "invalid_batch", f"a {type(given).__name__} gives samples, not batches", param="batch", remedy=_LOADER
        )
    return Batch(given)


def _holds_batches(values: tuple[Any, ...] | list[Any]) -> bool:
    """Whether a sequence is a data set; where it is not, it is one batch, or nothing of use."""
    if not values:
        raise refusal("empty_batch", "the data set has no batches", param="batch", remedy="give at least one")
    found = [_may_be_batch(value) for value in values]
    if len(values) == 2 and isinstance(values, tuple) and all(_is_sequence_of_arrays(value) for value in values):
        raise refusal(
            "invalid_batch",
            "a tuple of two sequences of tensors could be (inputs, targets) or two batches",
            param="batch",
            remedy='write several inputs as {"inputs": (first, second), "targets": targets}, '
            "and a data set as a list: [(inputs, targets), (inputs, targets)]",
        )
    if any(found) and not all(found) and len(values) != 2:
        place = found.index(False)
        raise refusal(
            "invalid_batch",
            f"a list of batches holds batches alone; item {place} is of type {type(values[place]).__name__}",
            param=f"batch.parts.{place}",
            remedy='each is (inputs, targets), {"inputs": …, "targets": …}, or a path',
        )
    return all(found)


def _may_be_batch(value: Any) -> bool:
    """Whether a value has a batch's form."""
    if isinstance(value, Mapping):
        return set(value) == {INPUTS, TARGETS}
    if isinstance(value, tuple | list):
        return len(value) == 2
    return isinstance(value, str | os.PathLike)


def _is_sequence_of_arrays(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(hasattr(each, "__array__") for each in value)


def _part(item: Any, place: int) -> Batch:
    """An item of the data set as a batch; what is wrong with it names its place."""
    try:
        batch = Batch(item)
        _ = batch.samples
    except APIStatusError as error:
        error.message = f"part {place} of the data set: {error.message}"
        error.args = (error.message,)
        error.param = f"batch.parts.{place}"
        raise
    return batch


def _check_alike(first: Batch, batch: Batch, place: int) -> None:
    """Check that a part's tensors are the first's but for their sizes."""
    ours, theirs = ({name: (dtype, len(shape)) for name, (dtype, shape) in b.layout.items()} for b in (first, batch))
    if ours != theirs:
        raise refusal(
            "invalid_batch",
            f"part {place} of the data set holds {_described(batch)}; part 0 holds {_described(first)}",
            param=f"batch.parts.{place}",
            remedy="give all parts the same tensors, of the same types",
        )


def _described(batch: Batch) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in batch.layout.items())
