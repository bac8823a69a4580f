"""Count hand-backs apart, so that an attempt's number is never used again."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The default is for rows that are there already, and for an API of the version before.
    op.add_column("jobs", sa.Column("handed_back", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as table:
        table.drop_column("handed_back")
