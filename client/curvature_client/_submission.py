"""One request on its way to the server: converted, sent, and its parts uploaded where the server lacks them."""

import base64
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from curvature_client._batches import Batch
from curvature_client._datasets import DataSet, UploadedDataSet, read_batch
from curvature_client._errors import APIStatusError, CurvatureError, NotFoundError, PayloadTooLargeError, refusal
from curvature_client._extensions import ExtensionLike, list_of, read_extensions, take_batches
from curvature_client._fitting import FittedModel
from curvature_client._functions import LossFunction, read_function
from curvature_client._jobs import Job
from curvature_client._losses import read_loss
from curvature_client._payloads import Payload
from curvature_client._requirements import read_requirements, read_webhook
from curvature_client._transport import Transport
from curvature_client._uploads import upload
from curvature_protocol.artefacts import SINGULAR, ArtefactKind
from curvature_protocol.jobs import Job as JobView
from curvature_protocol.requests import Precision

V = TypeVar("V", bound=JobView)

INLINE_BATCH_BYTES = 2**20
"""A smaller batch rides inside the request."""

_LACKING = frozenset(f"{what}_not_found" for what in SINGULAR.values())
"""What the server says of an upload that it lacks; `param` says which."""

MOST_WARNINGS = 32
MOST_WARNING_CHARACTERS = 1000


@dataclass(frozen=True)
class AnalysisRequest:
    """The arguments of `Client.analyze` and `Client.submit`, as the user gave them."""

    model: Any
    batch: Any
    extensions: ExtensionLike | Sequence[ExtensionLike]
    loss: Any
    reduction: str | None
    seed: int
    parameters: str | Sequence[str]
    eval: bool
    format: str
    verify: bool = False
    precision: Precision = "float32"
    channels_last: bool = False
    priority: int = 5
    cache: bool = True
    requires: Mapping[str, Any] | None = None
    webhook: str | Mapping[str, Any] | None = None
    metadata: Mapping[str, str] | None = None

    def body(self, function: LossFunction | None) -> dict[str, Any]:
        """What the server reads, but for model and batches; `function` is the loss, where it is one.

        Raises:
            UnprocessableError: an argument that the client itself can judge does not fit.
        """
        loss, reduction = read_loss(None if function is not None else self.loss, self.reduction)
        return {
            "extensions": read_extensions(self.extensions),
            "loss": loss if function is None else function.request(),
            "reduction": reduction,
            "seed": self.seed,
            "parameters": checked_parameters(self.parameters),
            "eval": self.eval,
            "verify": self.verify,
            "precision": self.precision,
            "channels_last": self.channels_last,
            "priority": self.priority,
            "cache": self.cache,
            "requires": read_requirements(self.requires),
            "webhook": read_webhook(self.webhook),
            "metadata": checked_metadata(self.metadata),
        }


