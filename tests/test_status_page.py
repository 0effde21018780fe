"""The status page: what it shows, who may read it, and that a browser shows it of a run that trains."""

import http.client
import json
import urllib.parse
from html.parser import HTMLParser

import pytest
import yaml

from cluster.authentication import COOKIE, ray_token, token_path
from cluster.storage import Storage
from configs.errors import TelarError
from jobs.run_view import view
from jobs.status_page import page
from jobs.status_server import StatusServer
from tests.browser import CHROMIUM, browser
from tests.test_end_to_end import TINY, telar, write_corpus
from tests.test_watch import EVENTS, NOW, RECORDS, event, status

pytestmark = pytest.mark.ray
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


VOID = {"meta", "input", "br", "line"}


class Elements(HTMLParser):
    """Tags, attributes and texts of a page; unclosed or crossed elements are errors."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.links = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_the_run_and_nothing_that_runs_or_comes_from_elsewhere():
    found = Elements(
        page(view("night", status(slowest_rank={"rank": 3, "data_wait_seconds": 0.1}), RECORDS, EVENTS, NOW))
    )
    text = " ".join(found.texts)
    for words in ("night", "training", "step 60 of 100 (60%), 20s left", "4.400", "10.0%", "rank 3 (data 20%)"):
        assert words in text
    for words in ("lost node abc with ranks 2, 3", "goes on", "1 committed", "3 MiB", "12s ago"):
        assert words in text
    assert found.tags.count("svg") == 2 and "script" not in found.tags and found.links == []
    assert "127.0.0.1:8265" not in text


def test_what_others_wrote_stays_text():
    evil = "<script>alert(1)</script>"
    shown = view(evil, status(message=evil), RECORDS, [event("problem", 1, detail=evil)], NOW)
    assert "script" not in Elements(page(shown)).tags and page(shown).count("&lt;script&gt;") >= 3


def test_a_page_of_a_run_that_has_not_begun_and_of_one_that_ended():
    assert "refresh" in page(view("r", None, [], [], NOW))
    assert "refresh" not in page(view("r", status(state="finished", step=100), RECORDS, EVENTS, NOW))


@pytest.fixture
def storage(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/status.json").write_text(json.dumps(status(state="stopped", message="on request")))
    return Storage(str(tmp_path))


def request(server, method="GET", path="/", body=None, **headers):
    port = int(server.url.rpartition(":")[2])
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).hostname, port, timeout=10)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), answer.headers
    connection.close()
    return found


@pytest.fixture
def serving(storage):
    servers = []

    def start(token, host="127.0.0.1"):
        servers.append(StatusServer(storage, "r", host, token))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_request_without_the_token_is_refused_and_learns_nothing(serving):
    server = serving("s3cret")
    for headers in ({}, {"Authorization": "Bearer other"}, {"Cookie": f"{COOKIE}=other"}, {"Cookie": "=;;=\x01"}):
        code, text, _ = request(server, **headers)
        assert code == 401 and "on request" not in text and "s3cret" not in text
    for headers in ({"Authorization": "Bearer s3cret"}, {"Cookie": f"a=b; {COOKIE}=s3cret"}):
        code, text, kept = request(server, **headers)
        assert code == 200 and "on request" in text and kept["Cache-Control"] == "no-store"
        assert "default-src 'none'" in kept["Content-Security-Policy"]
    assert request(server, path="/../etc/passwd", Authorization="Bearer s3cret")[0] == 404


def test_another_address_of_the_machine_is_served_with_a_token(serving):
    server = serving("s3cret", "127.0.0.2")
    assert server.url.startswith("http://127.0.0.2:")
    assert request(server)[0] == 401 and request(server, Authorization="Bearer s3cret")[0] == 200


def test_the_form_turns_the_token_into_a_cookie_that_scripts_cannot_read(serving):
    server = serving("s3cret")
    code, text, headers = request(server, "POST", "/token", urllib.parse.urlencode({"token": "wrong"}))
    assert code == 401 and "not the cluster's token" in text and headers["Set-Cookie"] is None
    code, _, headers = request(server, "POST", "/token", urllib.parse.urlencode({"token": " s3cret\n"}))
    assert code == 303 and headers["Set-Cookie"] == f"{COOKIE}=s3cret; Path=/; HttpOnly; SameSite=Strict"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(serving, method):
    assert request(serving("s3cret"), method, "/", "x=1", Authorization="Bearer s3cret")[0] in (400, 501)


def test_without_a_token_only_this_machine_reads_and_by_its_own_name(serving):
    with pytest.raises(TelarError, match=r"tracking\.status_page"):
        serving(None, "0.0.0.0")
    server = serving(None)
    assert request(server)[0] == 200
    assert request(server, Host="attacker.example:80")[0] == 401


def test_the_token_is_found_where_ray_finds_it(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ray_token() is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(TelarError, match="auth_token"):
        ray_token()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("home\n")
    assert ray_token() == "home"
    (tmp_path / "t").write_text("file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "t"))
    assert ray_token() == "file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert ray_token() == "given"


@pytest.mark.slow
@needs_browser
def test_a_browser_follows_a_run_that_trains(tmp_path, embedded_ray):
    """From `telar status` to the page: log in with the form, see it move, stop the run, see it gone."""
    (tmp_path / "code").mkdir()
    write_corpus(tmp_path / "code")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    telar(tmp_path, "submit", "tiny.yaml", "--set", "run.name=seen", "--set", "train.steps=100000")
    with browser() as tab:
        try:
            found = {}
            while not (found.get("step") and found.get("last_commit_step")):
                found = json.loads(telar(tmp_path, "status", "seen", "--json").stdout)["status"] or {}
                assert found.get("state") in (None, "preparing", "training")
            url = found["status_page_url"]
            assert url in telar(tmp_path, "status", "seen").stdout
            assert url.startswith("http://127.0.0.1:")
            assert metadata(embedded_ray, found["job_id"])["status_page"] == url
            tab.open(url)
            assert "Curves" not in tab.ask("document.body.innerText")
            tab.ask(f"document.querySelector('input').value = {token_path().read_text().strip()!r}")
            tab.ask("document.querySelector('form').submit()")
            tab.until("document.querySelectorAll('svg').length === 2")
            first = tab.ask("document.querySelector('#progress').innerText")
            text = tab.ask("document.body.innerText")
            for words in ("seen", "training", "Attempts", "goes on", "Checkpoints", "Events", "stage finished"):
                assert words in text
            assert "scroll" not in tab.ask("getComputedStyle(document.body).overflow")
            assert tab.ask("document.documentElement.scrollWidth <= window.innerWidth")
            assert tab.ask("document.querySelector('.line').getTotalLength() > 50"), "there is no curve"
            tab.until(f"document.querySelector('#progress').innerText !== {first!r}")
        finally:
            telar(tmp_path, "stop", "seen")
        tab.ask("location.reload()")
        tab.until("!document.querySelector('#progress')")


def metadata(cluster, job_id):
    from jobs.submit import Address, Jobs

    return Jobs(Address(cluster.dashboard_url, "test", embedded=True)).info(job_id).metadata
