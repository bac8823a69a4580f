"""The `curvature` command."""

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from curvature_client._client import Client
from curvature_client._errors import CurvatureError, WaitTimeout
from curvature_client._jobs import Job
from curvature_client._results import Result, checked_target
from curvature_client._sweep_commands import Url, sweep, sweeps_app
from curvature_client._tables import table
from curvature_protocol.jobs import FINAL, JobStatus

app = typer.Typer(
    name="curvature",
    help="Individual gradients, GGN diagonals and Kronecker factors of any TorchScript or exported model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
jobs_app = typer.Typer(invoke_without_command=True, help="List jobs; show, cancel, retry, delete or save one.")
app.add_typer(jobs_app, name="jobs")
app.command("sweep")(sweep)
app.add_typer(sweeps_app, name="sweeps")

_PARTS = {
    "serve": "Run the whole service on this machine: API, worker and broker.",
    "worker": "Run a worker: it takes jobs from the queue of CURVATURE_REDIS_URL.",
    "admin": "Administer the service: tables, API keys, tenants, workers, garbage.",
}
"""Commands (or groups of commands) that other parts of the distribution bring, and what the help says of them."""

Output = Annotated[Path, typer.Option("--output", "-o", help="safetensors file to write")]


def main() -> None:
    """Run the command line; errors are one message on stderr, never a traceback."""
    try:
        _add_parts(sys.argv[1:2])
        app()
    except CurvatureError as error:
        typer.echo(f"curvature: {error}", err=True)
        if isinstance(error, WaitTimeout):
            what = f"jobs show {error.job_id}" if error.sweep_id is None else f"sweeps show {error.sweep_id}"
            typer.echo(f"curvature: see `curvature {what}`", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("curvature: interrupted", err=True)
        sys.exit(130)


def _add_parts(words: list[str]) -> None:
    """Add the commands of the parts that are installed, importing only the one that is called."""
    found = {point.name: point for point in entry_points(group="curvature.commands")}
    for name, summary in _PARTS.items():
        if words == [name]:
            try:
                part = found[name].load()
            except (ImportError, KeyError) as error:
                missing = getattr(error, "name", None) or "the part itself"
                raise CurvatureError(
                    f"`curvature {name}` needs more than the client ({missing} is not installed)",
                    code="not_installed",
                    remedy="install it with all its parts: pip install '.[all]' in the project's folder",
                ) from None
            if isinstance(part, typer.Typer):
                app.add_typer(part, name=name)
            else:
                app.command(name)(part)
        else:
            app.command(name, help=summary)(_stand_in)


def _stand_in() -> None:
    """Only ever seen in the help: the called command is replaced by the real one."""


@app.command()
def analyze(
    model: Annotated[Path, typer.Argument(help="TorchScript or torch.export file")],
    batches: Annotated[
        list[Path],
        typer.Argument(
            metavar="BATCH...", help="safetensors or .npz files with inputs and targets; several: a data set"
        ),
    ],
    extensions: Annotated[list[str], typer.Option("--extension", "-e", help="what to compute; repeat for several")],
    output: Output,
    loss: Annotated[str | None, typer.Option(help="a name, or the file of a TorchScript loss function")] = None,
    reduction: Annotated[str, typer.Option(help="mean or sum")] = "mean",
    seed: Annotated[int, typer.Option(help="of the Monte-Carlo draws")] = 0,
    mc_samples: Annotated[int | None, typer.Option(help="draws per sample, for kfac and the *_mc")] = None,
    approximation: Annotated[str | None, typer.Option(help="expand, reduce or backpack, for kfac, kflr, kfra")] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("--parameters", "-p", help='trainable, all, or a pattern such as "0.*"; repeat')
    ] = None,
    against: Annotated[Path | None, typer.Option(help="another batch, for batch_dot")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="hold all sums of contributions against ordinary gradients in this job")
    ] = False,
    precision: Annotated[
        str, typer.Option(help="of products: float32; or faster, tf32 (with --gpu) or bf16")
    ] = "float32",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="lay images out with their channels last in memory")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="compute everything anew, and keep it from others")
    ] = False,
    priority: Annotated[int, typer.Option(min=0, max=9, help="0 (last) to 9 (first)")] = 5,
    gpu: Annotated[bool, typer.Option("--gpu", help="only on a worker with a GPU")] = False,
    tag: Annotated[str | None, typer.Option(help="only on a worker with this tag")] = None,
    timeout: Annotated[float, typer.Option(help="seconds to wait")] = 600.0,
    url: Url = None,
) -> None:
    """Analyze MODEL on one batch, or on a data set of several, and write the tensors to a safetensors file."""
    checked_target(output)
    options = {"mc_samples": mc_samples, "approximation": approximation, "against": against}
    with Client(url) as client:
        requests = _with_options(client, extensions, {k: v for k, v in options.items() if v is not None})
        result = client.analyze(
            model,
            batches[0] if len(batches) == 1 else batches,
            requests,
            loss=loss,
            reduction=reduction,
            seed=seed,
            parameters=_chosen(parameters),
            verify=verify,
            precision=precision,  # type: ignore[arg-type]  # the server says what there is
            channels_last=channels_last,
            priority=priority,
            cache=not no_cache,
            requires={"gpu": gpu, "tag": tag},
            timeout=timeout,
        )
        _report(result, result.save(output))


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="TorchScript or torch.export file")],
    batch: Annotated[Path, typer.Argument(help="safetensors or .npz file with inputs and targets")],
    extensions: Annotated[list[str], typer.Option("--extension", "-e", help="what to plan; repeat for several")],
    loss: Annotated[str | None, typer.Option(help="a name, or the file of a TorchScript loss function")] = None,
    reduction: Annotated[str, typer.Option(help="mean or sum")] = "mean",
    mc_samples: Annotated[int | None, typer.Option(help="draws per sample, for kfac and the *_mc")] = None,
    approximation: Annotated[str | None, typer.Option(help="expand, reduce or backpack, for kfac, kflr, kfra")] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("--parameters", "-p", help='trainable, all, or a pattern such as "0.*"; repeat')
    ] = None,
    against: Annotated[Path | None, typer.Option(help="another batch, for batch_dot")] = None,
    timeout: Annotated[float, typer.Option(help="seconds to wait")] = 600.0,
    url: Url = None,
) -> None:
    """Show what an analysis of MODEL on BATCH would do, what it costs and how much memory it takes."""
    options = {"mc_samples": mc_samples, "approximation": approximation, "against": against}
    with Client(url) as client:
        requests = _with_options(client, extensions, {k: v for k, v in options.items() if v is not None})
        found = client.plan(
            model,
            batch,
            requests,
            loss=loss,
            reduction=reduction,
            parameters=_chosen(parameters),
            timeout=timeout,
        )
    typer.echo(found)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="TorchScript or torch.export file, or the SHA-256 of an uploaded one")],
    timeout: Annotated[float, typer.Option(help="seconds to wait")] = 600.0,
    url: Url = None,
) -> None:
    """Show what MODEL is, and which extensions each of its parameters is expected to get, without running it."""
    with Client(url) as client:
        typer.echo(client.inspect(model, timeout=timeout))


