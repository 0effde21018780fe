"""The images section: how pictures become tokens, for corpora whose target is `{image:COLUMN}`."""

from __future__ import annotations

from pydantic import Field, model_validator

from configs.section import PositiveInt, Section


class ImagesSection(Section):
    """A small vector-quantised autoencoder, trained on the corpora's pictures before the data are prepared."""

    side: PositiveInt = Field(32, description="the middle square of pictures is scaled to side x side, pixels")
    halvings: PositiveInt = Field(2, description="how often the side is halved: (side / 2^halvings)^2 tokens a picture")
    codes: PositiveInt = Field(256, description="entries of the codebook; data.tokenizer.image_codes must be equal")
    width: PositiveInt = Field(64, description="channels of the autoencoder")
    steps: PositiveInt = Field(1000, description="training steps of the autoencoder")
    batch: PositiveInt = Field(32, description="pictures in one step")
    learning_rate: float = Field(2e-3, gt=0.0, description="of Adam")
    most_pictures: PositiveInt = Field(
        20_000, description="pictures that the autoencoder is trained on, at most; chosen by hash"
    )

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return (self.side // 2**self.halvings) ** 2

    @model_validator(mode="after")
    def _side_can_be_halved(self) -> ImagesSection:
        if self.side % 2**self.halvings:
            raise ValueError(
                f"side: {self.side} pixels cannot be halved {self.halvings} times; choose a multiple of "
                f"{2**self.halvings}, or fewer halvings"
            )
        return self
