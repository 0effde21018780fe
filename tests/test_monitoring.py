"""Files for Prometheus and Grafana; a real Prometheus, where there is one, finds data for every panel."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from cluster.gauges import MEANINGS
from cluster.monitoring.files import dashboard, write
from cluster.monitoring.panels import PANELS
from data.shard_server import GAUGES
from jobs.cli import cli
from tests.test_end_to_end import TINY, telar, write_corpus

PROMETHEUS = shutil.which("prometheus")


def test_each_gauge_of_a_run_is_on_the_dashboard_and_each_query_names_one_that_exists():
    queries = " ".join(query for panel in PANELS for query, _ in panel.queries)
    words = set(queries.replace("{", " ").replace("(", " ").split())
    used = {word.removeprefix("ray_telar_") for word in words if word.startswith("ray_telar_")}
    shards = {f"shards_{name}" for name in GAUGES}
    assert set(MEANINGS) <= used <= set(MEANINGS) | shards


def test_the_dashboard_is_a_grid_of_all_panels_over_one_data_source():
    tree = json.loads(json.dumps(dashboard()))
    assert [panel["title"] for panel in tree["panels"]] == [panel.title for panel in PANELS]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in tree["panels"]}
    assert len(places) == len(PANELS) and {x for x, _ in places} == {0, 12}
    sources = {target["datasource"]["uid"] for panel in tree["panels"] for target in panel["targets"]}
    assert sources == {tree["templating"]["list"][0]["datasource"]["uid"]}


def test_files_name_the_cluster_its_token_and_each_other(tmp_path):
    files = write(tmp_path / "m", "http://head:8265", "/secret/token", "http://prom:9090")
    trees = {path.name if "provisioning" not in str(path) else path.parent.name: path.read_text() for path in files}
    (job,) = yaml.safe_load(trees["prometheus.yml"])["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    assert discovery["url"] == "http://head:8265/api/prometheus/sd"
    assert discovery["authorization"]["credentials_file"] == "/secret/token"
    (source,) = yaml.safe_load(trees["datasources"])["datasources"]
    assert source["url"] == "http://prom:9090" and source["uid"] in trees["telar.json"]
    (place,) = yaml.safe_load(trees["dashboards"])["providers"]
    assert (Path(place["options"]["path"]) / "telar.json").exists()
    if shutil.which("promtool"):
        config = str(tmp_path / "m" / "prometheus.yml")
        subprocess.run(["promtool", "check", "config", "--syntax-only", config], check=True)


def test_a_token_file_that_is_not_there_is_named(tmp_path):
    arguments = ["monitor", "--address", "http://h:8265", "--token-file", "none", "--out", str(tmp_path / "m")]
    result = CliRunner().invoke(cli, arguments)
    assert "--token-file: none does not exist" in str(result.exception) and not (tmp_path / "m").exists()


def ask(port, query):
    words = urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{words}", timeout=10) as answer:
        return json.load(answer)["data"]["result"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus on PATH; .ci/run takes it from Debian's packages")
def test_prometheus_finds_data_for_every_panel_while_a_run_trains(tmp_path, embedded_ray):
    (tmp_path / "code").mkdir()
    write_corpus(tmp_path / "code")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    telar(tmp_path, "submit", "tiny.yaml", "--set", "run.name=watched", "--set", "train.steps=100000")
    telar(tmp_path, "monitor", "--out", "m")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [PROMETHEUS, "--config.file", tmp_path / "m/prometheus.yml", "--storage.tsdb.path", tmp_path / "tsdb"]
    with (tmp_path / "prometheus.log").open("w") as log:
        server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        left = {query: panel.title for panel in PANELS if not panel.needs_gpu for query in panel.expressions("watched")}
        deadline = time.monotonic() + 150
        while left:
            assert time.monotonic() < deadline, f"no data for {left}"
            assert server.poll() is None, (tmp_path / "prometheus.log").read_text()
            time.sleep(1)
            try:
                found = {query: ask(port, query) for query in left}
            except OSError:
                # It does not listen yet.
                continue
            left = {query: title for query, title in left.items() if not found[query]}
        (series,) = ask(port, 'ray_telar_world_size{run="watched"}')
        assert series["value"][1] == str(TINY["parallelism"]["data"])
    finally:
        server.terminate()
        server.wait(30)
        telar(tmp_path, "stop", "watched")
