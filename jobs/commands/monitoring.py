"""`telar monitor`: files for Prometheus and Grafana that watch a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster import local
from cluster.authentication import token_path
from cluster.monitoring.files import write
from configs.errors import ConfigError, UnreachableError
from jobs.commands.addresses import given_address_url


def monitor(folder: Path, address: str | None, token_file: str | None, prometheus_url: str) -> dict[str, Any]:
    """Write the files for the cluster at --address, in the environment, or embedded.

    Raises UnreachableError where none is named and no embedded one runs.
    """
    given = given_address_url(address, None)
    if given is None:
        cluster = local.find()
        if cluster is None:
            raise UnreachableError(
                "no cluster: name its dashboard with --address, or start the embedded one with `telar up`"
            )
        url, token_file = cluster.dashboard_url, token_file or str(token_path())
    else:
        url, _ = given
    if token_file is not None and not Path(token_file).is_file():
        raise ConfigError(f"--token-file: {token_file} does not exist; name the file with the cluster's token")
    token = str(Path(token_file).absolute()) if token_file else None
    files = [str(path) for path in write(folder, url, token, prometheus_url)]
    message = (
        "\n".join(f"wrote {path}" for path in files)
        + f"\nprometheus --config.file {folder}/prometheus.yml\n"
        + f"GF_PATHS_PROVISIONING={folder.absolute()}/grafana/provisioning grafana server"
    )
    return {"files": files, "dashboard_url": url, "message": message}
