"""Pictures as files and as tensors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# What data sets hold. Pillow knows more; of these, EPS starts Ghostscript on whatever program the file contains.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# What stands a picture upright, by its EXIF orientation. ImageOps.exif_transpose also writes the other EXIF data anew
# and stops at those that are broken, which says nothing about the pixels.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def from_bytes(picture: bytes, side: int) -> Tensor | None:
    """The middle square of a picture in one of `FORMATS`; uint8 `[3, side, side]`, or None when it is none.

    Turned as its EXIF data say, on white where it is transparent, the first frame of several, scaled.
    """
    try:
        with Image.open(io.BytesIO(picture), formats=FORMATS) as opened:
            turn = UPRIGHT.get(opened.getexif().get(ExifTags.Base.Orientation))
            # Grey of 16 bits, which Pillow would cut off at 255, and everything else.
            image = _grey(opened) if opened.mode.startswith("I") else opened.convert("RGBA")
    # Pillow raises SyntaxError for some broken files, and RuntimeError for broken AVIF.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError):
        return None
    if turn is not None:
        image = image.transpose(turn)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image).convert("RGB")
    if flat.size != (side, side):
        flat = ImageOps.fit(flat, (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(flat).copy()).permute(2, 0, 1)


def _grey(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGBA")


def write_png(pixels: Tensor, path: str) -> None:
    """Write float `[3, side, side]` in [0, 1] as a PNG; raises OSError where that cannot be."""
    content = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    with Path(path).open("wb") as file:
        Image.fromarray(content).save(file, format="PNG")
