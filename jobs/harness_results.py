"""What lm-evaluation-harness found, in the form of our results: cells with metrics, counts and intervals."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Of a normal distribution; the harness gives standard errors and no intervals.
STANDARD_ERRORS = 1.96
TASK = "lm-eval"


def cells_of(found: Mapping[str, Any], version: str) -> list[dict[str, Any]]:
    """A cell for each task that `simple_evaluate` answered, as in results.json; groups show as their tasks.

    An interval is value +- 1.96 standard errors, and each metric says its `standard_error`. Metrics that the harness
    gives no standard error for are in the cell's `without_interval` as name and value, `rows_digest` is of the rows.
    `version` is the harness's.
    """
    return [_cell(found, name, version) for name in found["configs"]]


def missing_cell(name: str, problem: str) -> dict[str, Any]:
    """The cell of a task that the harness could not answer."""
    return _empty(name, f"lm-eval task {name}", 0) | {"status": "missing", "detail": problem}


def _empty(name: str, signature: str, records: int) -> dict[str, Any]:
    return {
        "corpus": name,
        "task": TASK,
        "signature": signature,
        "records": records,
        "failed_records": 0,
        "status": "ok",
        "detail": None,
        "metrics": [],
    }


def _cell(found: Mapping[str, Any], name: str, version: str) -> dict[str, Any]:
    records = int(found["n-samples"][name]["effective"])
    shots = found.get("n-shot", {}).get(name, 0)
    rows = rows_digest(found["samples"][name])
    signature = f"lm-eval {version}, task {name} version {found['versions'].get(name)}, {shots} shots; rows {rows[:12]}"
    cell, without = _empty(name, signature, records), {}
    for key, value in found["results"][name].items():
        metric, comma, choice = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        title = metric if choice == "none" else f"{metric}:{choice}"
        error = found["results"][name].get(f"{metric}_stderr,{choice}")
        # The harness writes "N/A" where it knows none.
        if not isinstance(error, int | float) or not math.isfinite(error) or not math.isfinite(value):
            without[title] = value if math.isfinite(value) else str(value)
            continue
        cell["metrics"].append(
            {
                "name": title,
                "label": title.replace("_", " "),
                "value": float(value),
                "low": float(value - STANDARD_ERRORS * error),
                "high": float(value + STANDARD_ERRORS * error),
                "n": records,
                "unit": "lm-eval",
                "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
                "tokens": None,
                "baselines": [],
                "standard_error": float(error),
            }
        )
    return cell | {"without_interval": without, "rows_digest": rows}


def rows_digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of what was asked and what was expected in each row, by the harness's own hashes of them."""
    hashes = sorted((each["doc_id"], each["prompt_hash"], each["target_hash"]) for each in samples)
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
