"""A bucket of S3: how it is reached, and what obstore cannot do.

That is: addresses that clients use themselves, multipart uploads whose parts clients send, copies of more than 5 GiB,
and an end to multipart uploads that nobody finished.
"""

import base64
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Store

COPIED_BYTES = 2**30
"""What is larger is copied in parts of this size: S3 copies 5 GiB at once and no more, and takes its time for it."""
_CONNECTIONS = 40
"""As many as the API has threads."""
_IDLE = "60s"
_REGION = "us-east-1"
"""What servers other than Amazon's expect, unless told otherwise."""
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_GONE = frozenset({"NoSuchUpload", "NoSuchKey", "404"})


@dataclass(frozen=True)
class SentPart:
    """A part of a multipart upload, as the store has it."""

    number: int
    size_bytes: int
    etag: str
    sha256: str | None
    """In hexadecimal; None where the store keeps no checksums."""


class Bucket:
    """One bucket and a prefix in it; keys are relative to the prefix.

    Endpoint, region and credentials come from where Amazon's own tools look for them (`AWS_ENDPOINT_URL`,
    `AWS_ACCESS_KEY_ID`, …). A server of one's own is addressed by path, and without encryption only on loopback, or
    with `AWS_ALLOW_HTTP=true`.

    Args:
        url: `s3://bucket/prefix`.
        public_endpoint: the store's address as clients see it, if it is another one.
    """

    def __init__(self, url: str, public_endpoint: str | None = None) -> None:
        try:
            from boto3.session import Session
        except ImportError:
            raise RuntimeError("storage on S3 needs the package boto3; install it: pip install '.[s3]'") from None
        parts = urlsplit(url)
        self._name, self._prefix = parts.netloc, parts.path.strip("/")
        self._session = Session()
        self._endpoint = next((value for name in _ENDPOINTS if (value := os.environ.get(name))), None)
        self._region = self._session.region_name or os.environ.get("AWS_REGION") or _REGION
        self._client = self._connect(self._endpoint)
        self._signer = self._client if public_endpoint is None else self._connect(public_endpoint)

    def open_store(self) -> "S3Store":
        """The same bucket and prefix as obstore sees it."""
        from obstore.auth.boto3 import Boto3CredentialProvider
        from obstore.store import S3Store

        if self._session.get_credentials() is None:
            raise ValueError("no credentials for S3 were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        config: S3Config = {"region": self._region}
        if self._endpoint is not None:
            config["endpoint"] = self._endpoint
        elif any(name in os.environ for name in _ENDPOINTS):  # empty: obstore would take that for an address
            config["endpoint"] = f"https://s3.{self._region}.amazonaws.com"
        return S3Store(
            self._name,
            prefix=self._prefix or None,
            config=config,
            # A transfer takes as long as it takes; silence ends it.
            client_options={
                "allow_http": _may_be_plain(self._endpoint),
                "connect_timeout": "5s",
                "read_timeout": _IDLE,
                "timeout": "1day",
            },
            retry_config={"max_retries": 3},
            credential_provider=Boto3CredentialProvider(self._session),
        )

    # Addresses

    def sign_download(self, key: str, seconds: int) -> str:
        """An address that gives an object's bytes to whoever has it."""
        return str(self._signer.generate_presigned_url("get_object", self._at(key), seconds))

    def sign_part(
        self, key: str, upload_id: str, number: int, size_bytes: int, sha256: str, seconds: int
    ) -> tuple[str, dict[str, str]]:
        """Where the bytes of one part go, and the headers that the signature covers.

        No other size can go there, and where the store compares checksums, no other bytes.
        """
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        what = {
            **self._at(key),
            "UploadId": upload_id,
            "PartNumber": number,
            "ContentLength": size_bytes,
            "ChecksumSHA256": checksum,
        }
        url = str(self._signer.generate_presigned_url("upload_part", what, seconds))
        return url, {"Content-Length": str(size_bytes), "x-amz-checksum-sha256": checksum}

    # Multipart uploads

    def begin(self, key: str) -> str:
        """Begin a multipart upload; returns the store's name of it."""
        with _translated():
            return str(self._client.create_multipart_upload(**self._at(key), ChecksumAlgorithm="SHA256")["UploadId"])

    def sent_parts(self, key: str, upload_id: str) -> list[SentPart]:
        """The parts that have arrived, in order.

        Raises:
            FileNotFoundError: if the store knows no such upload (any more).
        """
        with _translated():
            pages = self._client.get_paginator("list_parts").paginate(**self._at(key), UploadId=upload_id)
            return [_sent(part) for page in pages for part in page.get("Parts", ())]

    def finish(self, key: str, upload_id: str, parts: Sequence[SentPart]) -> None:
        """Make one object of the parts.

        Raises:
            FileNotFoundError: if the store knows no such upload (any more).
        """
        listed = [
            {
                "PartNumber": part.number,
                "ETag": part.etag,
                **({"ChecksumSHA256": _base64(part.sha256)} if part.sha256 is not None else {}),
            }
            for part in parts
        ]
        with _translated():
            self._client.complete_multipart_upload(
                **self._at(key), UploadId=upload_id, MultipartUpload={"Parts": listed}
            )

    def abort(self, key: str, upload_id: str) -> None:
        """Give an upload up, and its parts with it; it is no error if there is none."""
        try:
            with _translated():
                self._client.abort_multipart_upload(**self._at(key), UploadId=upload_id)
        except FileNotFoundError:
            return

    def abort_older(self, prefix: str, before: float, kept: Collection[str] = ()) -> None:
        """Give up multipart uploads of keys below a prefix that were begun before a POSIX time, but those of `kept`."""
        spared = {self._key(key) for key in kept}
        with _translated():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._name, Prefix=self._key(f"{prefix}/")
            )
            found = [upload for page in pages for upload in page.get("Uploads", ())]
            for upload in found:
                if upload["Initiated"].timestamp() < before and upload["Key"] not in spared:
                    self._client.abort_multipart_upload(
                        Bucket=self._name, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

    def copy(self, source: str, target: str, part_bytes: int = COPIED_BYTES) -> None:
        """Copy an object of any size within the store, in parts if it is larger than one.

        Raises:
            FileNotFoundError: if there is no source.
        """
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=part_bytes, multipart_chunksize=part_bytes)
        with _translated():
            self._client.copy(self._at(source), **self._at(target), Config=config)

    def _connect(self, endpoint: str | None) -> Any:
        from botocore.config import Config

        config = Config(
            signature_version="s3v4",
            connect_timeout=5,
            max_pool_connections=_CONNECTIONS,
            retries={"mode": "standard", "max_attempts": 3},
            # Checksums of their own choice are what other makers' servers do not know.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            ignore_configured_endpoint_urls=True,
            s3={"addressing_style": "virtual" if endpoint is None else "path"},
        )
        return self._session.client("s3", endpoint_url=endpoint, region_name=self._region, config=config)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._name, "Key": self._key(key)}

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key


