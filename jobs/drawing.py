"""Pictures from a model: image codes chosen place by place, and the pixels that a codebook makes of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model.generation import Choose, generate, most_probable
from model.images import ImageTokenizer
from model.transformer import Transformer


def picture_codes(
    model: Transformer,
    tokenizer: Tokenizer,
    codebook: ImageTokenizer,
    prompts: Sequence[Sequence[int]],
    choose: Choose = most_probable,
) -> Tensor:
    """Codes of a picture for each prompt, int64 `[prompts, codes]`; only image codes can be chosen, a picture full."""
    codes = torch.tensor(tokenizer.image_codes)

    def choose_code(logits: Tensor, rows: Sequence[int], at: int) -> Tensor:
        return codes[choose(logits[:, codes], rows, at)]

    outputs = generate(model, prompts, tokenizer.bos_id, [], codebook.shape.tokens, choose_code)
    return torch.tensor([tokenizer.decode_codes(output) for output in outputs])


def draw_pictures(
    model: Transformer, tokenizer: Tokenizer, codebook: ImageTokenizer, prompts: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Answers to `Draw` requests, in the form that `jobs.tasks.base` gives."""
    codes = picture_codes(model, tokenizer, codebook, prompts)
    with torch.no_grad():
        pixels = (codebook.decode(codes) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [
        {
            "codes": row.tolist(),
            "side": codebook.shape.side,
            "pixels": base64.b64encode(picture.contiguous().numpy().tobytes()).decode(),
            "tokens": len(row),
        }
        for row, picture in zip(codes, pixels, strict=True)
    ]


def pixels_of(answer: dict[str, Any]) -> np.ndarray:
    """The picture of an answer to `Draw`, uint8 `[side, side, 3]`."""
    side = answer["side"]
    return np.frombuffer(base64.b64decode(answer["pixels"]), dtype=np.uint8).reshape(side, side, 3)
