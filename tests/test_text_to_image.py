"""Captions to pictures, the whole way: codebook, preparation, training, a PNG; and what is refused on it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from cluster.storage import Storage
from configs.errors import ConfigError
from configs.load import parse_config
from data.manifest import Manifest
from data.opener import plain_opener
from data.pictures import pictures
from data.reader import SampleReader
from data.tokenizer import read_tokenizer
from jobs.answers import ModelAnswers
from jobs.cli import cli
from jobs.codebook import load_codebook
from jobs.loading import load_trained
from jobs.pixels import from_bytes
from jobs.references import references
from jobs.tasks.base import Generate, LogLikelihood

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 220), "yellow": (240, 230, 30)}
SIDE = 16


def tree(folder):
    corpus = {
        "name": "squares",
        "kind": "parquet",
        "path": str(folder / "squares.parquet"),
        "source": "draw: {caption}",
        "target": "{image:picture}",
    }
    return {
        "run": {"seed": 1, "storage": str(folder / "runs"), "name": "demo"},
        "cluster": {"device": "cpu"},
        "data": {
            "corpora": [corpus],
            "tokenizer": {"vocabulary_size": 320, "image_codes": 16, "prefixes": ["draw: "]},
            "packing": "none",
            "source_tokens": 16,
            "target_tokens": 24,
            "held_out_fraction": 0.2,
        },
        "images": {"side": SIDE, "halvings": 2, "codes": 16, "width": 16, "steps": 300, "batch": 16},
        "model": {"d_model": 32, "heads": 2, "d_ff": 64, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0},
        "optimizer": {"schedule": "constant", "learning_rate": 0.005, "warmup_steps": 20},
        "train": {"steps": 150, "global_batch_sequences": 16, "micro_batch_sequences": 16, "label_smoothing": 0.0},
        "checkpoint": {"every_steps": 1000},
    }


def png(colour, shade):
    pixels = np.clip(np.array(colour) + shade, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE, 3), pixels)).save(file, format="PNG")
    return file.getvalue()


def write_squares(folder, more=0):
    rows = [
        {"caption": f"a {name} square {shade}", "picture": png(colour, shade)}
        for name, colour in COLOURS.items()
        for shade in range(-12, 13 + more)
    ]
    rows.append({"caption": "a broken one", "picture": b"no picture"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "squares.parquet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_squares(folder)
    (folder / "demo.yaml").write_text(yaml.safe_dump(tree(folder)))
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train_local", "demo.yaml"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, parse_config(tree(folder), "test"), done.stdout


def loaded(trained):
    _, config, _ = trained
    storage = Storage(config.run.storage)
    refers = references(storage.child("demo"))
    return storage, Manifest.read(storage, refers["data"]), load_codebook(storage, refers["codebook"])


def test_captions_become_pictures_of_their_colour(trained):
    folder, config, _ = trained
    _, _, codebook = loaded(trained)
    for name in COLOURS:
        file = folder / f"{name}.png"
        result = CliRunner().invoke(
            cli, ["generate", f"{config.run.storage}/demo", f"draw: a {name} square 0", "--out", str(file), "--json"]
        )
        assert result.exit_code == 0, result.output
        said = json.loads(result.output)
        with Image.open(file) as image:
            assert image.size == (SIDE, SIDE) and image.format == "PNG"
            pixels = np.asarray(image).astype(float)
        wanted = codebook.decode(torch.tensor([said["codes"]]))[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(pixels - wanted).max() <= 0.5001
        mean = pixels.mean(axis=(0, 1))
        distances = {other: np.abs(mean - np.array(rgb)).sum() for other, rgb in COLOURS.items()}
        assert min(distances, key=distances.get) == name and distances[name] < 60, distances


def test_shards_hold_the_codes_of_the_pictures_that_are_not_held_out(trained):
    _, config, output = trained
    storage, manifest, codebook = loaded(trained)
    assert "codes are used" in output
    kept = [picture for picture, held_out in pictures(config, storage) if not held_out]
    pixels = [p for picture in kept if (p := from_bytes(picture, SIDE)) is not None]
    wanted = codebook.encode(torch.stack(pixels).float() / 255).tolist()
    tokenizer = read_tokenizer(storage, manifest)
    reader = SampleReader(manifest, config, plain_opener(storage, manifest))
    (corpus,) = manifest.corpora
    found = []
    for row in range(corpus.rows):
        *_, labels, _ = reader.row(0, row)
        assert labels[-1] == tokenizer.eos_id
        found.append(tokenizer.decode_codes(labels[:-1]))
    assert sorted(found) == sorted(wanted) and len(set(map(tuple, wanted))) > 3
    assert corpus.counts["records with an empty source or target"] == 1, "the broken picture is counted"


def test_held_out_pictures_are_scored_and_made_in_evaluation(trained):
    _, config, _ = trained
    found = load_trained(Storage(config.run.storage), "demo", config)
    answers = ModelAnswers(found.model, found.tokenizer, config)
    red, blue = "draw: a red square 0", "draw: a blue square 0"
    codes = answers.answer("squares", [Generate(red)], 17)[0]["text"]
    assert len(codes.split()) == 16
    own, other = answers.answer("squares", [LogLikelihood(red, codes), LogLikelihood(blue, codes)], 17)
    assert len(own["labels"]) == 17 and sum(own["nll"]) < sum(other["nll"]) and own["bytes"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draw: x", "--beams", "2"], "--beams: pictures are drawn token by token"),
        ([" "], "TEXT is empty"),
        (["a red square 0"], "draws what follows 'draw: '"),
        (["one", "two"], "--out: one TEXT makes one picture, 2 were given"),
    ],
)
def test_senseless_requests_are_refused(trained, arguments, message, tmp_path):
    file = tmp_path / "x.png"
    result = CliRunner().invoke(cli, ["generate", f"{trained[1].run.storage}/demo", *arguments, "--out", str(file)])
    assert result.exit_code != 0 and message in str(result.exception or result.output)
    assert not file.exists()


@pytest.mark.parametrize(
    ("name", "message"), [("x.jpg", "ends in .png"), ("nowhere/x.png", "the folder of"), ("x.png", "no section images")]
)
def test_files_and_runs_without_pictures_are_refused(trained, name, message, tmp_path):
    run = "demo"
    if message == "no section images":
        run, texts = "texts", tree(tmp_path)
        del texts["images"]
        texts["data"]["corpora"][0]["target"] = "{caption}"
        (trained[0] / "runs" / run).mkdir()
        (trained[0] / "runs" / run / "config.yaml").write_text(yaml.safe_dump(texts))
    place = f"{trained[1].run.storage}/{run}"
    result = CliRunner().invoke(cli, ["generate", place, "draw: x", "--out", str(tmp_path / name)])
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)


def test_pictures_are_counted_where_people_read(trained):
    _, config, _ = trained
    shown = CliRunner().invoke(cli, ["inspect", f"{config.run.storage}/demo", "--at", "3"]).output
    assert "<image: 16 codes>" in shown and "<image_" not in shown
    answer = CliRunner().invoke(cli, ["generate", f"{config.run.storage}/demo", "draw: a red square 0", "--json"])
    assert json.loads(answer.output)["outputs"][0]["text"] == "<image: 16 codes>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("images"), "images: corpus 'squares' has pictures as targets; add a section images"),
        (lambda t: t["data"]["tokenizer"].pop("image_codes"), "set data.tokenizer.image_codes to 16"),
        (lambda t: t["data"].update(target_tokens=16), "set data.target_tokens to 17 or more"),
        (lambda t: t["images"].update(side=18), "18 pixels cannot be halved 2 times; choose a multiple of 4"),
        (lambda t: t["data"]["corpora"][0].update(kind="jsonl"), "kind must be parquet, arrow, hf or shapes"),
        (lambda t: t["data"]["corpora"][0].update(source=""), "needs a source template"),
        (lambda t: t["data"]["corpora"][0].update(target="{caption}"), "no corpus has a target {image:COLUMN}"),
        (lambda t: t["data"].update(layout="sequence", target_tokens=17), "set data.target_tokens to 18 or more"),
        (lambda t: t["data"].update(layout="sequence", packing="chunk"), "data.packing: chunk would cut pictures"),
        (lambda t: t["data"]["corpora"][0].update(target="a {image:picture}"), "target: 'a {image:picture}' has a pic"),
        (lambda t: t["data"]["corpora"][0].update(source="{image:picture}"), "source: '{image:picture}' has a pic"),
        (lambda t: t["data"]["corpora"][0].update(task="translation"), "task: translation compares texts"),
        (lambda t: t["data"]["corpora"][0].update(target_characters=[1, 9]), "target_characters: a picture has no"),
        (lambda t: t["data"]["corpora"][0].update(held_out_key="picture"), "held_out_key: 'picture' is the picture"),
    ],
)
def test_configurations_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    wrong = tree(tmp_path)
    change(wrong)
    with pytest.raises(ConfigError) as caught:
        parse_config(wrong, "test")
    assert message in str(caught.value)
