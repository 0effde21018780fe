"""Pictures as files and as tensors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


def from_bytes(picture: bytes, side: int) -> Tensor | None:
    """A picture in any format that Pillow reads, on white, scaled; uint8 `[3, side, side]`, or None when it is none."""
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            image = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return None
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image).convert("RGB")
    if flat.size != (side, side):
        flat = flat.resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(flat).copy()).permute(2, 0, 1)


def write_png(pixels: Tensor, path: str) -> None:
    """Write float `[3, side, side]` in [0, 1] as a PNG; raises OSError where that cannot be."""
    content = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    with Path(path).open("wb") as file:
        Image.fromarray(content).save(file, format="PNG")
