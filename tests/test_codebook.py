"""The codebook of a run: which pictures it is trained on, what it is stored under, and what damage is noticed."""

import io
import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from cluster.storage import Storage
from configs.errors import DataError
from configs.load import load_config, parse_config
from data.held_out import share_of
from data.inputs import codebook_digest, data_digest, list_inputs
from data.pictures import LowestKeys
from data.prepare import prepare
from data.runners import serial
from jobs.codebook import FACTS, codebook_facts, described, ensure_codebook, load_codebook
from jobs.pixels import from_bytes
from tests.test_layout import ROOT
from tests.test_text_to_image import png, tree, write_squares


def silent(_line):
    pass


def make(folder, **images):
    """A configuration whose codebook takes three steps."""
    sections = tree(folder)
    sections["images"].update({"steps": 3, **images})
    return parse_config(sections, "test")


def train(folder, name="runs", lines=None, **images):
    """Storage and encoder of a codebook trained in this process."""
    storage = Storage(str(folder / name))
    report = silent if lines is None else lines.append
    return storage, ensure_codebook(make(folder, **images), storage, serial, report)


def test_a_codebook_is_made_once_and_told_about(tmp_path):
    write_squares(tmp_path)
    lines = []
    storage, encoder = train(tmp_path, lines=lines)
    facts = codebook_facts(storage, encoder.folder)
    assert lines[1:] == described(facts) and "1 pictures cannot be decoded" in lines[-1]
    assert facts["pictures"] + facts["figures"]["held-out"]["pictures"] == 100
    model, content = load_codebook(storage, encoder.folder), png((200, 30, 30), 4)
    assert encoder(content) == model.encode(from_bytes(content, 16)[None].float() / 255)[0].tolist()
    assert encoder(b"no picture") is None
    again = []
    assert train(tmp_path, lines=again)[1] == encoder and again == []
    assert train(tmp_path, "elsewhere")[1].digest == encoder.digest


def test_what_is_held_out_anywhere_is_not_trained_on(tmp_path):
    names, colours = ("train", "test"), [(i * 9, 255 - i * 9, 40) for i in range(20)]
    rows = [{"caption": names[i % 4 == 0], "picture": png(colour, 0)} for i, colour in enumerate(colours)]
    # The first, which is held out, is in a training record too, and one stands twice.
    rows += [{"caption": "train", "picture": png(colours[0], 0)}, {"caption": "train", "picture": png(colours[1], 0)}]

    def facts(name, order, **images):
        pq.write_table(pa.Table.from_pylist([rows[i] for i in order]), tmp_path / "squares.parquet")
        sections = tree(tmp_path)
        sections["data"]["corpora"][0]["held_out_key"] = "caption"
        sections["data"]["held_out_fraction"] = 0.7
        sections["images"].update({"steps": 3, **images})
        storage = Storage(str(tmp_path / name))
        return codebook_facts(storage, ensure_codebook(parse_config(sections, "x"), storage, serial, silent).folder)

    found = facts("a", range(22))
    assert found["pictures"] == 15 and found["figures"]["held-out"]["pictures"] == 5
    assert facts("b", np.random.default_rng(0).permutation(22).tolist()) == found, "the order of records matters"
    assert facts("c", range(22), most_pictures=6)["pictures"] <= 6


@given(st.lists(st.integers(0, 50)), st.integers(1, 20))
@settings(deadline=None)
def test_the_lowest_keys_are_kept(keys, most):
    kept = LowestKeys(most)
    for key in keys:
        if kept.wants(key):
            kept.add(key, str(key))
    assert kept.items() == [(key, str(key)) for key in sorted(set(keys))[:most]]


def test_the_digest_follows_section_seed_and_pictures(tmp_path):
    write_squares(tmp_path)

    def digests(config):
        return codebook_digest(config, list_inputs(config)), data_digest(config)

    base = make(tmp_path)
    other = base.model_copy(update={"run": base.run.model_copy(update={"seed": 2})})
    found = [digests(config) for config in (base, make(tmp_path, steps=4), other)]
    texts = tree(tmp_path)
    texts["images"]["steps"] = 3
    texts["data"]["corpora"][0]["source"] = "draw: one {caption}"
    codebook, data = digests(parse_config(texts, "test"))
    assert codebook == found[0][0] and data != found[0][1], "captions are no part of a codebook"
    write_squares(tmp_path, more=1)
    found.append(digests(base))
    assert len({codebook for codebook, _ in found}) == len({data for _, data in found}) == 4


