"""The picture tokenizer: nearest codes, straight-through gradients, moving averages, and that it learns."""

import gzip

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.images import Codebook, ImageShape, ImageTokenizer, codebook_use
from tests.test_layout import ROOT

MNIST = ROOT.parent / "shared" / "datasets" / "mnist-t10k" / "t10k-images-idx3-ubyte.gz"
SHAPE = ImageShape(side=16, channels=3, halvings=2, codes=32, width=16, code_width=4)


def pictures(count, seed=0, side=16):
    """A disc or a square of a random colour on a random ground."""
    random = torch.Generator().manual_seed(seed)
    colours = torch.rand(count, 2, 3, 1, 1, generator=random)
    centre = torch.randint(4, side - 4, (count, 2, 1, 1), generator=random)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    dy, dx = (y - centre[:, 0]).abs(), (x - centre[:, 1]).abs()
    round_ones = torch.rand(count, 1, 1, generator=random) < 0.5
    inside = torch.where(round_ones, dy**2 + dx**2 <= 9, torch.maximum(dy, dx) <= 3).unsqueeze(1)
    return torch.where(inside, colours[:, 0], colours[:, 1])


def test_codes_are_the_nearest_entries():
    book = Codebook(SHAPE, 0)
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    assert (book.nearest(values) == torch.cdist(values, book.entries).argmin(1)).all()


def test_gradients_pass_straight_through():
    book = Codebook(SHAPE, 0).eval()
    values = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = book(values)
    weight = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((found.values * weight).sum(), values)
    assert (gradient == weight).all()
    torch.testing.assert_close(found.values[1, :, 2, 0], book.entries[found.codes[1, 2, 0]])
    torch.testing.assert_close(found.commitment, F.mse_loss(values, found.values.detach()))


def test_entries_move_towards_the_mean_of_their_values():
    book = Codebook(ImageShape(side=16, codes=2, code_width=1), 0)
    book.entries.copy_(torch.tensor([[-1.0], [1.0]]))
    book.sums.copy_(book.entries)
    book.updates += 1
    values = torch.tensor([-2.0, -3.0, 4.0, 4.0]).view(4, 1, 1, 1)
    for _ in range(600):
        book(values)
    torch.testing.assert_close(book.entries.flatten(), torch.tensor([-2.5, 4.0]), atol=1e-2, rtol=0)


def test_an_unused_entry_starts_anew_where_values_are():
    book = Codebook(ImageShape(side=16, codes=3, code_width=1), 0)
    book.entries.copy_(torch.tensor([[0.0], [1.0], [500.0]]))
    book.sums.copy_(book.entries)
    book.updates += 1
    values = torch.linspace(0, 1, 64).view(64, 1, 1, 1)
    for _ in range(500):
        book(values)
    assert book.entries.max() < 2 and len(book(values).codes.unique()) == 3


def test_decoding_codes_equals_the_reconstruction():
    model = ImageTokenizer(SHAPE).eval()
    images = pictures(5)
    codes = model.encode(images)
    assert codes.shape == (5, 16) and codes.dtype == torch.int64
    torch.testing.assert_close(model.decode(codes), model(images)[0].clamp(0, 1))
    assert (model.encode(images[3:4]) == codes[3:4]).all()
    with pytest.raises(ValueError, match="16 tokens, 15"):
        model.decode(codes[:, :15])
    with pytest.raises(ValueError, match="halved"):
        ImageShape(side=30)


def trained(shape, images, steps, batch=32, rate=3e-3):
    model, random = ImageTokenizer(shape), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (batch,), generator=random)
        optimizer.zero_grad()
        model.loss(images[chosen]).backward()
        optimizer.step()
    return model.eval()


def error_share(model, images):
    """Squared error of reconstructions over that of the mean picture."""
    with torch.no_grad():
        return (F.mse_loss(model.decode(model.encode(images)), images) / images.var(0, unbiased=False).mean()).item()


def test_it_learns_pictures_it_has_not_seen():
    model, fresh = trained(SHAPE, pictures(2000), 400), pictures(200, seed=1)
    assert error_share(model, fresh) < 0.5
    use = codebook_use(model.encode(fresh), SHAPE.codes)
    assert use.used >= 0.75 * SHAPE.codes and use.perplexity >= 0.4 * SHAPE.codes


def test_use_of_a_codebook_is_counted():
    assert codebook_use(torch.tensor([[0, 1], [2, 3]]), 8) == (4, pytest.approx(4.0))
    assert codebook_use(torch.tensor([5, 5, 5]), 8) == (1, pytest.approx(1.0))


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason=f"{MNIST} is absent")
def test_it_learns_handwritten_digits():
    raw = np.frombuffer(gzip.decompress(MNIST.read_bytes()), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    images = torch.from_numpy(raw.copy()).float() / 255
    shape = ImageShape(side=28, channels=1, halvings=2, codes=64, width=32, code_width=8)
    model = trained(shape, images[:8000], 400)
    assert error_share(model, images[8000:]) < 0.35
    assert codebook_use(model.encode(images[8000:]), 64).used >= 48