class Submission:
    """Sent at once, and again after uploading what the server turns out to lack; a data set's parts go before.

    Args:
        transport: the server.
        request: what the user asked for.
        progress: whether to show a bar; None shows it where somebody sees it.
        plan: ask for a plan instead of a result; of a data set, for that of its first batch.
    """

    def __init__(
        self, transport: Transport, request: AnalysisRequest, progress: bool | None, *, plan: bool = False
    ) -> None:
        self._transport, self._progress = transport, progress
        self._path = "/v1/plans" if plan else "/v1/jobs"
        function = read_function(request.loss)
        extensions, others = take_batches(list_of(request.extensions))
        body = replace(request, extensions=extensions).body(function)
        batch = read_batch(request.batch)
        if plan and isinstance(batch, DataSet):
            batch = batch.first()
        further = {key: _further_batch(key, given) for key, given in others.items()}
        self._parts: dict[str, tuple[ArtefactKind, Payload]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="curvature-")
        try:
            folder = Path(self._folder.name)
            if function is not None:
                self._parts["loss"] = ("losses", function.payload)
            for (place, option), other in further.items():
                payload = other.payload(Path(tempfile.mkdtemp(dir=folder)))
                self._parts[f"extensions.{place}.options.{option}"] = ("batches", payload)
                body["extensions"][place]["options"][option] = {"sha256": payload.sha256}
            model = FittedModel(request.model, folder, eval=request.eval, format=request.format)
            self._batch = self._prepared(batch, model, folder)
            self._parts["model"] = ("models", model.converted.payload)
        except BaseException:
            self._folder.cleanup()
            raise
        self._body = {**body, "model": model.converted.payload.sha256, "warnings": shortened(model.converted.notes)}
        # One key for all attempts: however often the request is repeated, there is one job.
        self._key = uuid.uuid4().hex

    def _prepared(self, batch: Batch | DataSet, model: FittedModel, folder: Path) -> "_OneBatch | UploadedDataSet":
        """The batch ready to be named in a request, the model converted on the way."""
        if isinstance(batch, DataSet):
            return UploadedDataSet(self._transport, batch, folder, self._progress, model.take)
        model.take(batch)
        payload = batch.payload(folder)
        self._parts["batch"] = ("batches", payload)
        return _OneBatch(payload)

    def __enter__(self) -> "Submission":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def send(self, wait_seconds: float) -> Job:
        """Submit, uploading what is missing; the reply comes when the job is over or the wait is."""
        return self._job(self.ask(wait_seconds, JobView))

    def ask(self, wait_seconds: float, kind: type[V]) -> V:
        """`send` that returns the reply itself."""
        uploaded: set[str] = set()
        while True:
            try:
                return self._post(wait_seconds, kind)
            except (NotFoundError, PayloadTooLargeError) as error:
                if self._batch.mend(error):
                    continue
                part = error.param or ""
                if error.code not in _LACKING or part not in self._parts or part in uploaded:
                    raise
                uploaded.add(part)
                upload(self._transport, *self._parts[part], self._progress)

    def cancel(self) -> None:
        """Cancel the job, if the server has it; its id may not have come back yet, so it is found by its key."""
        try:
            self._job(self._post(0.0, JobView)).cancel()
        except CurvatureError:
            return

    def _post(self, wait_seconds: float, kind: type[V]) -> V:
        response = self._transport.request(
            "POST",
            self._path,
            json={**self._body, "batch": self._batch.reference()},
            params={"wait": wait_seconds} if wait_seconds else {},
            headers={"Idempotency-Key": self._key},
            timeout=self._transport.timeout_beyond(wait_seconds),
        )
        return self._transport.parse(response, kind)

    def _job(self, view: JobView) -> Job:
        return Job(self._transport, view, progress=self._progress)


class _OneBatch:
    """A batch to be named in a request, or, if it is small, to ride inside it."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._inline = payload.size_bytes <= INLINE_BATCH_BYTES

    def reference(self) -> dict[str, Any]:
        """As a request names it."""
        if self._inline:
            return {"data": base64.b64encode(self._payload.read()).decode()}
        return {"sha256": self._payload.sha256}

    def mend(self, error: APIStatusError) -> bool:
        """Whether another request may do: this server wants it uploaded."""
        if not self._inline or error.param != "batch.data" or not isinstance(error, PayloadTooLargeError):
            return False
        self._inline = False
        return True


def shortened(notes: Sequence[str]) -> list[str]:
    """As much of the notes as a request may bring."""
    return [note[:MOST_WARNING_CHARACTERS] for note in notes[:MOST_WARNINGS]]


def _further_batch(key: tuple[int, str], given: Any) -> Batch:
    """Another batch; what is wrong with it names its place among the options."""
    try:
        return Batch(given)
    except APIStatusError as error:
        place, option = key
        error.param = f"extensions.{place}.options.{option}"
        raise


def checked_parameters(parameters: str | Sequence[str]) -> str | list[str]:
    """A keyword, or patterns of names as a list.

    Raises:
        UnprocessableError: something else was given.
    """
    if isinstance(parameters, str):
        return parameters
    found = list(parameters) if isinstance(parameters, Iterable) else [parameters]
    if not found or not all(isinstance(pattern, str) for pattern in found):
        raise refusal(
            "invalid_request",
            f'parameters is "trainable", "all", or one or several patterns of names; got {found!r:.200}',
            param="parameters",
            remedy='e.g. parameters=["*.bias", "head.weight"], or leave it out',
        )
    return found


def checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Notes of the user's own.

    Raises:
        UnprocessableError: they are no strings.
    """
    found = dict(metadata or {})
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise refusal(
                "invalid_request",
                f"metadata map strings to strings; got {name!r}: {value!r}",
                param="metadata",
                remedy="convert the values with str()",
            )
    return found
