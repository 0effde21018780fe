"""A small vector-quantised autoencoder (van den Oord et al. 2017): pictures become tokens, and tokens pictures again.

The encoder halves the side twice or more; each place of what remains is replaced by its nearest codebook entry, whose
number is the token. Gradients pass the quantisation straight through; the codebook follows the encoder's outputs by
moving averages (section 3.2 and appendix A.1 of the paper), and entries that nothing uses are set anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.seeds import generator

COMMITMENT = 0.25
DECAY = 0.99
# Entries that hold less than this share of an even distribution are replaced by current encoder outputs.
DEAD_SHARE = 0.03


@dataclass(frozen=True)
class ImageShape:
    """Sizes of pictures and codes: a `side` x `side` picture of `channels` becomes (side / 2^halvings)^2 tokens.

    Raises ValueError where the side cannot be halved so often.
    """

    side: int = 32
    channels: int = 3
    halvings: int = 2
    codes: int = 256
    width: int = 64
    code_width: int = 16

    def __post_init__(self) -> None:
        if self.side % 2**self.halvings or self.halvings < 1:
            raise ValueError(
                f"side: {self.side} pixels cannot be halved {self.halvings} times; choose a multiple of it"
            )

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.side // 2**self.halvings

    @property
    def tokens(self) -> int:
        """Tokens of a picture, row by row."""
        return self.grid**2


class Quantised(NamedTuple):
    """`values` as `codes` stand for them, `[batch, code_width, grid, grid]`, with the gradient of the encoder's output;
    `codes` int64 `[batch, grid, grid]`; `commitment` how far the encoder's outputs are from their entries, a scalar.
    """

    values: Tensor
    codes: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """Entries `[codes, code_width]`, moved by averages while training; no gradient reaches them."""

    def __init__(self, shape: ImageShape, seed: int) -> None:
        super().__init__()
        entries = torch.empty(shape.codes, shape.code_width).normal_(generator=generator(seed, "codebook"))
        self.seed = seed
        self.register_buffer("entries", entries)
        self.register_buffer("counts", torch.ones(shape.codes))
        self.register_buffer("sums", entries.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def nearest(self, values: Tensor) -> Tensor:
        """Number of the entry nearest to each value, int64 `[n]`; values `[n, code_width]`."""
        distances = self.entries.square().sum(1) - 2.0 * values @ self.entries.T
        return distances.argmin(1)

    def forward(self, values: Tensor) -> Quantised:
        """Quantise `[batch, code_width, grid, grid]`; in training mode the entries follow."""
        flat = values.permute(0, 2, 3, 1).flatten(0, 2)
        if self.training and self.updates == 0:
            self._start(flat.detach())
        codes = self.nearest(flat.detach())
        if self.training:
            self._follow(flat.detach(), codes)
        chosen = self.entries[codes].view(values.shape[0], *values.shape[2:], -1).permute(0, 3, 1, 2)
        commitment = F.mse_loss(values, chosen)
        straight_through = values + (chosen - values).detach()
        return Quantised(straight_through, codes.view(values.shape[0], *values.shape[2:]), commitment)

    @torch.no_grad()
    def _start(self, flat: Tensor) -> None:
        """Entries where the first values are: random ones may lie so far off that one of them takes everything."""
        picked = torch.randint(0, len(flat), (len(self.entries),), generator=generator(self.seed, "start"))
        spread = flat.std() * 0.1 + 1e-6
        noise = torch.empty(self.entries.shape).normal_(generator=generator(self.seed, "noise")).to(flat.device)
        self.entries.copy_(flat[picked.to(flat.device)] + noise * spread)
        self.sums.copy_(self.entries)
        self.counts.fill_(1.0)

    @torch.no_grad()
    def _follow(self, flat: Tensor, codes: Tensor) -> None:
        """Equations 6 to 8 of the paper's appendix, and a new start for entries that have died."""
        used = torch.zeros_like(self.counts).index_add_(0, codes, torch.ones_like(codes, dtype=flat.dtype))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, flat)
        self.counts.mul_(DECAY).add_(used, alpha=1 - DECAY)
        self.sums.mul_(DECAY).add_(sums, alpha=1 - DECAY)
        self.updates += 1
        dead = self.counts < DEAD_SHARE * self.counts.sum() / len(self.counts)
        if dead.any():
            random = generator(self.seed, "revive", int(self.updates))
            picked = torch.randint(0, len(flat), (int(dead.sum()),), generator=random).to(flat.device)
            mean = self.counts.sum() / len(self.counts)
            self.counts[dead] = mean
            self.sums[dead] = flat[picked] * mean
        self.entries.copy_(self.sums / self.counts.unsqueeze(1))


