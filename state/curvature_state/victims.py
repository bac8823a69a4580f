"""What is to go, in the order in which it can: a result after those that use its files."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime


@dataclass(frozen=True)
class Victim:
    """What is to go.

    Attributes:
        kind: "jobs", "plans", "inspections", "results", or a kind of upload.
        name: the job's id, or the upload's SHA-256.
        size_bytes: what goes from the store with it; a job's shards included, and files that others use left out.
        why: in words.
        before: it goes only if it was not used (a job: not over) later.
        rank: of a result: it goes after all those of lower ranks.
    """

    kind: str
    name: str
    size_bytes: int
    why: str
    before: datetime
    rank: int = 0


@dataclass
class Removals:
    """What is to go.

    Attributes:
        shared: deleted job whose files others' results use → (bytes, the others).
        sweeps: ids of those that are to go with the last of their jobs.
        victims: in their order.
        freed_bytes: what goes from the store in all.
        gone: jobs whose results go, shards and deleted jobs included.
        released: of `shared`, those that nobody uses any more.
    """

    shared: dict[str, tuple[int, set[str]]]
    sweeps: list[str] = field(default_factory=list)
    victims: list[Victim] = field(default_factory=list)
    freed_bytes: int = 0
    gone: set[str] = field(default_factory=set)
    released: dict[str, int] = field(default_factory=dict)
    _ranks: dict[str, int] = field(default_factory=dict)
    _uploads: set[tuple[str, str]] = field(default_factory=set)
    _shared_by: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for name, (_, users) in self.shared.items():
            for user in users:
                self._shared_by[user].append(name)

    def add_jobs(self, jobs: Iterable[tuple[Victim, Mapping[str, int]]], users: Mapping[str, Collection[str]]) -> None:
        """Have jobs go at once.

        Args:
            jobs: each with the bytes of its own result and of its shards'.
            users: of each of these results.
        """
        jobs = list(jobs)
        leaving = self.gone | {job_id for _, sizes in jobs for job_id in sizes}
        for victim, sizes in jobs:
            size = 0
            for job_id, own_bytes in sizes.items():
                if left := set(users.get(job_id, ())) - leaving:
                    self.shared[job_id] = (own_bytes, left)
                    for user in left:
                        self._shared_by[user].append(job_id)
                else:
                    size += own_bytes
            self._add(replace(victim, size_bytes=size))
        for job_id in leaving - self.gone:
            self._let_go(job_id)

    def add_result(self, victim: Victim, users: Collection[str]) -> None:
        """Have a result go after its users, which go, too."""
        rank = max((self._ranks[user] + 1 for user in users if user in self._ranks), default=0)
        self._ranks[victim.name] = rank
        self._add(replace(victim, rank=rank))
        self._let_go(victim.name)

    def add_upload(self, victim: Victim) -> None:
        """Have an upload go."""
        self._uploads.add((victim.kind, victim.name))
        self._add(victim)

    def has_upload(self, kind: str, sha256: str) -> bool:
        """Whether an upload goes already."""
        return (kind, sha256) in self._uploads

    def _add(self, victim: Victim) -> None:
        self.victims.append(victim)
        self.freed_bytes += victim.size_bytes

    def _let_go(self, job_id: str) -> None:
        self.gone.add(job_id)
        for name in self._shared_by.pop(job_id, ()):
            size, users = self.shared[name]
            users.discard(job_id)
            if not users:
                self.released[name] = size
                self.freed_bytes += size
