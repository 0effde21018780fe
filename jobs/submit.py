"""Client of Ray's Jobs API: one cluster's address, submitting with retries, following, stopping, the job's record."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.authentication import token_headers
from cluster.inventory import Node, nodes_from_state
from cluster.storage import Storage
from configs.errors import TelarError, UnreachableError

UPLOAD_LIMIT_BYTES = 100 * 2**20
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 60.0
SUBMIT_SECONDS = 60.0
POLL_SECONDS = 0.5
LOST_SECONDS = 60.0

# Ray prints a line for each upload, for each closed socket and for each folder that it leaves out.
for _name in (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
):
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Address:
    """Dashboard URL of a cluster and where it came from, e.g. `--address` or `RAY_ADDRESS`."""

    url: str
    origin: str
    embedded: bool = False


@dataclass
class _Count:
    """Characters of a job's log that were passed on."""

    characters: int = 0


class _Client(JobSubmissionClient):
    """The Jobs API client with time limits, and an upload limit that names what is large."""

    timeout_seconds: tuple[float, float] = (CONNECT_SECONDS, CONNECT_SECONDS)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        data = options.get("data")
        if data is not None and len(data) > UPLOAD_LIMIT_BYTES:
            raise TelarError(_too_large(data))
        return super()._do_request(method, endpoint, timeout=self.timeout_seconds, **options)


