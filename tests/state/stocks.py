"""Uploads and results, in the records and in the store, as clients and workers leave them."""

import hashlib

from sqlalchemy import select, update
from tests.state.holders import hold, long_ago, make

from curvature_protocol.jobs import JobKind
from curvature_protocol.names import admitted_key, artefact_key, result_key
from curvature_state.artefacts import record_artefact
from curvature_state.endings import Success, succeed
from curvature_state.jobs import NewJob
from curvature_state.tables import ArtefactRow, CachedResultRow, JobRow, RemovalRow, SweepRow

DAY = 24 * 3600


class Stock:
    """A database and a store."""

    def __init__(self, database, objects):
        self.database, self.objects = database, objects

    def upload(self, text, kind="models", days=0, size=None):
        """An upload, last used so long ago; returns its reference."""
        data = text.encode() * ((size or 1) if len(text) == 1 else 1)
        sha256 = hashlib.sha256(data).hexdigest()
        self.objects.put_bytes(artefact_key(kind, sha256), data)
        record_artefact(self.database, kind, sha256, len(data))
        if kind in ("models", "losses"):
            self.objects.put_bytes(admitted_key(sha256, "1"), b"admitted")
        self.age_upload((kind, sha256), days)
        return kind, sha256

    def age_upload(self, reference, days):
        self._set(ArtefactRow, reference, used_at=long_ago(days * DAY), created_at=long_ago(days * DAY))

    def result(self, size=100, days=0, sources=(), cached=None, **changes):
        """A succeeded job with a file of so many bytes, over and last used so long ago; returns its id."""
        return self.finish(make(self.database, **changes).id, size, days, sources, cached)

    def finish(self, job_id, size=100, days=0, sources=(), cached=None):
        held = hold(self.database, job_id)
        self.objects.put_bytes(result_key(job_id, held.attempt, "manifest.json"), b"x" * size)
        success = Success((), size, frozenset(sources), dict(cached or {}))
        assert succeed(self.database, job_id, held.attempt, success) is not None
        self.age(job_id, days)
        return job_id

    def data_set(self, parts=2, **changes):
        """A job over a data set; returns its id and its shards'."""
        shards = tuple(NewJob({"part": n}, "d", kind=JobKind.SHARD) for n in range(parts))
        job = make(self.database, parts=shards, **changes)
        return job.id, [shard.id for shard in shards]

    def age(self, job_id, days):
        moment = long_ago(days * DAY)
        self._set(JobRow, job_id, finished_at=moment, used_at=moment)

    def sweep(self, sweep_id, days=0):
        row = {"tenant": "default", "body_digest": "d", "total": 1, "axes": [], "details": {}}
        with self.database.write() as session:
            session.add(SweepRow(id=sweep_id, created_at=long_ago(days * DAY), **row))

    def pin(self, table, key):
        self._set(table, key, pinned=True)

    def stored(self, prefix=None):
        return sorted(file.key for file in self.objects.walk(prefix or ""))

    def has_files(self, job_id):
        return bool(self.stored(f"results/{job_id}"))

    def jobs(self):
        with self.database.read() as session:
            return set(session.scalars(select(JobRow.id)))

    def has_result(self, job_id):
        with self.database.read() as session:
            row = session.get(JobRow, job_id)
            return row is not None and row.result_bytes is not None

    def uploads(self):
        with self.database.read() as session:
            return {(row.kind, row.sha256) for row in session.scalars(select(ArtefactRow))}

    def cached(self):
        with self.database.read() as session:
            return {row.key: row.job_id for row in session.scalars(select(CachedResultRow))}

    def notes(self):
        with self.database.read() as session:
            return {(row.what, row.name, row.attempt) for row in session.scalars(select(RemovalRow))}

    def _set(self, table, key, **values):
        columns = list(table.__table__.primary_key)
        keys = key if isinstance(key, tuple) else (key,)
        same = [column == value for column, value in zip(columns, keys, strict=True)]
        with self.database.write() as session:
            session.execute(update(table).where(*same).values(**values))
