"""The client: hands a model and a batch to a server, and gives back jobs and results."""

import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx

from curvature_client._extensions import ExtensionLike
from curvature_client._inspections import Inspection, inspect_model
from curvature_client._jobs import Job, Jobs
from curvature_client._plans import Plan
from curvature_client._progress import has_audience
from curvature_client._results import Result
from curvature_client._submission import AnalysisRequest, Submission
from curvature_client._sweep_submission import SweepArguments, submit_sweep
from curvature_client._sweeps import Sweep, Sweeps
from curvature_client._transport import DEFAULT_TIMEOUT, Transport
from curvature_protocol.catalogue import Catalogue
from curvature_protocol.health import Health
from curvature_protocol.plans import PlanJob
from curvature_protocol.requests import Precision

FIRST_WAIT_SECONDS = 5.0
"""How long the submitting request itself waits in `analyze`: a small job's tensors come back with it."""

FIRST_WAIT_WATCHED_SECONDS = 1.0
"""The same where somebody waits for a bar to appear."""


class Client:
    """A connection to one server. Safe to use from several threads; close it, or use it in a with-block.

    Args:
        base_url: the server's address; else `CURVATURE_URL`, else http://127.0.0.1:8000.
        api_key: else `CURVATURE_API_KEY`.
        timeout: of one request, in seconds or as `httpx.Timeout`; not of jobs.
        max_retries: further attempts after a lost connection or a busy server.
        http_client: an `httpx.Client` of your own (proxies, certificates); it stays open.
        progress: show a bar; None shows it in terminals and notebooks.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        http_client: httpx.Client | None = None,
        progress: bool | None = None,
    ) -> None:
        self._transport = Transport(base_url, api_key, timeout, max_retries, http_client)
        self._progress = progress
        self.jobs = Jobs(self._transport, progress)
        self.sweeps = Sweeps(self._transport, progress)

    @property
    def base_url(self) -> str:
        """The server's address."""
        return self._transport.base_url

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {self.base_url}>"

    def analyze(
        self,
        model: Any,
        batch: Any,
        extensions: ExtensionLike | Sequence[ExtensionLike],
        *,
        loss: Any = None,
        reduction: str | None = None,
        seed: int = 0,
        parameters: str | Sequence[str] = "trainable",
        eval: bool = True,
        verify: bool = False,
        precision: Precision = "float32",
        channels_last: bool = False,
        priority: int = 5,
        cache: bool = True,
        requires: Mapping[str, Any] | None = None,
        webhook: str | Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        format: str = "auto",
        timeout: float | None = 600.0,
    ) -> Result:
        """Submit a job, wait for it, and return its result. Ctrl-C cancels the job.

        Args:
            model: an nn.Module, an ExportedProgram, a ScriptModule, or the path of a TorchScript or .pt2 file. Yours is
                never changed.
            batch: (inputs, targets), {"inputs": tensor or tuple or dictionary, "targets": tensor}, or the path of a
                safetensors or .npz file; tensors of torch or NumPy, on any device. Or a data set: an iterable of such
                batches (a DataLoader, a generator, a list), each uploaded while the next is prepared, computed on
                whichever workers are free, and merged to what one batch of all samples would give.
            extensions: names, dictionaries with name, label and options, or values such as `KFAC(mc_samples=4)`.
            loss: "cross_entropy", "mse", a dictionary, nn.CrossEntropyLoss(...) or nn.MSELoss(...); a function of
                (outputs, targets) that returns each sample's loss [N], plain, scripted, or the path of its file; None
                means cross-entropy for integer targets on [N, C] outputs.
            reduction: "mean" (default) or "sum".
            seed: of the Monte-Carlo draws.
            parameters: "trainable" (requires_grad), "all", or one or several patterns of names, e.g. "layer4.*".
            eval: analyze a module in training mode as an eval-mode copy.
            verify: hold every parameter's summed contributions against the ordinary gradient in this very job,
                whatever was verified before; a mismatch fails it (`verification_failed`).
            precision: how float32 matrices are multiplied: "float32"; or faster and less exact, "tf32" (on GPUs from
                Ampere on; needs requires={"gpu": True}) or "bf16" (there, and on CPUs with such products).
                `result.manifest.precision_error` says by how much the loss's gradient differs.
            channels_last: lay images and the weights of convolutions out with their channels last in memory.
            priority: 0 (last) to 9 (first).
            cache: take what was computed before, and keep this result for others.
            requires: what a worker must have, of {"gpu": True, "tag": "a100", "memory_bytes": 8 * 2**30}.
            webhook: where the server tells that the job is over: an address, or {"url": …, "secret": …}.
            metadata: notes of your own, kept with the job.
            format: how an nn.Module becomes a file: "auto" (the first that works of the following), "export" (with a
                dynamic batch axis; held against the module's own outputs and gradients), "script" or "trace". The
                manifest says which format was analyzed.
            timeout: seconds to wait.

        Raises:
            JobFailed: the job failed; also an instance of its error's family.
            WaitTimeout: it is not over yet, and goes on; `job_id` finds it again.
            APIStatusError: the server refused the request, as the class of its family.
            APIConnectionError: no answer.
            ModelConversionError: the module could be neither exported nor scripted nor traced.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        request = AnalysisRequest(
            model=model,
            batch=batch,
            extensions=extensions,
            loss=loss,
            reduction=reduction,
            seed=seed,
            parameters=parameters,
            eval=eval,
            verify=verify,
            precision=precision,
            channels_last=channels_last,
            priority=priority,
            cache=cache,
            requires=requires,
            webhook=webhook,
            metadata=metadata,
            format=format,
        )
        with Submission(self._transport, request, self._progress) as submission:
            try:
                first = FIRST_WAIT_WATCHED_SECONDS if has_audience(self._progress) else FIRST_WAIT_SECONDS
                job = submission.send(first if timeout is None else min(first, timeout))
                job.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
                return job.result()
            except KeyboardInterrupt:
                submission.cancel()
                raise

    def submit(
        self,
        model: Any,
        batch: Any,
        extensions: ExtensionLike | Sequence[ExtensionLike],
        *,
        loss: Any = None,
        reduction: str | None = None,
        seed: int = 0,
        parameters: str | Sequence[str] = "trainable",
        eval: bool = True,
        verify: bool = False,
        precision: Precision = "float32",
        channels_last: bool = False,
        priority: int = 5,
        cache: bool = True,
        requires: Mapping[str, Any] | None = None,
        webhook: str | Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        format: str = "auto",
    ) -> Job:
        """Submit a job and return it at once; arguments and errors as in `analyze`."""
        request = AnalysisRequest(
            model=model,
            batch=batch,
            extensions=extensions,
            loss=loss,
            reduction=reduction,
            seed=seed,
            parameters=parameters,
            eval=eval,
            verify=verify,
            precision=precision,
            channels_last=channels_last,
            priority=priority,
            cache=cache,
            requires=requires,
            webhook=webhook,
            metadata=metadata,
            format=format,
        )
        with Submission(self._transport, request, self._progress) as submission:
            return submission.send(0.0)

    def sweep(
        self,
        *,
        grid: Mapping[str, Any] | None = None,
        rows: Iterable[Mapping[str, Any]] | None = None,
        metadata: Mapping[str, str] | None = None,
        webhook: str | Mapping[str, Any] | None = None,
        format: str = "auto",
        **base: Any,
    ) -> Sweep:
        """Submit many jobs at once and return the sweep: all are accepted, or none.

        client.sweep(grid={"model": [a, b], "seed": range(10)}, batch=batch, extensions=["diag_ggn_mc"])
        client.sweep(rows=[{"model": a, "batch": first}, {"model": b, "batch": second}], extensions=["variance"])

        Each model is converted once, so that it takes every batch it is combined with, and each file uploaded once.

        Args:
            grid: argument of `submit` → its values, every combination of which is a row, the last axis fastest. Values
                are a list, or a dictionary of names and values; names are the rows' coordinates. A value without a name
                is known by itself (numbers, words), by its file's name, or by its place.
            rows: one dictionary of arguments of `submit` per row, in place of a grid; "coordinates" in it, a
                dictionary, is what the row is known by.
            metadata: notes of your own, kept with the sweep.
            webhook: where the server tells that every job is over: an address, or {"url": …, "secret": …}.
            format: as in `analyze`.
            base: arguments of `submit` that all rows share: `model`, `batch`, `extensions`, `loss`, `seed`, ….

        Raises:
            UnprocessableError: a value does not fit; `param` is its place, e.g. "grid.loss.2" or "rows.17.batch".
            APIStatusError: the server refused the sweep, as the class of its family.
            ModelConversionError: a module could be neither exported nor scripted nor traced.
        """
        arguments = SweepArguments(grid, rows, base, metadata, webhook, format)
        return Sweep(self._transport, submit_sweep(self._transport, arguments, self._progress), progress=self._progress)

    def plan(
        self,
        model: Any,
        batch: Any,
        extensions: ExtensionLike | Sequence[ExtensionLike],
        *,
        loss: Any = None,
        reduction: str | None = None,
        seed: int = 0,
        parameters: str | Sequence[str] = "trainable",
        eval: bool = True,
        precision: Precision = "float32",
        channels_last: bool = False,
        priority: int = 5,
        requires: Mapping[str, Any] | None = None,
        timeout: float | None = 600.0,
        format: str = "auto",
    ) -> Plan:
        """What `analyze` would do with the same arguments: method, cost and memory of every parameter.

        A forward pass finds it; nothing is computed. Arguments and errors as in `analyze`; of a data set, the plan is
        its first batch's (a generator is refused: it would lose it).
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        request = AnalysisRequest(
            model=model,
            batch=batch,
            extensions=extensions,
            loss=loss,
            reduction=reduction,
            seed=seed,
            parameters=parameters,
            eval=eval,
            precision=precision,
            channels_last=channels_last,
            priority=priority,
            requires=requires,
            format=format,
        )
        with Submission(self._transport, request, self._progress, plan=True) as submission:
            try:
                first = FIRST_WAIT_SECONDS if timeout is None else min(FIRST_WAIT_SECONDS, timeout)
                view = submission.ask(first, PlanJob)
                if view.plan is None:
                    job = Job(self._transport, view, progress=self._progress)
                    job.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
                    job.check()
                    view = self._transport.get(f"/v1/plans/{view.id}", PlanJob)
            except KeyboardInterrupt:
                submission.cancel()
                raise
        return Plan.model_validate(dict(view.plan or {}))

    def inspect(
        self,
        model: Any,
        *,
        batch: Any = None,
        eval: bool = True,
        timeout: float | None = 600.0,
        format: str = "auto",
    ) -> Inspection:
        """What a model is, without running it: inputs, operators, and what each parameter is expected to get.

        Args:
            model: as in `analyze`, or the SHA-256 of a model uploaded before.
            batch: as in `analyze`, of a data set the first batch; without it, an nn.Module can only be scripted.
            eval: as in `analyze`.
            format: as in `analyze`.
            timeout: seconds to wait.

        Raises:
            JobFailed: the model is refused; also an instance of its error's family.
            NotFoundError: no model of that SHA-256 is stored.
            WaitTimeout: no worker has told yet.
        """
        return inspect_model(
            self._transport, model, batch, eval=eval, format=format, timeout=timeout, progress=self._progress
        )

    def extensions(self) -> Catalogue:
        """What the server's workers can compute: names, options, shapes, formulas, sources."""
        return self._transport.get("/v1/extensions", Catalogue)

    def health(self) -> Health:
        """The server's version, workers, isolation and limits."""
        return self._transport.get("/v1/health", Health)
