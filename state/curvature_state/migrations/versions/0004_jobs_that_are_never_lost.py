"""Sweeps, shards, tenants, the cache, retention, resumable uploads, webhooks."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    # Defaults are for rows that are there already, and for parts of the version before.
    for column in (
        sa.Column("turn", sa.Integer, nullable=False, server_default="4"),
        sa.Column("not_before", MOMENT),
        sa.Column("requires_gpu", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("requires_tag", sa.String(64)),
        sa.Column("requires_bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("worker_seconds", sa.Float, nullable=False, server_default="0"),
        sa.Column("sweep_id", sa.String(32)),
        sa.Column("sweep_row", sa.Integer),
        sa.Column("coordinates", sa.JSON),
        sa.Column("parent_id", sa.String(32)),
        sa.Column("part", sa.Integer),
        sa.Column("parts", sa.Integer),
        sa.Column("parts_left", sa.Integer),
        sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("result_bytes", sa.BigInteger),
        sa.Column("used_at", MOMENT),
        sa.Column("webhook_waits", sa.Boolean, nullable=False, server_default=sa.false()),
    ):
        op.add_column("jobs", column)
    op.execute("UPDATE jobs SET turn = 9 - priority")
    # Nobody has noted how large these results are.
    op.execute("UPDATE jobs SET result_bytes = 0, used_at = finished_at WHERE status = 'succeeded'")
    queued = sa.text("status = 'queued'")
    op.create_index(
        "jobs_by_turn",
        "jobs",
        ["tenant", "turn", "created_at"],
        sqlite_where=queued,
        postgresql_where=queued,
    )
    op.drop_index("jobs_by_kind", "jobs")
    op.create_index("jobs_by_tenant", "jobs", ["tenant", "kind", "created_at", "id"])
    op.create_index("jobs_by_sweep", "jobs", ["sweep_id", "sweep_row"])
    op.create_index("jobs_by_parent", "jobs", ["parent_id", "part"])
    over = "('succeeded', 'failed', 'cancelled')"
    unfinished = sa.text(f"sweep_id IS NOT NULL AND status NOT IN {over}")
    op.create_index(
        "jobs_unfinished_in_sweep", "jobs", ["sweep_id"], sqlite_where=unfinished, postgresql_where=unfinished
    )
    to_tell = sa.text(f"webhook_waits AND status IN {over}")
    op.create_index("jobs_to_tell", "jobs", ["status"], sqlite_where=to_tell, postgresql_where=to_tell)
    for column in (
        sa.Column("used_at", MOMENT),
        sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("verified", sa.Boolean, nullable=False, server_default=sa.true()),
    ):
        op.add_column("artefacts", column)
    for column in (
        sa.Column("name", sa.String(255)),
        sa.Column("memory_bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("tags", sa.JSON),
        sa.Column("draining", sa.Boolean, nullable=False, server_default=sa.false()),
    ):
        op.add_column("workers", column)
    op.create_table(
        "job_artefacts",
        sa.Column("job_id", sa.String(32), primary_key=True),
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
    )
    op.create_index("job_artefacts_by_artefact", "job_artefacts", ["kind", "sha256"])
    _note_uploads_of_jobs()
    op.create_table(
        "result_uses",
        sa.Column("job_id", sa.String(32), primary_key=True),
        sa.Column("source_id", sa.String(32), primary_key=True),
    )
    op.create_index("result_uses_by_source", "result_uses", ["source_id"])
    op.create_table(
        "removals",
        sa.Column("what", sa.String(16), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("removed_at", MOMENT, nullable=False),
    )
    op.create_table(
        "model_digests",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("eval", sa.Boolean, primary_key=True),
        sa.Column("engine_version", sa.String(32), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
    )
    op.create_table(
        "cached_results",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("label", sa.String(64), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
    )
    op.create_index("cached_results_by_job", "cached_results", ["job_id"])
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("body_digest", sa.String(64), nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("axes", sa.JSON, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.UniqueConstraint("tenant", "idempotency_key"),
    )
    op.create_index("sweeps_by_age", "sweeps", ["created_at", "id"])
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("part_bytes", sa.BigInteger, nullable=False),
        sa.Column("store_id", sa.Text),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("touched_at", MOMENT, nullable=False),
        sa.Column("assembling_until", MOMENT),
        sa.Column("finished_at", MOMENT),
        sa.Column("failure", sa.JSON),
        sa.UniqueConstraint("tenant", "kind", "sha256"),
    )
    op.create_table(
        "upload_parts",
        sa.Column("upload_id", sa.String(32), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(8), nullable=False),
        sa.Column("subject_id", sa.String(32), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("secret", sa.Text),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", MOMENT, nullable=False),
        sa.Column("last_error", sa.Text),
        sa.Column("created_at", MOMENT, nullable=False),
    )
    op.create_index("webhooks_by_turn", "webhooks", ["state", "next_at"])
    op.create_index("webhooks_by_subject", "webhooks", ["subject_id"])
    of_sweep = sa.text("subject = 'sweep'")
    op.create_index("webhooks_of_sweeps", "webhooks", ["state"], sqlite_where=of_sweep, postgresql_where=of_sweep)
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("weight", sa.Float, nullable=False, server_default="1"),
        sa.Column("max_queued", sa.Integer),
        sa.Column("max_running", sa.Integer),
        sa.Column("virtual_seconds", sa.Float, nullable=False, server_default="0"),
        sa.Column("created_at", MOMENT, nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("used_at", MOMENT),
        sa.Column("revoked_at", MOMENT),
        sa.UniqueConstraint("sha256"),
    )
    # Every tenant that has jobs takes part in the sharing.
    op.execute("INSERT INTO tenants (name, created_at) SELECT tenant, min(created_at) FROM jobs GROUP BY tenant")


def _note_uploads_of_jobs() -> None:
    """Write down what the jobs that are there refer to, so that nothing takes it from those that are queued."""
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("request", sa.JSON))
    needs = sa.table("job_artefacts", *(sa.column(name, sa.String) for name in ("job_id", "kind", "sha256")))
    connection = op.get_bind()
    for row in connection.execute(sa.select(jobs.c.id, jobs.c.request)).all():
        found = [{"job_id": row.id, "kind": kind, "sha256": sha256} for kind, sha256 in _uploads_of(row.request)]
        if found:
            connection.execute(sa.insert(needs), found)


def _uploads_of(request: dict[str, Any]) -> set[tuple[str, str]]:
    options = [value for e in request.get("extensions") or () for value in (e.get("options") or {}).values()]
    named = [("models", {"sha256": request.get("model")}), ("batches", request.get("batch"))]
    named += [("losses", request.get("loss")), *(("batches", value) for value in options)]
    hashes = ((kind, value.get("sha256")) for kind, value in named if isinstance(value, dict))
    return {(kind, sha256) for kind, sha256 in hashes if isinstance(sha256, str) and len(sha256) == 64}


def downgrade() -> None:
    for name in (
        "api_keys",
        "tenants",
        "webhooks",
        "upload_parts",
        "uploads",
        "sweeps",
        "cached_results",
        "model_digests",
        "removals",
        "result_uses",
        "job_artefacts",
    ):
        op.drop_table(name)
    for index in (
        *("jobs_by_turn", "jobs_by_sweep", "jobs_by_parent", "jobs_by_tenant"),
        *("jobs_unfinished_in_sweep", "jobs_to_tell"),
    ):
        op.drop_index(index, "jobs")
    op.create_index("jobs_by_kind", "jobs", ["kind", "created_at", "id"])
    dropped = {
        "jobs": (
            *("turn", "not_before", "requires_gpu", "requires_tag", "requires_bytes", "worker_seconds", "sweep_id"),
            *("sweep_row", "coordinates", "parent_id", "part", "parts", "parts_left", "pinned", "result_bytes"),
            *("used_at", "webhook_waits"),
        ),
        "artefacts": ("used_at", "pinned", "verified"),
        "workers": ("name", "memory_bytes", "tags", "draining"),
    }
    for name, columns in dropped.items():
        with op.batch_alter_table(name) as table:
            for column in columns:
                table.drop_column(column)
