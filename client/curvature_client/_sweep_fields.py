"""Fields of a sweep's rows in the form that the server reads: each model converted, each file uploaded, once."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from curvature_client._batches import Batch
from curvature_client._datasets import DataSet, UploadedDataSet, read_batch
from curvature_client._errors import APIStatusError, ModelConversionError
from curvature_client._extensions import list_of, read_extensions, take_batches
from curvature_client._fitting import FittedModel
from curvature_client._functions import read_function
from curvature_client._losses import read_loss
from curvature_client._payloads import Payload
from curvature_client._requirements import read_requirements
from curvature_client._submission import checked_metadata, checked_parameters, shortened
from curvature_client._sweep_names import plain
from curvature_client._transport import Transport
from curvature_client._uploads import is_stored, upload
from curvature_protocol.artefacts import ArtefactKind

Identity = tuple[Any, ...]


def identity(value: Any) -> Identity:
    """Equal for values that are one and the same: equal words and numbers, one object."""
    if value is None or isinstance(value, str | int | float | Path):
        return type(value), value
    return id, id(value)


class SentFields:
    """What the server was told of the values of fields. It knows objects by identity: the caller keeps them.

    Args:
        transport: the server.
        folder: holds files until they are sent.
        progress: whether to show a bar; None shows it where somebody sees it.
        format: how an nn.Module becomes a file.
    """

    def __init__(self, transport: Transport, folder: Path, progress: bool | None, format: str) -> None:
        self._transport, self._folder, self._progress, self._format = transport, folder, progress, format
        self._stored: set[tuple[str, str]] = set()
        self._models: dict[Identity, dict[str, Any]] = {}
        self._batches: dict[Identity, dict[str, Any]] = {}
        self._known: dict[Identity, dict[str, Any]] = {}

    def send_models_and_batches(self, rows: Iterable["ModelOnBatch"]) -> None:
        """Convert every model so that it takes all batches that rows have it with, and upload both."""
        by_batch: dict[Identity, dict[Identity, ModelOnBatch]] = {}
        by_model: dict[Identity, dict[Identity, ModelOnBatch]] = {}
        for row in rows:
            by_batch.setdefault(row.batch_key, {}).setdefault(row.model_key, row)
            by_model.setdefault(row.model_key, {}).setdefault(row.batch_key, row)
        batches = {key: _read_batch(next(iter(mine.values()))) for key, mine in by_batch.items()}
        models: dict[Identity, FittedModel] = {}
        for key, batch in batches.items():
            mine = by_batch[key]
            with placed(next(iter(mine.values())).batch_origin, "batch"):
                if isinstance(batch, Batch):
                    self._batches[key] = self._send_batch(batch)
                else:  # a generator is read once: all models see its parts then
                    seeing = [models.setdefault(row.model_key, self._fitted(row)) for row in mine.values()]
                    self._batches[key] = self._send_data_set(batch, seeing)
        for key, mine in by_model.items():
            first = next(iter(mine.values()))
            # Not kept: a thousand models need not be in memory together.
            fitted = models.pop(key, None) or self._fitted(first)
            with placed(first.model_origin, "model"):
                for batch in (batches[batch_key] for batch_key in mine):
                    if isinstance(batch, Batch):
                        fitted.take(batch)
                self._models[key] = self._send_model(fitted)

    def model(self, value: Any, eval: bool) -> dict[str, Any]:
        """The model of rows sent before, with what came to notice."""
        return self._models[model_key(value, eval)]

    def batch(self, value: Any) -> dict[str, Any]:
        """The batch of rows sent before."""
        return self._batches[identity(value)]

    def loss(self, value: Any, reduction: str | None) -> dict[str, Any]:
        """Loss and reduction; a function is uploaded."""
        return self._once(("loss", identity(value), reduction), lambda: self._loss(value, reduction))

    def other(self, field: str, value: Any) -> dict[str, Any]:
        """Any other field; batches among the options of extensions are uploaded."""
        return self._once((field, identity(value)), lambda: {field: self._read(field, value)})

    def _once(self, key: Identity, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _read(self, field: str, value: Any) -> Any:
        if field == "extensions":
            return self._extensions(value)
        if field == "parameters":
            return checked_parameters(value)
        if field == "metadata":
            return checked_metadata(value)
        if field == "requires":
            return read_requirements(value)
        return plain(value)

    def _loss(self, value: Any, reduction: str | None) -> dict[str, Any]:
        function = read_function(value)
        loss, reduction = read_loss(None if function is not None else value, reduction)
        if function is None:
            return {"loss": loss, "reduction": reduction}
        self._send("losses", function.payload)
        return {"loss": function.request(), "reduction": reduction}

    def _extensions(self, value: Any) -> list[dict[str, Any]]:
        kept, others = take_batches(list_of(value))
        requests = read_extensions(kept)
        for (place, option), given in others.items():
            with placed(f"extensions.{place}.options.{option}", "batch"):
                payload = Batch(given).payload(self._own_folder())
                self._send("batches", payload)
            requests[place].setdefault("options", {})[option] = {"sha256": payload.sha256}
        return requests

    def _fitted(self, row: "ModelOnBatch") -> FittedModel:
        return FittedModel(row.model, self._own_folder(), eval=row.eval, format=self._format)

    def _send_batch(self, batch: Batch) -> dict[str, Any]:
        payload = batch.payload(self._own_folder())
        self._send("batches", payload)
        return {"sha256": payload.sha256}

    def _send_data_set(self, data_set: DataSet, models: Sequence[FittedModel]) -> dict[str, Any]:
        def show(part: Batch) -> None:
            for model in models:
                model.take(part)

        return UploadedDataSet(self._transport, data_set, self._own_folder(), self._progress, show).reference()

    def _send_model(self, fitted: FittedModel) -> dict[str, Any]:
        self._send("models", fitted.converted.payload)
        notes = shortened(fitted.converted.notes)
        return {"model": fitted.converted.payload.sha256, **({"warnings": notes} if notes else {})}

    def _send(self, kind: ArtefactKind, payload: Payload) -> None:
        if (kind, payload.sha256) in self._stored:
            return
        if not is_stored(self._transport, kind, payload.sha256):
            upload(self._transport, kind, payload, self._progress)
        self._stored.add((kind, payload.sha256))

    def _own_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder))


class ModelOnBatch:
    """A model and a batch that some rows have together.

    Args:
        fields: of such a row.
        origins: where model and batch stand in what the user gave.
    """

    def __init__(self, fields: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        self.model, self.batch, self.eval = fields["model"], fields["batch"], bool(fields.get("eval", True))
        self.model_origin, self.batch_origin = origins["model"], origins["batch"]
        self.model_key, self.batch_key = model_key(self.model, self.eval), identity(self.batch)


def model_key(model: Any, eval: bool) -> Identity:
    """Equal for models that are converted alike."""
    return identity(model), eval


def _read_batch(row: ModelOnBatch) -> Batch | DataSet:
    with placed(row.batch_origin, "batch"):
        return read_batch(row.batch)


@contextmanager
def placed(origin: str, field: str) -> Iterator[None]:
    """What is wrong with a field's value names the value's place in the sweep."""
    try:
        yield
    except (APIStatusError, ModelConversionError) as error:
        if origin != field:
            error.param = origin + (error.param or field).removeprefix(field)
            error.message = f"{origin}: {error.message}"
            error.args = (error.message,)
        raise