def test_damage_is_noticed(tmp_path):
    write_squares(tmp_path)
    storage, encoder = train(tmp_path)
    weights = f"{encoder.folder}/{encoder.digest}.safetensors"
    whole = storage.read_bytes(weights)
    storage.write_bytes(weights, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match="do not match their digest"):
        load_codebook(storage, encoder.folder)
    storage.remove(weights)
    with pytest.raises(DataError, match="weights are missing"):
        load_codebook(storage, encoder.folder)
    storage.write_bytes(weights, whole)
    with pytest.raises(DataError, match="are codes of another"):
        load_codebook(storage, encoder.folder, "another")
    storage.remove(f"{encoder.folder}/{FACTS}")
    with pytest.raises(DataError, match="holds no codebook"):
        load_codebook(storage, encoder.folder)


def test_prepared_pictures_keep_to_their_codebook(tmp_path):
    write_squares(tmp_path)
    storage, encoder = train(tmp_path)
    config = make(tmp_path)
    manifest = prepare(config, storage, serial, silent, encoder)
    assert manifest.codebook_digest == encoder.digest
    assert prepare(config, storage, serial, silent, encoder).digest == manifest.digest
    retrained = type(encoder)(encoder.storage_url, encoder.folder, "another")
    with pytest.raises(DataError, match=f"codes of codebook {encoder.digest}, the one there now is another"):
        prepare(config, storage, serial, silent, retrained)


def test_of_two_that_train_at_once_the_first_stays(tmp_path):
    write_squares(tmp_path)
    storage = Storage(str(tmp_path / "runs"))
    first = {"digest": "first", "shape": {"codes": 16}, "figures": {}, "undecodable": 0}

    def other_was_faster(function, arguments, done=None):
        storage.write_text(f"{arguments[0][0].folder}/{FACTS}", json.dumps(first))
        return serial(function, arguments)

    encoder = ensure_codebook(make(tmp_path), storage, other_was_faster, silent)
    assert encoder.digest == "first" and storage.names(encoder.folder) == [FACTS]


def test_columns_without_pictures_are_named(tmp_path):
    table = pa.table({"caption": ["a", "b"] * 20, "picture": [b"no picture"] * 40})
    pq.write_table(table, tmp_path / "squares.parquet")
    with pytest.raises(DataError, match=r"images: the columns \['picture'\] hold no picture"):
        train(tmp_path)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_pixels_are_the_middle_square_on_white():
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = (10, 200, 30)
    middle = from_bytes(encoded(Image.fromarray(wide)), 16)
    assert (middle == torch.tensor([10, 200, 30]).view(3, 1, 1)).all()
    assert (from_bytes(encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 0))), 16) == 255).all()
    grey = Image.fromarray(np.full((16, 16), 0x8040, np.uint16))
    assert (from_bytes(encoded(grey), 16) == 0x80).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_turned_as_the_camera_says(orientation):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(picture, exif=exif)
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert (from_bytes(content, 16).permute(1, 2, 0).numpy() == expected).all()


def test_broken_exif_data_leave_a_picture_a_picture():
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription], exif[ExifTags.Base.Orientation] = "some words", 6
    whole = encoded(Image.new("RGB", (16, 16), (255, 255, 255)), "JPEG", exif=exif)
    # The words become a width, which is a number.
    broken = whole.replace(*(struct.pack(">H", tag) for tag in (0x010E, 0x0100)))
    assert broken != whole and (from_bytes(broken, 16) > 250).all()


def test_a_broken_avif_and_a_program_are_no_pictures():
    whole = encoded(Image.new("RGB", (16, 16)), "AVIF")
    assert from_bytes(whole, 16) is not None and from_bytes(whole.replace(b"av01", b"\0\0\0\0"), 16) is None
    assert from_bytes(encoded(Image.new("RGB", (16, 16)), "EPS"), 16) is None, "Ghostscript would be started"


def test_the_gallery_holds_out_the_emoji_that_are_for_testing():
    data = load_config(ROOT / "configs" / "text_to_image.yaml").data
    assert data.corpora[0].held_out_key == "split"
    held_out = {split for split in ("train", "validation", "test") if share_of(split) < data.held_out_fraction}
    assert held_out == {"test"}