def _may_be_plain(endpoint: str | None) -> bool:
    """Whether the endpoint may be spoken to without encryption.

    Raises:
        ValueError: if it is to be, and may not.
    """
    parts = urlsplit(endpoint or "")
    if parts.scheme != "http":
        return False
    if not _is_loopback(parts.hostname or "") and os.environ.get("AWS_ALLOW_HTTP", "").lower() not in ("1", "true"):
        raise ValueError(
            f"the store's endpoint {endpoint} is not encrypted and not on this machine; use https, or set "
            "AWS_ALLOW_HTTP=true on a network that you trust"
        )
    return True


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _sent(part: dict[str, Any]) -> SentPart:
    checksum = part.get("ChecksumSHA256")
    sha256 = None if checksum is None else base64.b64decode(checksum).hex()
    return SentPart(int(part["PartNumber"]), int(part["Size"]), str(part["ETag"]), sha256)


def _base64(hexadecimal: str) -> str:
    return base64.b64encode(bytes.fromhex(hexadecimal)).decode()


@contextmanager
def _translated() -> Iterator[None]:
    """The library's errors as the system's: what is not there, and a store that does not answer."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in _GONE:
            raise FileNotFoundError(str(error)) from error
        raise OSError(f"the object store refused: {error}") from error
    except BotoCoreError as error:
        raise ConnectionError(f"the object store does not answer: {error}") from error
