"""`curvature admin keys`."""

from typing import Annotated

import typer

from curvature_service.admin.records import AdminError, opened
from curvature_service.admin.tables import ago, day, show_table
from curvature_service.authentication import KNOWN_SECONDS
from curvature_state.keys import create_key, list_keys, revoke_key

keys_app = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys.")


@keys_app.command("create")
def create(
    tenant: Annotated[str, typer.Option(help="whose key it is; a new name makes a new tenant")],
    name: Annotated[str, typer.Option(help="what it is for, or who has it")],
) -> None:
    """Make a key and print it, this once: only its SHA-256 is kept.

    The key alone goes to standard output: KEY=$(curvature admin keys create --tenant lab --name ci).
    """
    with opened() as database:
        record, key = create_key(database, tenant, name)
        typer.echo(f"A key of tenant {tenant}. It is shown this once; to revoke it: cv_{record.id}", err=True)
        typer.echo("Clients take it from CURVATURE_API_KEY, or as Client(api_key=…).\n", err=True)
        typer.echo(key)


@keys_app.command("list")
def show(tenant: Annotated[str | None, typer.Option(help="only this tenant's")] = None) -> None:
    """List keys, oldest first: whose they are, and when they were last used."""
    with opened() as database:
        found = list_keys(database, tenant)
        if not found:
            typer.echo("there are no keys; `curvature admin keys create` makes one", err=True)
            return
        show_table(
            ["KEY", "TENANT", "NAME", "CREATED", "USED", "STATE"],
            [
                [
                    f"cv_{key.id}",
                    key.tenant,
                    key.name,
                    day(key.created_at),
                    ago(key.used_at),
                    "valid" if key.revoked_at is None else f"revoked {ago(key.revoked_at)}",
                ]
                for key in found
            ],
        )


@keys_app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="its beginning, cv_…, as `keys list` shows it")],
) -> None:
    """Revoke a key for good."""
    with opened() as database:
        found = revoke_key(database, key)
        if found is None:
            raise AdminError(f"there is no key {key[:20]!r}; `curvature admin keys list` shows the keys")
        typer.echo(
            f"cv_{found.id} ({found.name}, tenant {found.tenant}) is revoked: within {KNOWN_SECONDS:.0f} s no request "
            "with it is answered"
        )
