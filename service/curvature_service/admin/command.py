"""`curvature admin`: what operators do to the records, on the database itself."""

import typer

from curvature_service.admin.gc import gc
from curvature_service.admin.keys import keys_app
from curvature_service.admin.migrating import migrate
from curvature_service.admin.tenants import tenants_app
from curvature_service.admin.workers import drain, workers

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Administer the service: tables, API keys, tenants, workers, garbage. Works on the database of "
    "CURVATURE_DATABASE_URL.",
)
app.command()(migrate)
app.add_typer(keys_app, name="keys")
app.add_typer(tenants_app, name="tenants")
app.command()(workers)
app.command()(drain)
app.command()(gc)