@app.command("extensions")
def list_extensions(url: Url = None) -> None:
    """List what the server can compute."""
    with Client(url) as client:
        catalogue = client.extensions()
    _table(
        ["EXTENSION", "SHAPE", "OPTIONS", "WHAT"],
        [
            [entry.name, entry.shape, ", ".join(entry.options.get("properties", {})) or "-", entry.summary]
            for entry in catalogue.extensions
        ],
    )
    typer.echo(f"\nlosses: {', '.join(loss.name for loss in catalogue.losses)}")


@jobs_app.callback()
def list_jobs(
    context: typer.Context,
    status: Annotated[JobStatus | None, typer.Option(help="only jobs in this state")] = None,
    limit: Annotated[int, typer.Option(min=1, help="at most so many")] = 20,
    url: Url = None,
) -> None:
    """List jobs, newest first."""
    if context.invoked_subcommand is not None:
        return
    with Client(url) as client:
        found = client.jobs.list(status=None if status is None else status.value, limit=limit)
    _table(
        ["JOB", "STATUS", "CREATED", "TOOK", "EXTENSIONS"],
        [
            [job.id, _standing(job), f"{job.created_at.astimezone():%Y-%m-%d %H:%M:%S}", _duration(job), _labels(job)]
            for job in found
        ],
    )


@jobs_app.command("show")
def show_job(job_id: str, url: Url = None) -> None:
    """Show one job."""
    with Client(url) as client:
        job = client.jobs.get(job_id)
    rows = [
        ("status", _standing(job)),
        ("created", f"{job.created_at.astimezone():%Y-%m-%d %H:%M:%S}"),
        ("took", _duration(job)),
        ("extensions", _labels(job)),
        ("model", job.request["model"]),
        ("batch", _batch_of(job)),
    ]
    rows += [("part of", job.parent)] if job.parent is not None else []
    rows += [("sweep", job.sweep)] if job.sweep is not None else []
    rows += [("at", f"{name}={value}") for name, value in (job.coordinates or {}).items()]
    if job.progress is not None and job.status not in (JobStatus.WAITING, *FINAL):
        rows.append(("progress", f"{job.progress.phase} {job.progress.done}/{job.progress.total}"))
    rows += [("error", str(job.error))] if job.error is not None else []
    rows += [("warning", warning) for warning in job.warnings]
    rows += [("metadata", f"{name}={value}") for name, value in job.metadata.items()]
    for name, value in rows:
        typer.echo(f"{name:<12}{value}")


