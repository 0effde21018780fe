"""A cluster file for `ray up`: machines of AWS, or machines that are there already, reached by SSH.

After `ray up FILE` the run is submitted through a tunnel: `ray dashboard FILE` and `telar submit CONFIG --address`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from cluster.deploy.order import RAY_VERSION, Order

REMOTE_ROOT = "~/telar"
REMOTE_TOKEN = "~/.ray/auth_token"
HEAD_TYPE = "m6i.2xlarge"
HEAD, RANKS = "head", "ranks"
# Never copied to the machines; .rayignore lists the same for uploads with a job.
SECRETS = (".env", ".env.*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc", ".aws")


def manifest(
    order: Order,
    root: str,
    token: str,
    user: str,
    hosts: Sequence[str] = (),
    region: str | None = None,
    instance_type: str | None = None,
) -> str:
    """The file, as YAML.

    `root` is Telar's folder here and `token` the file with the cluster's token, both copied to all machines. With
    `hosts` (the head first) the cluster is made of them, else of AWS instances of `instance_type` in `region`.
    """
    tree: dict[str, Any] = {"cluster_name": order.name, "max_workers": order.machines.nodes}
    tree |= _hosts(hosts) if hosts else _aws(order, region, instance_type)
    environment = "export RAY_AUTH_MODE=token && "
    return yaml.safe_dump(
        tree
        | {
            "auth": {"ssh_user": user},
            "file_mounts": {REMOTE_ROOT: root, REMOTE_TOKEN: token},
            "rsync_exclude": [*SECRETS, ".git", ".venv", "runs", "**/__pycache__"],
            "setup_commands": [
                f"cd {REMOTE_ROOT} && make .venv",
                f"chmod 600 {REMOTE_TOKEN}",
                f"grep -q telar/.venv ~/.bashrc || echo 'export PATH={REMOTE_ROOT}/.venv/bin:$PATH' >> ~/.bashrc",
            ],
            "head_start_ray_commands": [
                "ray stop",
                f"{environment}ray start --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml",
            ],
            "worker_start_ray_commands": ["ray stop", f"{environment}ray start --address=$RAY_HEAD_IP:6379"],
            "metadata": {"ray_version": RAY_VERSION},
        },
        sort_keys=False,
    )


def _hosts(hosts: Sequence[str]) -> dict[str, Any]:
    provider = {"type": "local", "head_ip": hosts[0], "worker_ips": list(hosts[1:])}
    # Machines that are there cannot be scaled away.
    return {"provider": provider, "upscaling_speed": 1.0, "idle_timeout_minutes": 525_600}


def _aws(order: Order, region: str | None, instance_type: str | None) -> dict[str, Any]:
    nodes = order.machines.nodes
    resources = {"CPU": order.machines.cpus, **({"GPU": order.machines.gpus} if order.machines.gpus else {})}
    return {
        "provider": {"type": "aws", "region": region},
        "available_node_types": {
            # No ranks there: losing a machine with ranks must not take the controller along.
            HEAD: {"node_config": {"InstanceType": HEAD_TYPE}, "resources": {"CPU": 0}, "max_workers": 0},
            RANKS: {
                "node_config": {"InstanceType": instance_type},
                "resources": resources,
                "min_workers": nodes,
                "max_workers": nodes,
            },
        },
        "head_node_type": HEAD,
    }
