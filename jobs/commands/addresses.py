"""Which cluster a command talks to: --address, cluster.address, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, embedded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cluster import local
from configs.errors import ConfigError, UnreachableError
from configs.schema import RunConfig
from jobs.commands.runs import RunPlace

if TYPE_CHECKING:
    from jobs.submit import Jobs


def given_address(option: str | None, config: RunConfig, embedded: bool) -> tuple[str, str] | None:
    """(dashboard URL, where it came from), or None for the embedded cluster.

    Raises ConfigError when the address is none of a dashboard.
    """
    if embedded:
        if option:
            raise ConfigError("--embedded and --address exclude each other; leave one out")
        return None
    return given_address_url(option, config.cluster.address)


def given_address_url(option: str | None, configured: str | None) -> tuple[str, str] | None:
    """The first of --address, `cluster.address` and Ray's two variables that is set, with its origin, or None.

    Raises ConfigError when it is no dashboard's address.
    """
    sources = [
        ("--address", option),
        ("cluster.address", configured),
        ("RAY_API_SERVER_ADDRESS", os.environ.get("RAY_API_SERVER_ADDRESS")),
        ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS")),
    ]
    for origin, url in sources:
        if url:
            _check(url, origin)
            return url.rstrip("/"), origin
    return None


def connect_to_run(place: RunPlace, option: str | None) -> Jobs:
    """The Jobs API of the cluster that a run was submitted to (its configuration tells), or of --address.

    Raises UnreachableError when that cluster does not answer.
    """
    from jobs.submit import Address, Jobs

    url, origin = option, "--address"
    if url is None:
        url, origin = place.config().cluster.address, f"cluster.address of run {place.name}"
    if url is not None:
        _check(url, origin)
        return Jobs(Address(url.rstrip("/"), origin))
    cluster = local.find()
    if cluster is None:
        raise UnreachableError(
            f"run {place.name} was submitted to the embedded cluster, which does not run; its files lie in "
            f"{place.url}; `telar submit --resume {place.name}` continues it"
        )
    return Jobs(Address(cluster.dashboard_url, "the embedded cluster", embedded=True))


def _check(url: str, origin: str) -> None:
    if url.startswith(("http://", "https://")):
        return
    raise ConfigError(
        f"{origin}: {url!r} is no dashboard address; Telar submits through Ray's Jobs API, so give the dashboard's "
        "http://host:8265 with --address or RAY_API_SERVER_ADDRESS, or use --embedded for a cluster on this machine"
    )
