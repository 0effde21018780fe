"""The model section: which transformer, how large, and which of the field's variants of each part."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from configs.section import Fraction, PositiveInt, Section


class AttentionSection(Section):
    """Which keys self-attention looks at; cross-attention looks at the whole source always."""

    kind: Literal["full", "window", "blocklog", "linear"] = Field(
        "full",
        description="full O(n^2); window O(n w); blocklog O(n log n): own block and blocks at power-of-two distance; "
        "linear O(n): elu + 1 in place of the softmax",
    )
    window_tokens: PositiveInt = Field(256, description="window: keys nearer than this are seen, tokens")
    global_tokens: int = Field(0, ge=0, description="window: first tokens of a document that all see and are seen by")
    block_tokens: PositiveInt = Field(128, description="blocklog: size of a block, tokens")


class ModelSection(Section):
    """A transformer; the defaults are the encoder-decoder of Vaswani et al. 2017, base size."""

    architecture: Literal["encoder_decoder", "decoder", "encoder"] = Field(
        "encoder_decoder",
        description="encoder_decoder; decoder: causal, without cross-attention (decoder_layers deep); encoder: "
        "bidirectional with a classifier on pooled outputs (encoder_layers deep)",
    )
    d_model: PositiveInt = Field(512, description="width of the residual stream")
    heads: PositiveInt = Field(8, description="attention heads; must divide d_model unless head_width is set")
    key_value_heads: PositiveInt | None = Field(
        None, description="heads of keys and values, each shared by heads / key_value_heads queries; default: heads"
    )
    head_width: PositiveInt | None = Field(
        None, description="width of a head; default: d_model / heads (pruned models have fewer heads of that width)"
    )
    d_ff: PositiveInt = Field(2048, description="width of the feed-forward layer")
    encoder_layers: PositiveInt = Field(6, description="layers of the encoder")
    decoder_layers: PositiveInt = Field(6, description="layers of the decoder")
    dropout: Fraction = Field(0.1, description="dropout of sub-layer outputs and of embeddings, a probability")
    attention_dropout: Fraction = Field(0.0, description="dropout of attention weights, a probability; kind full only")
    attention: AttentionSection = Field(default_factory=AttentionSection)
    positions: Literal["sinusoidal", "learned", "rotary"] = Field(
        "sinusoidal", description="how the order of tokens enters: added to embeddings, or rotary in self-attention"
    )
    max_positions: PositiveInt = Field(1024, description="rows of the table of learned positions")
    rotary_base: float = Field(10000.0, gt=1.0, description="base of rotary wavelengths")
    norm: Literal["layer", "rms"] = Field("layer", description="LayerNorm or RMSNorm")
    norm_placement: Literal["post", "pre"] = Field(
        "post", description="post: after the residual sum, as in the paper; pre: before each sub-layer and at the end"
    )
    norm_eps: float = Field(1e-5, gt=0.0, description="added to the variance in norms")
    feed_forward: Literal["relu", "gelu", "swiglu"] = Field("relu", description="swiglu has a third matrix, the gate")
    bias: bool = Field(True, description="biases in linear layers")
    scale_embeddings: bool = Field(True, description="embeddings times sqrt(d_model), section 3.4 of the paper")
    tie_embeddings: bool = Field(True, description="the output projection is the embedding matrix")
    initialisation: Literal["xavier", "normal"] = Field(
        "xavier",
        description="xavier: uniform by fan-in and fan-out; normal: N(0, 0.02), projections onto the residual stream "
        "divided by sqrt(2 layers) (Radford et al. 2019)",
    )
    init_from: str | None = Field(
        None,
        description="hf:DIR, a directory of transformers in Llama's layout (any fsspec URL) whose weights the run "
        "starts from; sizes, kinds and tokenizer that are not given are taken from it",
    )
    classes: PositiveInt | None = Field(
        None, description="encoder: classes that the head tells apart; default: as many as labels, else 2"
    )
    labels: tuple[str, ...] = Field(
        (),
        description="encoder: the targets that stand for the classes, in their order; needed to train one",
    )
    pooling: Literal["mean", "first"] = Field("mean", description="encoder: what of a text's outputs is classified")

    @model_validator(mode="after")
    def _labels_fit(self) -> ModelSection:
        if not self.labels:
            return self
        if self.architecture != "encoder":
            raise ValueError(
                f"labels: model.architecture {self.architecture} writes its targets and needs none; remove them"
            )
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels) or not all(self.labels):
            raise ValueError(f"labels: {list(self.labels)} must be two or more different texts, none empty")
        if self.classes not in (None, len(self.labels)):
            raise ValueError(f"classes: {self.classes} for {len(self.labels)} labels; remove classes")
        return self

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSection:
        if self.head_width is None and self.d_model % self.heads:
            fits = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
            near = min(fits, key=lambda h: (abs(h - self.heads), h))
            raise ValueError(
                f"heads: {self.heads} heads do not divide d_model = {self.d_model}; set model.heads to {near} "
                "or choose another d_model"
            )
        if self.key_value_heads is not None and self.heads % self.key_value_heads:
            fits = [h for h in range(1, self.heads + 1) if self.heads % h == 0]
            raise ValueError(
                f"key_value_heads: {self.key_value_heads} do not divide heads = {self.heads}; choose one of {fits}"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelSection:
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model: {self.d_model} is odd; sinusoidal positions need an even width")
        if self.positions == "rotary" and self.width_of_heads % 2:
            raise ValueError(
                f"heads: {self.heads} heads of d_model = {self.d_model} are {self.width_of_heads} wide; rotary "
                "positions need an even width per head"
            )
        if self.attention_dropout and self.attention.kind != "full":
            raise ValueError(
                f"attention_dropout: attention.kind {self.attention.kind!r} never has its weights at hand; set "
                "attention_dropout to 0 or attention.kind to full"
            )
        return self

    @model_validator(mode="after")
    def _origin_has_a_kind(self) -> ModelSection:
        if self.init_from is not None and not re.fullmatch("hf:.+", self.init_from):
            raise ValueError(f"init_from: {self.init_from!r} must be hf:DIR, a directory of Hugging Face transformers")
        return self

    @property
    def class_count(self) -> int:
        """Classes of an encoder's head."""
        return self.classes or len(self.labels) or 2

    @property
    def heads_of_keys(self) -> int:
        """Heads of keys and values."""
        return self.key_value_heads or self.heads

    @property
    def width_of_heads(self) -> int:
        """Width of a head."""
        return self.head_width or self.d_model // self.heads
