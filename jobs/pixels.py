"""Pictures as files and as tensors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def from_bytes(picture: bytes, side: int) -> Tensor | None:
    """The middle square of a picture in any format that Pillow reads; uint8 `[3, side, side]`, or None when it is none.

    Turned as its EXIF data say, on white where it is transparent, the first frame of several, scaled.
    """
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                # Grey of 16 bits, which Pillow would cut off at 255.
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            image = image.convert("RGBA")
    # Pillow raises SyntaxError for some broken files.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image).convert("RGB")
    if flat.size != (side, side):
        flat = ImageOps.fit(flat, (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(flat).copy()).permute(2, 0, 1)


def write_png(pixels: Tensor, path: str) -> None:
    """Write float `[3, side, side]` in [0, 1] as a PNG; raises OSError where that cannot be."""
    content = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    with Path(path).open("wb") as file:
        Image.fromarray(content).save(file, format="PNG")
