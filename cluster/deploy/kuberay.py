"""A KubeRay RayJob with the run's configuration in a ConfigMap, as YAML for `kubectl apply -f`.

KubeRay makes a Ray cluster for the job, submits it over HTTP and removes the cluster when the job has ended. The job's
entrypoint submits the run to that cluster or, after the cluster was lost and made anew, resumes it. Fields after the
operator's own definitions (ray-operator/apis/ray/v1 of ray-project/kuberay).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from cluster.deploy.order import GRACE_SECONDS, RAY_VERSION, Order
from configs.errors import ConfigError
from configs.load import to_yaml

CONFIG_FOLDER = "/etc/telar"
CONFIG_FILE = "config.yaml"
MOUNT = "/shared"
# After the operator's own samples; the head runs controllers and no ranks.
HEAD_CPUS, HEAD_MEMORY_GIB = 4, 16
PORTS = {"gcs": 6379, "dashboard": 8265, "metrics": 8080}
RETRIES = 3
KEEP_CLUSTER_SECONDS = 600
STORAGE_SECRET = "telar-storage"
REDIS_SECRET = "telar-redis"
ROCKSDB, NONE = "rocksdb", "none"
NOTES = {
    ROCKSDB: "The head's state lies in RocksDB on a volume of its own: this needs KubeRay 1.7 or later, its operator\n"
    "# started with --feature-gates=GCSFaultToleranceEmbeddedStorage=true. Without it: telar deploy --gcs-storage\n"
    "# redis://HOST:PORT, or none.",
    NONE: "The head's state is in its memory: when its pod is lost, a new cluster resumes the run (backoffLimit).",
}


def manifest(order: Order, image: str, claim: str | None = None, gcs_storage: str = ROCKSDB) -> str:
    """Both objects, as YAML.

    `image` holds Python, Ray and Telar; `claim` names a PersistentVolumeClaim (ReadWriteMany) that all pods mount at
    /shared; `gcs_storage` is where the head keeps its state: rocksdb, redis://HOST:PORT or none. Raises ConfigError
    when Kubernetes does not take the run's name, or for another kind of storage.
    """
    name = object_name(order.name)
    objects = [config_map(order, name), ray_job(order, name, image, claim, gcs_storage)]
    note = NOTES.get(gcs_storage, f"The password of Redis, if it has one, is `password` in the secret {REDIS_SECRET}.")
    return f"# {note}\n" + yaml.safe_dump_all(objects, sort_keys=False)


def fault_tolerance(gcs_storage: str) -> dict[str, Any]:
    """The field of the cluster's specification with which actors and jobs outlive a restart of the head's pod.

    Raises ConfigError naming the option for a kind that KubeRay has not.
    """
    if gcs_storage == NONE:
        return {}
    if gcs_storage == ROCKSDB:
        options: dict[str, Any] = {"backend": "rocksdb", "storage": {"size": "1Gi"}}
    elif re.fullmatch(r"rediss?://[^\s/@:]+:\d+", gcs_storage):
        password = {"secretKeyRef": {"name": REDIS_SECRET, "key": "password", "optional": True}}
        options = {"redisAddress": gcs_storage, "redisPassword": {"valueFrom": password}}
    else:
        raise ConfigError(
            f"--gcs-storage: {gcs_storage!r} is none of rocksdb, redis://HOST:PORT and none; a password of Redis "
            f"belongs into the secret {REDIS_SECRET}"
        )
    return {"gcsFaultToleranceOptions": options}


def object_name(run: str) -> str:
    """The run's name in the letters of RFC 1035, at most 40 of them: KubeRay makes names of services of it.

    Raises ConfigError when nothing is left.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not name:
        raise ConfigError(f"run.name: {run!r} has no letter or digit that Kubernetes takes; choose another name")
    return (name if name[0].isalpha() else f"run-{name}")[:40].rstrip("-")


def config_map(order: Order, name: str) -> dict[str, Any]:
    """The resolved configuration."""
    data = {CONFIG_FILE: to_yaml(order.config)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-config"}, "data": data}


def ray_job(order: Order, name: str, image: str, claim: str | None, gcs_storage: str) -> dict[str, Any]:
    """The RayJob."""
    machines = order.machines
    worker = _container("ray-worker", image, machines.cpus, machines.memory_gib, machines.gpus, claim)
    head = _container("ray-head", image, HEAD_CPUS, HEAD_MEMORY_GIB, 0, claim)
    head["ports"] = [
        {"containerPort": port, "name": title}
        for port, title in ((6379, "gcs"), (8265, "dashboard"), (8080, "metrics"))
    ]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "telar"}},
        "spec": {
            "submissionMode": "HTTPMode",
            "entrypoint": order.command(f"{CONFIG_FOLDER}/{CONFIG_FILE}"),
            # Each retry makes a new cluster, on which the entrypoint resumes the run.
            "backoffLimit": RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_CLUSTER_SECONDS,
            "rayClusterSpec": {
                "rayVersion": RAY_VERSION,
                # The operator makes a token, keeps it in a secret and gives it to all pods.
                "authOptions": {"mode": "token"},
                **fault_tolerance(gcs_storage),
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": _pod(head, name, claim, gpus=0),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "ranks",
                        "replicas": machines.nodes,
                        "minReplicas": machines.nodes,
                        "maxReplicas": machines.nodes,
                        "rayStartParams": {},
                        "template": _pod(worker, name, claim, machines.gpus),
                    }
                ],
            },
        },
    }


def _container(name: str, image: str, cpus: int, memory_gib: int, gpus: int, claim: str | None) -> dict[str, Any]:
    limits: dict[str, Any] = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}
    if gpus:
        limits["nvidia.com/gpu"] = str(gpus)
    mounts = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if claim is not None:
        mounts.append({"name": "shared", "mountPath": MOUNT})
    return {
        "name": name,
        "image": image,
        # Requests below the limits would let the kernel kill a rank for what its neighbour uses.
        "resources": {"limits": limits, "requests": dict(limits)},
        # Keys of the object store, if it needs some: kubectl create secret generic telar-storage --from-env-file=FILE
        "envFrom": [{"secretRef": {"name": STORAGE_SECRET, "optional": True}}],
        "volumeMounts": mounts,
    }


def _pod(container: dict[str, Any], name: str, claim: str | None, gpus: int) -> dict[str, Any]:
    memory_gib = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": f"{name}-config"}},
        # Ray's object store and NCCL; counts as the pod's memory.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, memory_gib // 3)}Gi"}},
    ]
    if claim is not None:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": claim}})
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": volumes,
    }
    if gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"spec": spec}
