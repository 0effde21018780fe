"""The files: prometheus.yml for one cluster, Grafana's dashboard and its provisioning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from cluster.monitoring.panels import PANELS, Panel

SCRAPE_SECONDS = 10
DATASOURCE = "telar-prometheus"
DASHBOARD = "telar"
COLUMNS, HEIGHT = 2, 8
GRAFANA_WIDTH = 24


def write(folder: Path, dashboard_url: str, token_file: str | None, prometheus_url: str) -> list[Path]:
    """Write all files below `folder` for the cluster with that dashboard; returns their paths.

    `token_file` holds the cluster's token, which Prometheus reads by itself.
    """
    provisioning = folder.absolute() / "grafana"
    contents = {
        "prometheus.yml": _yaml(prometheus(dashboard_url, token_file)),
        "grafana/provisioning/datasources/telar.yml": _yaml(datasource(prometheus_url)),
        "grafana/provisioning/dashboards/telar.yml": _yaml(provider(str(provisioning / "dashboards"))),
        "grafana/dashboards/telar.json": json.dumps(dashboard(), indent=1) + "\n",
    }
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [folder / name for name in contents]


def prometheus(dashboard_url: str, token_file: str | None) -> dict[str, Any]:
    """Prometheus' configuration: the cluster's head lists the metrics endpoint of every node."""
    discovery: dict[str, Any] = {
        "url": f"{dashboard_url}/api/prometheus/sd",
        "refresh_interval": f"{SCRAPE_SECONDS}s",
    }
    if token_file is not None:
        discovery["authorization"] = {"type": "Bearer", "credentials_file": token_file}
    return {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "scrape_configs": [{"job_name": "ray", "http_sd_configs": [discovery]}],
    }


def datasource(prometheus_url: str) -> dict[str, Any]:
    """Grafana's data source."""
    source = {"name": "Telar", "uid": DATASOURCE, "type": "prometheus", "url": prometheus_url, "access": "proxy"}
    return {"apiVersion": 1, "datasources": [source]}


def provider(folder: str) -> dict[str, Any]:
    """Where Grafana finds dashboards."""
    return {"apiVersion": 1, "providers": [{"name": "telar", "type": "file", "options": {"path": folder}}]}


def dashboard() -> dict[str, Any]:
    """Grafana's dashboard with the run as variable."""
    run = {
        "name": "run",
        "type": "query",
        "datasource": _source(),
        "query": "label_values(ray_telar_step, run)",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "uid": DASHBOARD,
        "title": "Telar",
        "schemaVersion": 39,
        "refresh": f"{SCRAPE_SECONDS}s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [run]},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    width = GRAFANA_WIDTH // COLUMNS
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _source(),
        "gridPos": {"x": number % COLUMNS * width, "y": number // COLUMNS * HEIGHT, "w": width, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + at), "expr": query, "legendFormat": legend, "datasource": _source()}
            for at, (query, legend) in enumerate(panel.queries)
        ],
    }


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": DATASOURCE}


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False)
