"""What may not happen: keys that are written anywhere, private files that are uploaded, code that is loaded as data."""

import ast
import json
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.environment import ROOT
from cluster.storage import Storage
from configs.errors import ConfigError
from configs.load import apply_overrides, parse_config
from configs.redaction import HIDDEN, holds_secret, redacted
from jobs.ledger import Ledger
from tests.test_end_to_end import TINY, telar, write_corpus
from tests.test_layout import source_files

pytestmark = pytest.mark.ray

PLANTED = "pLaNtEd0123456789"
WITH_SECRETS = [
    f"s3://AKIAKEY:{PLANTED}@bucket/runs",
    f"s3://AKIAKEY:ab/{PLANTED}@bucket/runs",
    f"simplecache::ftp://me:{PLANTED}@host:21/x",
    f"https://{PLANTED}@host/x.jsonl",
    f"https://host/x.jsonl?X-Amz-Signature={PLANTED}&part=1",
    f"https://host/x.jsonl?part=1&access_token={PLANTED}",
]
WITHOUT = [
    "s3://bucket/runs",
    "hf://user/set@revision",
    "sftp://me@host/x",
    "http://host:8265/a@b",
    "https://host/x.jsonl?page=3&tokens=5",
    "memory://a:b/c",
    "/data/a@b:c",
    "summarize: {token}? key=value",
]


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_a_url_with_a_key_is_refused_wherever_it_stands_and_not_repeated(url):
    for field in ("run.storage", "data.corpora.calls.path", "evaluate.datasets", "data.tokenizer.path"):
        with pytest.raises(ConfigError) as refused:
            parse_config(apply_overrides(TINY, [f"{field}={json.dumps(url)}"]), "x.yaml")
        said = str(refused.value)
        assert PLANTED not in said and HIDDEN in said and field.rpartition(".")[2] in said
    with pytest.raises(ConfigError) as refused:
        Storage(url)
    assert PLANTED not in str(refused.value)


@pytest.mark.parametrize("url", WITHOUT)
def test_other_urls_and_texts_are_no_secrets(url):
    assert not holds_secret(url) and redacted(url, {}) == url


@settings(deadline=None, max_examples=100)
@given(
    st.from_regex(r"[A-Za-z0-9/+._~-]{8,40}", fullmatch=True).filter(lambda s: not s.split("/")[0].isdigit()),
    st.sampled_from(["s3", "ftp", "https", "abfs"]),
    st.text(max_size=20),
    st.text(max_size=20),
)
def test_nothing_is_left_of_a_password_in_a_url(secret, scheme, before, after):
    text = f"{before} {scheme}://user:{secret}@host/path {after}"
    found = redacted(text, {})
    assert f":{secret}@" not in found and f"{scheme}://{HIDDEN}@host/path" in found


def test_values_of_secret_variables_are_hidden_and_others_stay():
    variables = {
        "AWS_SECRET_ACCESS_KEY": PLANTED,
        "WANDB_API_KEY": "w" * 40,
        "RAY_AUTH_TOKEN_PATH": "/home/me/token",
        "TOKENIZERS_PARALLELISM": "falsefalse",
        "DB_PASSWORD": "short",
        "HOME": "/home/me",
    }
    text = f"{PLANTED} {'w' * 40} /home/me/token falsefalse short"
    assert redacted(text, variables) == f"{HIDDEN} {HIDDEN} /home/me/token falsefalse short"


def test_the_books_of_a_run_hide_what_an_error_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PLANTED)
    ledger = Ledger(Storage(str(tmp_path)), "r", parse_config(TINY, "x"))
    ledger.event("problem", detail=f"no answer from http://me:other-{PLANTED}@host/api, login me {PLANTED}")
    ledger.say(f"tried {PLANTED}")
    ledger.update(message=f"gave up with {PLANTED}")
    ledger.close()
    found = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"events.jsonl", "job.log", "status.json"} <= set(found)
    assert not [name for name, text in found.items() if PLANTED in text]
    assert "no answer from http://[hidden]@host/api" in found["events.jsonl"]
    assert ledger.lines(0) == [f"tried {HIDDEN}"]