def _residual(width: int) -> nn.Module:
    return _Residual(
        nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))
    )


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class ImageTokenizer(nn.Module):
    """Pictures to codes and back; pictures are float `[batch, channels, side, side]` in [0, 1]."""

    def __init__(self, shape: ImageShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        width, down, up = shape.width, [], []
        for number in range(shape.halvings):
            down += [nn.Conv2d(shape.channels if number == 0 else width, width, 4, stride=2, padding=1), nn.ReLU()]
            last = number == shape.halvings - 1
            up += [nn.ReLU(), nn.ConvTranspose2d(width, shape.channels if last else width, 4, stride=2, padding=1)]
        self.encoder = nn.Sequential(*down, _residual(width), nn.Conv2d(width, shape.code_width, 1))
        self.codebook = Codebook(shape, seed)
        self.decoder = nn.Sequential(nn.Conv2d(shape.code_width, width, 3, padding=1), _residual(width), *up)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # He et al. 2015, for the ReLUs; every output of a transposed convolution gets a quarter of its inputs.
                fan_in = parameter[0].numel()
                bound = (6.0 / fan_in) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator(seed, "images", name))
            else:
                parameter.zero_()

    def forward(self, images: Tensor) -> tuple[Tensor, Quantised]:
        """Reconstructions (not clamped) and the quantisation between."""
        quantised = self.codebook(self.encoder(images * 2.0 - 1.0))
        return (self.decoder(quantised.values) + 1.0) / 2.0, quantised

    def loss(self, images: Tensor) -> Tensor:
        """Squared error of pixels over their variance plus the commitment term: equation 3 of the paper.

        Without the division dark pictures would let the commitment term win, and all codes become one.
        """
        images_again, quantised = self(images)
        error = F.mse_loss(images_again, images) / images.var().clamp(min=1e-4)
        return error + COMMITMENT * quantised.commitment

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes of pictures, int64 `[batch, tokens]`, row by row."""
        values = self.encoder(images * 2.0 - 1.0).permute(0, 2, 3, 1)
        return self.codebook.nearest(values.flatten(0, 2)).view(images.shape[0], -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures in [0, 1] of codes int64 `[batch, tokens]`; raises ValueError for another number of tokens."""
        grid = self.shape.grid
        if codes.shape[1] != self.shape.tokens:
            raise ValueError(f"a picture has {self.shape.tokens} tokens, {codes.shape[1]} were given")
        values = self.codebook.entries[codes].view(codes.shape[0], grid, grid, -1).permute(0, 3, 1, 2)
        return ((self.decoder(values) + 1.0) / 2.0).clamp(0.0, 1.0)


class CodebookUse(NamedTuple):
    """How much of a codebook is used: entries seen at all, and exp(entropy) of how often each was."""

    used: int
    perplexity: float


def codebook_use(codes: Tensor, size: int) -> CodebookUse:
    """Use of a codebook of `size` entries by `codes` (any shape)."""
    share = torch.bincount(codes.flatten(), minlength=size).double() / codes.numel()
    seen = share[share > 0]
    return CodebookUse(len(seen), float((-(seen * seen.log()).sum()).exp()))
