"""A model's file that takes every batch of a data set: converted with the first, anew where a later one needs it.

Files of the user's own, scripted modules and exported programs go as they are: what they take, the server finds out.
"""

from pathlib import Path
from typing import Any

from curvature_client._batches import Batch
from curvature_client._conversion import Converted, convert_for

ONE = "one sample"
SEVERAL = "another number of samples"
SHAPE = "another shape"


class FittedModel:
    """A model on its way to the server, converted by the first batch that it is shown.

    Args:
        model: as the user gave it.
        folder: holds its file.
        eval: whether a module in training mode is put into eval mode.
        format: "auto", or the one way to take.
    """

    def __init__(self, model: Any, folder: Path, *, eval: bool, format: str) -> None:
        self._model, self._folder, self._eval, self._format = model, folder, eval, format
        self._examples: list[Batch] = []
        self._seen: set[str] = set()
        self._converted: Converted | None = None

    @property
    def converted(self) -> Converted:
        """The file, and how it came to be."""
        assert self._converted is not None, "no batch was shown"
        return self._converted

    def take(self, batch: Batch) -> None:
        """See to it that the file takes this batch; of several that differ from the first alike, one speaks for all.

        Raises:
            ModelConversionError: no way that was allowed leads to a file that takes all batches.
            UnprocessableError: as `convert_for`.
        """
        if not self._examples:
            self._examples.append(batch)
            self._convert()
            return
        new = self._differences(batch) - self._seen
        if not new or self.converted.way not in ("export", "trace"):
            return
        self._seen |= new
        # An export's sizes are derived for two samples and more; everything else was only seen to work.
        if self.converted.way == "export" and new == {SEVERAL} and self._examples[0].samples > 1:
            return
        self._examples.append(batch)
        self._convert()

    def _convert(self) -> None:
        self._converted = convert_for(self._model, self._examples, self._folder, eval=self._eval, format=self._format)

    def _differences(self, batch: Batch) -> set[str]:
        first = self._examples[0]
        found = set()
        if batch.samples != first.samples:
            found.add(ONE if batch.samples == 1 else SEVERAL)
        if any(shape[1:] != first.layout[name][1][1:] for name, (_, shape) in batch.layout.items()):
            found.add(SHAPE)
        return found
