"""`curvature admin tenants`."""

from typing import Annotated

import typer

from curvature_service.admin.records import AdminError, opened
from curvature_service.admin.tables import show_table
from curvature_state.tenant_settings import UNCHANGED, list_tenants, set_tenant

tenants_app = typer.Typer(no_args_is_help=True, help="List tenants; set their weights and limits.")


@tenants_app.command("list")
def show() -> None:
    """List tenants: weight, limits, and what they have at the moment."""
    with opened() as database:
        found = list_tenants(database)
        if not found:
            typer.echo("there are no tenants yet; the first job or key makes one", err=True)
            return
        show_table(
            ["TENANT", "WEIGHT", "QUEUED", "RUNNING", "KEYS"],
            [
                [
                    tenant.name,
                    f"{tenant.weight:g}",
                    _of(tenant.queued, tenant.max_queued),
                    _of(tenant.running, tenant.max_running),
                    str(tenant.keys),
                ]
                for tenant in found
            ],
        )


@tenants_app.command("set")
def change(
    name: Annotated[str, typer.Argument(metavar="NAME", help="the tenant's name; a new one makes a new tenant")],
    weight: Annotated[
        float | None, typer.Option(help="its share of the workers beside the other tenants' weights; 1 at first")
    ] = None,
    max_queued: Annotated[
        str | None, typer.Option(metavar="N|none", help="queued jobs that it may have; more are refused")
    ] = None,
    max_running: Annotated[
        str | None, typer.Option(metavar="N|none", help="jobs that may run at once; the others wait")
    ] = None,
) -> None:
    """Set a tenant's weight and limits; what is not given stays as it is."""
    with opened() as database:
        if weight is None and max_queued is None and max_running is None:
            raise AdminError("nothing to set; give --weight, --max-queued or --max-running")
        new = set_tenant(
            database,
            name,
            weight=UNCHANGED if weight is None else weight,
            max_queued=UNCHANGED if max_queued is None else _limit("--max-queued", max_queued),
            max_running=UNCHANGED if max_running is None else _limit("--max-running", max_running),
        )
        (tenant,) = [tenant for tenant in list_tenants(database) if tenant.name == name]
        typer.echo(
            f"{'new tenant' if new else 'tenant'} {name}: weight {tenant.weight:g}, "
            f"queued jobs {_shown(tenant.max_queued)}, running jobs {_shown(tenant.max_running)}"
        )


def _limit(option: str, text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise AdminError(f"{option} takes a whole number, or none; got {text!r}")
    return int(text)


def _of(count: int, most: int | None) -> str:
    return f"{count:,}" if most is None else f"{count:,} of {most:,}"


def _shown(most: int | None) -> str:
    return "without limit" if most is None else f"at most {most:,}"
