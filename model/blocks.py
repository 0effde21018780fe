"""Packed documents laid out in blocks: every document starts a block of its own, its last block may be part empty.

Block-sparse kinds count indices within documents; on this layout a block of queries needs whole blocks of keys at the
same distances in each document, wherever the document stands in its row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockLayout:
    """Where tokens `[batch, sequence]` go among `blocks` blocks of `size` places.

    `place` int64 `[batch * sequence]`: the place of each token in the flat `[blocks * size]`. `first` and `last` int64
    `[blocks]`: first and last block of the document that a block belongs to. `length` int64 `[blocks]`: tokens of that
    document. `number` int64 `[blocks]`: number of the block within its document. `document` int64 `[blocks]`.
    """

    size: int
    blocks: int
    place: Tensor
    first: Tensor
    last: Tensor
    length: Tensor
    document: Tensor
    documents: int

    @property
    def number(self) -> Tensor:
        """Number of each block within its document, int64 `[blocks]`."""
        return torch.arange(self.blocks, device=self.first.device) - self.first

    def index(self) -> Tensor:
        """Index within its document of each place, int64 `[blocks, size]`; those from `length` on hold no token."""
        return self.number.unsqueeze(1) * self.size + torch.arange(self.size, device=self.first.device)

    def spread(self, x: Tensor) -> Tensor:
        """`[batch, heads, sequence, width]` -> `[blocks, heads, size, width]`, zeros where there is no token."""
        heads, width = x.shape[1], x.shape[3]
        flat = x.transpose(1, 2).reshape(-1, heads, width)
        laid = flat.new_zeros(self.blocks * self.size, heads, width).index_copy(0, self.place, flat)
        return laid.view(self.blocks, self.size, heads, width).transpose(1, 2)

    def gather(self, blocks: Tensor, batch: int) -> Tensor:
        """The inverse of `spread`: `[blocks, heads, size, width]` -> `[batch, heads, sequence, width]`."""
        heads, width = blocks.shape[1], blocks.shape[3]
        flat = blocks.transpose(1, 2).reshape(-1, heads, width)[self.place]
        return flat.view(batch, -1, heads, width).transpose(1, 2)


def lay_out(segments: Tensor, size: int) -> BlockLayout:
    """The layout of packed rows; `segments` int `[batch, sequence]`, the tokens of a segment stand together.

    Padding (segment 0) is laid out like a document of its own, so that every token has a place.
    """
    batch, width = segments.shape
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first_token = starts.flatten().nonzero().squeeze(-1)
    ends = torch.cat((first_token[1:], first_token.new_tensor([batch * width])))
    length = ends - first_token
    blocks_of = (length + size - 1) // size
    last_block = blocks_of.cumsum(0)
    first_block = last_block - blocks_of
    document_of_token = starts.flatten().cumsum(0) - 1
    index = torch.arange(batch * width, device=segments.device) - first_token[document_of_token]
    place = first_block[document_of_token] * size + index
    document = torch.repeat_interleave(torch.arange(len(length), device=segments.device), blocks_of)
    return BlockLayout(
        size=size,
        blocks=len(document),
        place=place,
        first=first_block[document],
        last=last_block[document] - 1,
        length=length[document],
        document=document,
        documents=len(length),
    )
