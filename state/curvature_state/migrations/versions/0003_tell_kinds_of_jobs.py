"""Tell analyses from plans and inspections."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The default is for rows that are there already, and for an API of the version before.
    op.add_column("jobs", sa.Column("kind", sa.String(16), nullable=False, server_default="analysis"))
    op.create_index("jobs_by_kind", "jobs", ["kind", "created_at", "id"])


def downgrade() -> None:
    op.drop_index("jobs_by_kind", "jobs")
    with op.batch_alter_table("jobs") as table:
        table.drop_column("kind")
