"""Virtual environments of the loaders, made on demand in a cache folder outside the repository."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

PINS = Path(__file__).with_name("environments.toml")
DONE = "telar-bench.json"
PIP_SECONDS = 1800
# What mosaicml-streaming imports of torchvision, for its vision datasets only.
TORCHVISION = {
    "__init__.py": "from torchvision import datasets, transforms\n",
    "datasets.py": "class VisionDataset: ...\n\n\nclass CIFAR10: ...\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "def to_tensor(picture):\n    raise NotImplementedError\n",
}


class NotInstalled(Exception):
    """The packages of an environment could not be installed; the message is pip's last line."""


def ensure(name: str, folder: Path) -> Path:
    """The interpreter of an environment below `folder`, made when it is absent or was made from other pins.

    Raises NotInstalled when pip fails.
    """
    wanted = tomllib.loads(PINS.read_text())[name]
    stamp = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    home = folder / name
    python, done = home / "bin" / "python", home / DONE
    if done.exists() and json.loads(done.read_text())["pins"] == stamp:
        return python
    done.unlink(missing_ok=True)
    print(f"making environment {home}", file=sys.stderr, flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(home)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *wanted["packages"]])
    if wanted.get("bare"):
        _run([*pip, "--no-deps", *wanted["bare"]])
    if wanted.get("stub") == "torchvision":
        site = next((home / "lib").glob("python3*")) / "site-packages" / "torchvision"
        for file, content in TORCHVISION.items():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_text(content)
    done.write_text(json.dumps({"pins": stamp}))
    return python


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"{' '.join(command[:4])} took more than {PIP_SECONDS} s") from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()
        raise NotInstalled((lines or [f"exit status {result.returncode}"])[-1])
