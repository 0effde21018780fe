"""A run that draws, through Ray: codebook, data, training, evaluation, report, picture; and a stop while it begins."""

import json
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cluster.storage import Storage
from data.manifest import Manifest
from jobs.codebook import load_codebook
from jobs.references import references
from tests.test_end_to_end import events, telar, wait_for
from tests.test_text_to_image import SIDE, tree, write_squares

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draw")
    write_squares(folder)
    sections = tree(folder)
    sections["run"] = {"seed": 1}
    sections["images"]["steps"] = 40
    sections["train"]["steps"] = 4
    sections["evaluate"] = {"likelihood_records": 8, "max_new_tokens": 17, "samples": 2}
    (folder / "draw.yaml").write_text(yaml.safe_dump(sections))
    return folder


def test_a_run_that_draws_goes_the_whole_way(project, embedded_ray):
    telar(project, "submit", "draw.yaml", "--set", "run.name=art", "--wait")
    found = events(project, "art")
    assert [e["stage"] for e in found if e["event"] == "stage_finished"] == [
        *("codebook", "prepare", "train", "evaluate", "report")
    ]
    storage = Storage(str(project / "runs"))
    refers = references(storage.child("art"))
    manifest, codebook = Manifest.read(storage, refers["data"]), load_codebook(storage, refers["codebook"])
    (trained,) = [e for e in found if e["event"] == "codebook_trained"]
    assert trained["folder"] == refers["codebook"] and trained["digest"] == manifest.codebook_digest
    assert 0 < trained["figures"]["held-out"]["codes_used"] <= 16
    (cell,) = json.loads((project / "runs/art/evaluation/results.json").read_text())["cells"]
    assert [metric["name"] for metric in cell["metrics"]] == ["nll", "next_token"]

    said = telar(project, "generate", "art", "draw: a red square 0", "--out", "red.png", "--json", "--temperature", "2")
    codes = json.loads(said.stdout)["codes"]
    with Image.open(project / "red.png") as image:
        assert image.size == (SIDE, SIDE) and image.mode == "RGB"
        drawn = np.asarray(image).astype(int)
    wanted = codebook.decode(torch.tensor([codes]))[0].permute(1, 2, 0).numpy() * 255
    assert len(codes) == 16 and np.abs(drawn - wanted).max() <= 0.501

    telar(project, "submit", "draw.yaml", "--set", "run.name=again", "--stage", "prepare", "--wait")
    skipped = [e["stage"] for e in events(project, "again") if e["event"] == "stage_skipped"]
    assert skipped == ["codebook", "prepare"]


def test_a_stop_is_heard_while_the_codebook_is_trained(project, embedded_ray):
    telar(project, "submit", "draw.yaml", "--set", "run.name=halted", "--set", "images.steps=1000000")
    wait_for(lambda: (project / "runs/halted/status.json").is_file(), "the run")
    status = project / "runs/halted/status.json"
    wait_for(lambda: json.loads(status.read_text())["stage"] == "codebook", "the codebook stage")
    started = time.monotonic()
    telar(project, "stop", "halted")
    assert json.loads(status.read_text())["state"] == "stopped" and time.monotonic() - started < 60
    names = [e["event"] for e in events(project, "halted")]
    assert "codebook_trained" not in names and "stage_finished" not in names