class Jobs:
    """Jobs of one cluster. The constructor raises UnreachableError within about 10 s when nothing answers."""

    def __init__(self, address: Address) -> None:
        self.address = address
        try:
            with _ray_addresses_hidden():
                headers = token_headers() if address.embedded else None
                self._client = _Client(address.url, headers=headers)
        except AuthenticationError as error:
            raise UnreachableError(
                f"the cluster at {address.url} (from {address.origin}) wants a token: set RAY_AUTH_MODE=token and "
                f"RAY_AUTH_TOKEN_PATH to the file that holds it ({str(error).splitlines()[0]})"
            ) from error
        except (ConnectionError, requests.RequestException) as error:
            raise UnreachableError(
                f"no Ray cluster answers at {address.url} (from {address.origin}); check the address, start the "
                "cluster, or use --embedded for a cluster on this machine"
            ) from error
        except (RuntimeError, ValueError, KeyError) as error:
            raise UnreachableError(
                f"{address.url} (from {address.origin}) answers, but not as a Ray dashboard ({error}); give the "
                "dashboard's address, e.g. http://host:8265"
            ) from error
        self._client.timeout_seconds = (CONNECT_SECONDS, REQUEST_SECONDS)

    @property
    def ray_version(self) -> str:
        """Ray's version on the cluster."""
        return str(self._client._server_ray_version)

    def nodes(self) -> list[Node]:
        """Living nodes with their logical resources."""
        with self._reaching():
            response = self._client._do_request("GET", "/api/v0/nodes?detail=1&limit=10000")
        if response.status_code != 200:
            raise TelarError(f"{self.address.url} cannot list its nodes: HTTP {response.status_code} {response.text}")
        return nodes_from_state(response.json())

    def submit(
        self,
        entrypoint: str,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str],
        submission_id: str,
    ) -> str:
        """Submit a job and return its id; HTTP 5xx (no agent yet) is tried again for a minute.

        A retry after an answer that was lost finds the id in use; that job is then ours. Raises TelarError.
        """
        deadline, pause = time.monotonic() + SUBMIT_SECONDS, 0.2
        while True:
            try:
                return self._client.submit_job(
                    entrypoint=entrypoint,
                    runtime_env=dict(runtime_env),
                    metadata=dict(metadata),
                    submission_id=submission_id,
                )
            except (RuntimeError, requests.RequestException) as error:
                if self.info(submission_id) is not None:
                    return submission_id
                transient = "status code 5" in str(error) or isinstance(error, requests.RequestException)
                if not transient or time.monotonic() > deadline:
                    raise TelarError(f"{self.address.url} did not take the job: {_short(error)}") from error
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

    def info(self, job_id: str) -> JobDetails | None:
        """The job's details, or None when the cluster does not know it."""
        with self._reaching():
            try:
                return self._client.get_job_info(job_id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise TelarError(f"{self.address.url} cannot tell about job {job_id}: {_short(error)}") from error

    def list(self) -> list[JobDetails]:
        """Jobs that were submitted through the Jobs API, oldest first."""
        with self._reaching():
            jobs = self._client.list_jobs()
        return sorted((job for job in jobs if job.submission_id), key=lambda job: job.start_time or 0)

    def of_run(self, run_url: str) -> JobDetails | None:
        """The newest job of a run, or None."""
        mine = [job for job in self.list() if (job.metadata or {}).get("url") == run_url]
        return mine[-1] if mine else None

    def logs(self, job_id: str) -> str:
        """All that the job's entrypoint has printed."""
        with self._reaching():
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, write: Callable[[str], None]) -> JobDetails:
        """Pass on what the job prints until it is terminal; returns its details.

        A log stream may end, or break, while the job runs: the status decides, and the stream is opened again after
        what was already written. Raises UnreachableError when the cluster stays away for a minute.
        """
        written = _Count()
        lost_at = None
        while True:
            try:
                asyncio.run(self._stream(job_id, written, write))
                details = self.info(job_id)
                lost_at = None
            except (UnreachableError, aiohttp.ClientError, OSError, RuntimeError) as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > LOST_SECONDS:
                    raise UnreachableError(
                        f"{self.address.url} has not answered for {LOST_SECONDS:.0f} s; the run may go on: "
                        "`telar status` reads its state from storage"
                    ) from error
                time.sleep(POLL_SECONDS)
                continue
            if details is None:
                raise TelarError(f"job {job_id} is no longer known at {self.address.url}")
            if details.status.is_terminal():
                write(self.logs(job_id)[written.characters :])
                return details
            time.sleep(POLL_SECONDS)

    async def _stream(self, job_id: str, written: _Count, write: Callable[[str], None]) -> None:
        """Write the log's characters after those written already, while the stream lasts."""
        position = 0
        async for chunk in self._client.tail_job_logs(job_id):
            fresh = chunk[max(0, written.characters - position) :]
            position += len(chunk)
            if fresh:
                write(fresh)
                written.characters += len(fresh)

    def wait(self, job_id: str, timeout_seconds: float | None = None) -> JobDetails:
        """Poll until the job is terminal; raises TelarError when it is not in time."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            details = self.info(job_id)
            if details is None:
                raise TelarError(f"job {job_id} is not known at {self.address.url}")
            if details.status.is_terminal():
                return details
            if deadline is not None and time.monotonic() > deadline:
                raise TelarError(f"job {job_id} is still {details.status.value} after {timeout_seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def stop_now(self, job_id: str, timeout_seconds: float = 90.0) -> JobDetails:
        """Ask Ray to end the entrypoint until the job is terminal.

        Ray forgets a request that comes while the job is PENDING, so it is repeated. Raises TelarError.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            details = self.info(job_id)
            if details is None:
                raise TelarError(f"job {job_id} is not known at {self.address.url}")
            if details.status.is_terminal():
                return details
            if time.monotonic() > deadline:
                hint = (
                    "; Ray cannot cancel a job that it has not started: it waits for resources or for its runtime "
                    "environment, and gives up by itself after 15 minutes"
                    if details.status == JobStatus.PENDING
                    else ""
                )
                raise TelarError(
                    f"job {job_id} is still {details.status.value} after {timeout_seconds:.0f} s of stop requests{hint}"
                )
            with self._reaching():
                self._client.stop_job(job_id)
            time.sleep(1.0)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except requests.RequestException as error:
            raise UnreachableError(
                f"{self.address.url} (from {self.address.origin}) stopped answering: {_short(error)}"
            ) from error


def record(storage: Storage, run: str, details: JobDetails) -> dict[str, Any]:
    """The Jobs API's record of a job; written to RUN/job.json when the job is terminal."""
    content = json.loads(details.json())
    if details.status.is_terminal():
        storage.write_text(f"{run}/job.json", json.dumps(content, indent=1))
    return content


def exit_code(details: JobDetails) -> int:
    """0 when the job succeeded, 3 when it was stopped, else 1."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    return 3 if details.status == JobStatus.STOPPED or details.driver_exit_code == 3 else 1


@contextmanager
def _ray_addresses_hidden() -> Iterator[None]:
    """Ray lets RAY_API_SERVER_ADDRESS and RAY_ADDRESS override the address that its client is given."""
    hidden = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


def _too_large(package: bytes) -> str:
    sizes: Counter[str] = Counter()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        for entry in archive.infolist():
            sizes["/".join(entry.filename.split("/")[:2])] += entry.compress_size
    largest = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.most_common(3))
    return (
        f"the upload of the working directory is {len(package) / 2**20:.0f} MiB, Ray takes "
        f"{UPLOAD_LIMIT_BYTES // 2**20} MiB; largest: {largest}; move data out of the repository or name it in "
        ".rayignore"
    )


def _short(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
