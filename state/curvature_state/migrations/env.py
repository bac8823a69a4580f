"""Alembic's environment: migrations run on the connection that `migrate` opened."""

from alembic import context

from curvature_state.tables import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
