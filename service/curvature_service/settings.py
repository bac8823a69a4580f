"""Settings of the API process."""

from typing import Literal

from pydantic import Field, field_validator

from curvature_protocol.requests import signing_key
from curvature_service.webhooks.addresses import read_policy
from curvature_state import StateSettings


class ServiceSettings(StateSettings):
    """Read from `CURVATURE_<NAME>`, as all settings."""

    api_key: str | None = Field(default=None, repr=False)
    """If set (and not empty), requests need a key: this one, of the tenant `default`, or one of the table's."""
    require_key: bool = False
    """Whether requests need a key although none is set here; else those without one are the tenant `default`'s."""
    max_upload_bytes: int = 64 * 2**30
    upload_part_bytes: int = Field(default=16 * 2**20, ge=5 * 2**20)
    """Size of the parts of large uploads; S3 takes none below 5 MiB. Uploads of more than 10,000 have larger ones."""
    direct_transfers: Literal["auto", "off"] = "auto"
    """Whether clients may be sent to the store itself, where that can sign addresses (S3)."""
    storage_public_endpoint: str | None = None
    """The store's address as clients see it, if it is not the one that API and workers use."""
    inline_batch_bytes: int = 4 * 2**20
    inline_result_bytes: int = 2**20
    max_wait_seconds: float = 60.0
    reconcile_seconds: float = 2.0
    heartbeat_seconds: float = 15.0
    """How often an event stream without news sends a comment, so that proxies and clients see that it lives."""
    webhook_secret: str | None = Field(default=None, repr=False)
    """If set (and not empty), it signs the messages of webhooks that bring no secret of their own."""
    webhook_allow_private: bool = False
    """Whether webhooks may go to addresses that are not public."""
    webhook_allowed_hosts: str = ""
    """Hosts, addresses and networks, separated by commas, that webhooks may go to, public or not."""
    webhook_seconds: float = Field(default=1.0, gt=0)
    """How often to look for messages that are due."""
    webhook_timeout_seconds: float = Field(default=15.0, gt=0, le=60)
    """For one try, from the resolution of the name to the status of the answer."""

    keep_results_days: float | None = Field(default=None, gt=0)
    """Results not used for so long are removed; their jobs stay. Unset, this and those below limit nothing."""
    keep_jobs_days: float | None = Field(default=None, gt=0)
    """Jobs that have been over for so long are removed, with their results."""
    keep_plans_days: float | None = Field(default=None, gt=0)
    """The same of plans and inspections that nobody has read for so long."""
    keep_uploads_days: float | None = Field(default=None, gt=0)
    """Uploads that no job has asked for for so long are removed, but what an unfinished job needs."""
    max_stored_bytes: int | None = Field(default=None, gt=0)
    """Uploads and results together; the least recently used go first, down to 90 % of it."""

    @field_validator("webhook_allowed_hosts")
    @classmethod
    def _names_hosts(cls, value: str) -> str:
        read_policy(False, value)
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _is_a_key(cls, value: str | None) -> str | None:
        signing_key(value or "")
        return value
