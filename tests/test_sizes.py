"""The configurations of known models: parameters, counted on the meta device, against the published figures."""

import pytest
import torch

from configs.load import load_config
from model.transformer import Transformer, build_layers
from tests.test_layout import ROOT

# Exact counts where a checkpoint or paper gives them, else the paper's rounded figure and how far it may be off.
PUBLISHED = {
    # Vaswani et al. 2017, table 3; about 37,000 byte pairs.
    "vaswani_base": (65e6, 0.04),
    "vaswani_big": (213e6, 0.01),
    # fairseq's transformer_tiny with its Multi30k vocabulary, as model.md cites it.
    "multi30k_tiny": (2.6e6, 0.1),
    # openai/gpt2, meta-llama/Llama-3.2-1B, Meta-Llama-3-8B, Meta-Llama-3-70B.
    "gpt_124m": (124_439_808, 0.0),
    "llama_1b": (1_235_814_400, 0.0),
    "llama_8b": (8_030_261_248, 0.0),
    "llama_70b": (70_553_706_496, 0.0),
    # meta-llama/Llama-3.1-405B.
    "llama3_405b": (405_853_388_800, 0.0),
    # Brown et al. 2020, table 2.1.
    "gpt3_175b": (175e9, 0.005),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_paper(name):
    config = load_config(str(ROOT / "configs" / f"{name}.yaml"))
    with torch.device("meta"):
        model = Transformer(build_layers(config.model, 0), config.data.tokenizer.vocabulary_size, config.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    published, tolerance = PUBLISHED[name]
    assert abs(count - published) <= tolerance * published, f"{count:,}"


def test_every_configuration_is_checked_here():
    own = {"smoke", "text_to_image", "sentiment_encoder", "seven_tasks", "seven_tasks_gpu", "evaluate_all"}
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == {*PUBLISHED, *own}
