"""moto's server with one thing put right: it dates all unfinished uploads to 2010, and old ones are to be given up."""

import sys
from datetime import UTC, datetime

from moto.s3.models import FakeMultipart
from moto.s3.responses import S3Response
from moto.server import main

begun = {}
make, answer = FakeMultipart.__init__, S3Response.serialized


def make_dated(upload, *arguments, **named):
    make(upload, *arguments, **named)
    begun[upload.id] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def answer_dated(response, action):
    for upload in action.result.get("Uploads", ()) if isinstance(action.result, dict) else ():
        upload["Initiated"] = begun[upload["UploadId"]]
    return answer(response, action)


FakeMultipart.__init__, S3Response.serialized = make_dated, answer_dated
main(sys.argv[1:])