def test_a_key_in_a_url_is_refused_at_the_command_line(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "code").mkdir()
    write_corpus(tmp_path / "code")
    url = WITH_SECRETS[0]
    for arguments in (
        ["submit", "tiny.yaml", "--storage", url],
        ["submit", "tiny.yaml", "--set", f"run.storage={url}"],
    ):
        refused = telar(tmp_path, *arguments, check=2)
        assert PLANTED not in refused.stdout + refused.stderr and "AWS_SECRET_ACCESS_KEY" in refused.stderr
    assert PLANTED not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_uploads_leave_out_keys_and_histories(tmp_path):
    """The same function of Ray that makes the package, on a copy of this repository's ignore file."""
    from ray._private.runtime_env.packaging import create_package

    (tmp_path / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    private = [".env", ".env.local", "a.pem", "deploy/b.key", "id_rsa", "id_rsa.pub", "id_ed25519", ".git/config"]
    kept = ["jobs/run.py", "configs/environment.yaml", "data/keys.py"]
    for name in private + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    create_package(str(tmp_path), tmp_path.parent / f"{tmp_path.name}.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path.parent / f"{tmp_path.name}.zip") as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert names - {".rayignore"} == set(kept)


# What runs what it reads. `ast.literal_eval`, `model.eval()` and `compile`, which only looks at code, do not.
LOADERS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
RUNNERS = {"eval", "exec"}


def dangers(text):
    """Why a source file may run what it reads, by line."""
    tree, found = ast.parse(text), []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in LOADERS]
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        true = {name for name, value in given.items() if isinstance(value, ast.Constant) and value.value is True}
        if called in RUNNERS:
            found.append(f"{node.lineno}: calls {called}")
        elif called == "torch.load" and "weights_only" not in true:
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        elif called in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            loader = ast.unparse(given["Loader"]) if "Loader" in given else ""
            if loader not in safe_loaders(tree):
                found.append(f"{node.lineno}: {called} with {loader or 'no'} loader")
        for name in ("allow_pickle", "trust_remote_code", "shell"):
            if name in true:
                found.append(f"{node.lineno}: {called} with {name}=True")
    return found


def safe_loaders(tree):
    """Names that a file may give to yaml.load: the safe loaders, and its own classes of one."""
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return safe | {node.name for node in classes if node.bases and {ast.unparse(base) for base in node.bases} <= safe}


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_is_read_is_run(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import numpy\nnumpy.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(t, Loader=yaml.Loader)",
        "import yaml\nyaml.load(t)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "eval(text)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_rule_finds_what_runs_what_it_reads(code):
    assert len(dangers(code)) == 1


def answer(url, token=None):
    """Status and text of a request to the dashboard."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=20) as found:
            return found.status, found.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


@pytest.mark.slow
def test_planted_keys_are_nowhere_after_a_run(tmp_path, monkeypatch):
    """Keys in the environment of a cluster, of its job and of the commands; a run, then all it left is searched."""
    (tmp_path / "code").mkdir()
    write_corpus(tmp_path / "code")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    # Short, so that Ray's own folder lies in it too.
    home = Path(tempfile.mkdtemp(prefix="telar-t-", dir="/tmp"))
    monkeypatch.setenv("TELAR_HOME", str(home))
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, f"{PLANTED}-{name}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PLANTED}@127.0.0.1:9")
    said = telar(tmp_path, "submit", "tiny.yaml", "--wait", "--set", "run.name=r", "--set", "train.steps=3", "--json")
    try:
        result = json.loads(said.stdout)
        token, url = (home / "token").read_text().strip(), result["dashboard_url"]
        assert [answer(f"{url}/api/jobs/", wrong)[0] for wrong in (None, "0" * 64)] == [401, 403]
        texts = {"submit": said.stdout + said.stderr}
        for verb in ("status", "list", "logs", "report"):
            done = telar(tmp_path, verb, *(() if verb == "list" else ("r",)))
            texts[verb] = done.stdout + done.stderr
        for path in ("/api/jobs/", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1", "/nodes?view=summary"):
            code, texts[path] = answer(url + path, token)
            assert code == 200, f"{path}: {texts[path][:500]}"
        assert '"status_page"' in texts["/api/jobs/"] and "r/controller" in texts["/api/v0/actors?detail=1"]
        for folder in (tmp_path / "runs", home):
            for path in folder.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    texts[str(path)] = path.read_bytes().decode(errors="replace")
        for wanted in ("config.yaml", "job.json", "events.jsonl", "report.html", "rank-00000.log", "MANIFEST.json"):
            assert any(name.endswith(wanted) for name in texts), f"{wanted} was not searched"
        assert sum("/session_" in name for name in texts) > 20, "Ray's own logs were not searched"
        assert [name for name, text in texts.items() if PLANTED in text] == []
        assert [name for name, text in texts.items() if token in text] == [str(home / "token")]
    finally:
        telar(tmp_path, "down", "--force")
        shutil.rmtree(home)


def test_the_lock_names_one_version_of_everything():
    """What an audit is run over; nothing may come in another version than the one that was looked at."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert all("==" in line for line in lines) and len(set(names)) == len(names) > 50
