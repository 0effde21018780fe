"""Manifests for KubeRay, Slurm and `ray up`: the fields that we write exist there, and what they start, starts."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from cluster.deploy import ray_up
from configs.load import parse_config, read_yaml
from jobs.cli import cli

ROOT = Path(__file__).resolve().parent.parent
# Of ray-operator/apis/ray/v1 (RayJobSpec, RayClusterSpec, HeadGroupSpec, WorkerGroupSpec) in ray-project/kuberay, and
# of Kubernetes' PodSpec and Container: the types of the fields that we write.
CONTAINER = {
    "name": str, "image": str, "resources": {"limits": dict, "requests": dict}, "envFrom": list, "volumeMounts": list,
    "ports": list,
}  # fmt: skip
POD = {
    "spec": {"terminationGracePeriodSeconds": int, "containers": [CONTAINER], "volumes": list, "tolerations": list}
}  # fmt: skip
RAY_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "labels": dict},
    "spec": {
        "submissionMode": {"HTTPMode", "K8sJobMode", "InteractiveMode", "SidecarMode"},
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": {"token", "disabled"}},
            "gcsFaultToleranceOptions": {
                "backend": {"rocksdb", "redis"}, "storage": {"size": str},
                "redisAddress": str,
                "redisPassword": {
                    "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str, "optional": bool}}
                },
            },
            "headGroupSpec": {"rayStartParams": dict, "template": POD},
            "workerGroupSpecs": [
                {
                    "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "rayStartParams": dict,
                    "template": POD,
                }
            ],
        },
    },
}  # fmt: skip


def check(value, kind, path="RayJob"):
    if isinstance(kind, dict):
        assert isinstance(value, dict), path
        for key, inner in value.items():
            assert key in kind, f"{path}.{key} is no field there"
            check(inner, kind[key], f"{path}.{key}")
    elif isinstance(kind, list):
        for number, inner in enumerate(value):
            check(inner, kind[0], f"{path}[{number}]")
    elif isinstance(kind, set):
        assert value in kind, path
    else:
        assert type(value) is kind, path


@pytest.fixture
def config(tmp_path):
    tree = {
        "extends": str(ROOT / "configs" / "gpt_124m.yaml"),
        "run": {"storage": "s3://bucket/runs", "name": "Web_1"},
        "parallelism": {"data": 16},
        "data": {
            "corpora": [
                {
                    "name": "web",
                    "kind": "jsonl",
                    "path": "s3://bucket/*.jsonl",
                    "target": "{text}",
                    "continuation": True,
                }
            ]
        },
    }
    path = tmp_path / "web.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def deploy(*arguments, code=0):
    result = CliRunner().invoke(cli, ["deploy", *map(str, arguments)], standalone_mode=True)
    if code == 0:
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.stdout
    assert result.exit_code != 0
    return str(result.exception)


def test_the_rayjob_has_only_fields_that_kuberay_knows_and_says_what_the_run_needs(config):
    config_map, job = yaml.safe_load_all(deploy(config, "--to", "kuberay", "--image", "registry/telar:1"))
    check(job, RAY_JOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    pod = group["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu" and pod["terminationGracePeriodSeconds"] == 120
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"] and "tolerations" not in head
    assert cluster["authOptions"]["mode"] == "token" and cluster["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    # Every mount has its volume, and the entrypoint reads the configuration that the map holds.
    for spec in (pod, head):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == set(volumes)
        assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]
    (name,) = config_map["data"]
    assert job["spec"]["entrypoint"].split()[2] == f"/etc/telar/{name}"
    inside = parse_config(yaml.safe_load(config_map["data"][name]), "ConfigMap")
    assert (inside.run.name, inside.run.storage, inside.parallelism.data) == ("Web_1", "s3://bucket/runs", 16)
    assert job["metadata"]["name"] == "web-1"


def test_the_entrypoint_is_a_command_that_telar_understands(config):
    _, job = yaml.safe_load_all(deploy(config, "--to", "kuberay", "--image", "registry/telar:1"))
    telar, verb, path, *options = job["spec"]["entrypoint"].split()
    assert (telar, verb, path) == ("telar", "submit", "/etc/telar/config.yaml")
    known = {name for option in cli.commands[verb].params for name in option.opts}
    assert {word for word in options if word.startswith("--")} <= known


def test_the_heads_state_lies_in_rocksdb_in_redis_or_nowhere(config):
    options = ("--to", "kuberay", "--image", "i")
    # KubeRay refuses rocksdb unless its operator was started with the gate (validateGcsFaultToleranceBackend).
    assert "--feature-gates=GCSFaultToleranceEmbeddedStorage=true" in deploy(config, *options).split("apiVersion")[0]
    _, job = yaml.safe_load_all(deploy(config, *options, "--gcs-storage", "redis://redis:6379"))
    check(job, RAY_JOB)
    state = job["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]
    # Both of rocksdb's fields are refused beside an address; redis is the default backend.
    assert state["redisAddress"] == "redis://redis:6379" and not {"backend", "storage"} & state.keys()
    _, job = yaml.safe_load_all(deploy(config, *options, "--gcs-storage", "none"))
    assert "gcsFaultToleranceOptions" not in job["spec"]["rayClusterSpec"]


def test_a_claim_is_mounted_everywhere_and_holds_the_storage(config):
    options = ("--to", "kuberay", "--image", "i", "--claim", "team", "--storage", "/shared/runs")
    config_map, job = yaml.safe_load_all(deploy(config, *options))
    inside = yaml.safe_load(config_map["data"]["config.yaml"])
    assert inside["cluster"]["shared_filesystem"] is True and inside["run"]["storage"] == "/shared/runs"
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        assert {"name": "shared", "persistentVolumeClaim": {"claimName": "team"}} in spec["volumes"]
        assert {"name": "shared", "mountPath": "/shared"} in spec["containers"][0]["volumeMounts"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--to", "kuberay"), ("--image",)),
        (
            ("--to", "kuberay", "--image", "i", "--storage", "/home/me/runs"),
            ("run.storage", "/home/me/runs", "--claim"),
        ),
        (("--to", "kuberay", "--image", "i", "--set", "data.corpora.web.path=/d/x.jsonl"), ("data.corpora.web.path",)),
        (("--to", "kuberay", "--image", "i", "--nodes", "1"), ("--nodes", "8 ranks", "asks for 16", "give 2")),
        (("--to", "kuberay", "--image", "i", "--set", "run.name=___"), ("run.name", "'___'")),
        (
            ("--to", "kuberay", "--image", "i", "--gcs-storage", "redis://:secret@redis:6379"),
            ("--gcs-storage", "redis://HOST:PORT", "telar-redis"),
        ),
        (("--to", "slurm"), ("--shared",)),
        (("--to", "slurm", "--shared", "/nowhere"), ("--shared", "/nowhere")),
        (("--to", "ray-up"), ("--hosts", "--region")),
        (("--to", "ray-up", "--hosts", "a,b"), ("--hosts: 2 machines, 3 are needed",)),
        (
            ("--to", "slurm", "--set", "cluster.device=cpu", "--gpus-per-node", "4"),
            ("--gpus-per-node", "cluster.device is cpu"),
        ),
        (
            (
                "--to",
                "slurm",
                "--set",
                "cluster.device=cpu",
                "--set",
                "cluster.cpus_per_rank=4",
                "--cpus-per-node",
                "4",
            ),
            ("--cpus-per-node: 4", "at least 6"),
        ),
    ],
)
def test_what_does_not_fit_is_named(config, arguments, parts):
    said = deploy(config, *arguments, code=2)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("how", ["hosts", "aws"])
def test_ray_takes_the_cluster_file(config, how, tmp_path, monkeypatch):
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setenv("TELAR_HOME", str(tmp_path / "home"))
    where = {"hosts": ("--hosts", "h, a, b"), "aws": ("--region", "eu-west-1", "--instance-type", "p5.48xlarge")}[how]
    tree = yaml.safe_load(deploy(config, "--to", "ray-up", *where))
    validate_config(prepare_config(tree))
    kept_back = (ROOT / ".rayignore").read_text().split("# Secrets.\n")[1].split("runs/")[0]
    assert {".env", "*.pem", "id_rsa*"} <= set(tree["rsync_exclude"])
    assert all(f"{name}/" in kept_back or name in kept_back for name in ray_up.SECRETS)
    assert "make .venv" in tree["setup_commands"][0] and Path(tree["file_mounts"]["~/.ray/auth_token"]).exists()
    assert all("RAY_AUTH_MODE=token" in line for line in tree["head_start_ray_commands"][1:])
    if how == "aws":
        ranks = tree["available_node_types"]["ranks"]
        assert ranks["min_workers"] == ranks["max_workers"] == 2 and ranks["resources"] == {"CPU": 10, "GPU": 8}
    else:
        assert tree["provider"] == {"type": "local", "head_ip": "h", "worker_ips": ["a", "b"]}


def test_the_batch_script_is_clean_shell_and_asks_for_what_the_run_needs(config, tmp_path):
    script = tmp_path / "run.sh"
    message = deploy(config, "--to", "slurm", "--shared", "/", "--time", "08:00:00", "--out", script)
    assert message == ""
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    lines = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    asked = dict(line.split("=", 1) for line in lines if "=" in line)
    assert (asked["nodes"], asked["gpus-per-node"], asked["time"]) == ("2", "8", "08:00:00")
    assert asked["cpus-per-task"] == "10"


STUBS = {
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo n1; else echo "scontrol $*" >> "$CALLS"; fi',
    # Ray starts and runs what stands behind `--`; it says nothing of how that ended.
    "ray": 'echo "ray $*" >> "$CALLS"; while [ "$1" != -- ]; do shift; done; shift; "$@"; exit 0',
    # A run that ends as it is told to, or when it is stopped.
    "telar": '''case "$1" in
        submit) if [ "$ENDS" != stopped ]; then echo "$ENDS" > "$CALLS.state"; exit 0; fi
                sleep 60 & echo $$ > "$CALLS.pid"; wait ;;
        stop) echo "telar stop $2" >> "$CALLS"; echo stopped > "$CALLS.state"; pkill -P "$(cat "$CALLS.pid")" ;;
        status) state="$(cat "$CALLS.state")"; echo "web  $state  step 3/4"
                case "$state" in finished | training) exit 0 ;; stopped) exit 3 ;; *) exit 1 ;; esac ;;
      esac''',
}  # fmt: skip


@pytest.mark.parametrize(
    ("ends", "code", "queued_again"),
    [("finished", 0, False), ("failed", 1, False), ("training", 1, False), ("stopped", 0, True)],
)
def test_the_batch_script_ends_as_the_run_did_and_after_a_notice_goes_back_to_the_queue(
    config, tmp_path, ends, code, queued_again
):
    options = ("--shared", "/", "--storage", tmp_path / "my runs", "--set", "run.name=web")
    script = deploy(config, "--to", "slurm", *options).replace("export PATH=", f"export PATH={tmp_path}/bin:")
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    calls = tmp_path / "calls"
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", "-c", script], env={**os.environ, **slurm, "CALLS": str(calls), "ENDS": ends})
    if ends == "stopped":
        deadline = time.monotonic() + 30
        while not (tmp_path / "calls.pid").exists():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        job.terminate()
    assert job.wait(30) == code
    start, *others = calls.read_text().splitlines()
    assert start.startswith("ray symmetric-run --address n1:6379 --min-nodes 2 --dashboard-port 8265 ")
    assert start.split(" -- ")[1].startswith(
        f"telar submit {config} --address http://127.0.0.1:8265 --or-resume --wait"
    )
    assert others == ([f"telar stop {tmp_path}/my runs/web", "scontrol requeue 7"] if queued_again else [])


@pytest.mark.parametrize(("run", "name"), [("Web_1", "web-1"), ("7b-base", "run-7b-base"), ("4e5", "run-4e5")])
def test_names_that_kubernetes_takes_begin_with_a_letter(config, run, name):
    options = ("--to", "kuberay", "--image", "i", "--set", f'run.name="{run}"')
    config_map, job = yaml.safe_load_all(deploy(config, *options))
    assert job["metadata"]["name"] == name
    # The run keeps its own, also one that YAML could take for a number.
    assert load_text(config_map["data"]["config.yaml"]).run.name == run


def load_text(text):
    return parse_config(read_yaml(text), "ConfigMap")


def test_a_task_of_this_machine_is_named_as_not_visible(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    task = {"name": "mine", "kind": "jsonl", "path": "rows.jsonl", "request": "generate", "source": "{question}"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**task, "target": "{answer}", "metric": "exact_match"}))
    said = deploy(config, "--to", "kuberay", "--image", "i", "--set", "evaluate.tasks=[mine.yaml]", code=2)
    assert f"evaluate.definitions.mine.path: {tmp_path}/rows.jsonl" in said, said


def test_the_command_says_where_the_run_lies(config):
    _, job = yaml.safe_load_all(deploy(config, "--to", "kuberay", "--image", "i", "--storage", "s3://other/runs"))
    words = job["spec"]["entrypoint"].split()
    assert words[words.index("--storage") + 1] == "s3://other/runs"