@jobs_app.command("cancel")
def cancel_job(job_id: str, url: Url = None) -> None:
    """Cancel one job."""
    with Client(url) as client:
        typer.echo(client.jobs.get(job_id).cancel().status)


@jobs_app.command("retry")
def retry_job(job_id: str, url: Url = None) -> None:
    """Queue one failed or cancelled job once more; of a data set, the shards that have not succeeded."""
    with Client(url) as client:
        typer.echo(_standing(client.jobs.get(job_id).retry()))


@jobs_app.command("delete")
def delete_job(job_id: str, url: Url = None) -> None:
    """Delete one job, which must be over, and its result."""
    with Client(url) as client:
        client.jobs.get(job_id).delete()
    typer.echo(f"deleted {job_id}")


@jobs_app.command("save")
def save_job(job_id: str, output: Output, url: Url = None) -> None:
    """Wait for one job and write its tensors to a safetensors file."""
    checked_target(output)
    with Client(url) as client:
        result = client.jobs.get(job_id).result()
        _report(result, result.save(output))


def _chosen(parameters: list[str] | None) -> str | list[str]:
    """One word may be a keyword; several are patterns."""
    found = parameters or ["trainable"]
    return found[0] if len(found) == 1 else found


def _with_options(client: Client, names: list[str], options: dict[str, object]) -> list[dict[str, object]]:
    """Each option goes to the extensions that know it; one that none of them knows goes to all, to be refused."""
    if not options:
        return [{"name": name} for name in names]
    known = {entry.name: set(entry.options.get("properties", {})) for entry in client.extensions().extensions}
    homeless = {option for option in options if not any(option in known.get(name, ()) for name in names)}
    return [
        {"name": name, "options": {k: v for k, v in options.items() if k in homeless or k in known.get(name, ())}}
        for name in names
    ]


def _report(result: Result, path: Path) -> None:
    manifest = result.manifest
    parts = "" if manifest.parts is None else f"; {manifest.samples:,} samples in {manifest.parts} parts"
    typer.echo(f"loss {result.loss:.6g} ({_loss_of(result)}, {manifest.reduction}{parts})")
    rows = []
    for group in manifest.groups:
        count = len({tensor.parameter for tensor in group.tensors})
        what = "1 tensor" if group.kind == "tensor" else f"{count} parameters"
        missing = f", {len(group.missing)} without" if group.missing else ""
        rows.append([group.label, what + missing, group.convention])
    _table(["LABEL", "HOLDS", "CONVENTION"], rows)
    if result.from_cache:
        typer.echo(f"from the cache: {', '.join(f'{label} (job {job})' for label, job in result.from_cache.items())}")
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"wrote {path} ({path.stat().st_size:,} bytes)")


def _loss_of(result: Result) -> str:
    """The loss with the options that it used, e.g. "cross_entropy with label_smoothing=0.1, output 'logits'"."""
    manifest = result.manifest
    used = [f"{name}={_shortened(value)}" for name, value in manifest.loss_options.items() if value is not None]
    used += [] if manifest.loss_output is None else [f"output {manifest.loss_output!r}"]
    return manifest.loss_name + (f" with {', '.join(used)}" if used else "")


def _shortened(value: Any) -> str:
    return f"{len(value)} numbers" if isinstance(value, list) and len(value) > 3 else str(value)


def _standing(job: Job) -> str:
    """The status; over a data set, with how many shards are there."""
    if job.status != JobStatus.WAITING or job.progress is None:
        return job.status
    return f"{job.status} {job.progress.done}/{job.progress.total}"


def _batch_of(job: Job) -> str:
    parts = job.request["batch"].get("parts")
    if parts is None:
        return str(job.request["batch"]["sha256"])
    return f"{len(parts)} parts, {sum(part['samples'] for part in parts):,} samples"


def _labels(job: Job) -> str:
    return ", ".join(extension["label"] or extension["name"] for extension in job.request["extensions"])


def _duration(job: Job) -> str:
    if job.started_at is None or job.finished_at is None:
        return "-"
    return f"{(job.finished_at - job.started_at).total_seconds():.2f} s"


def _table(head: list[str], rows: list[list[str]]) -> None:
    for line in table([head, *rows]):
        typer.echo(line)
