"""What cannot be trained in parallel is refused at once, by loading and by `telar plan`, with the fix."""

import pytest
import yaml
from click.testing import CliRunner

from configs.errors import ConfigError
from configs.load import load_config
from jobs.cli import cli
from tests.test_end_to_end import TINY

DECODER = {"architecture": "decoder", "decoder_layers": 2, "encoder_layers": 2}
# Changes by section, and what the message names: the field, and what to set.
ILLEGAL = {
    "pipeline with ZeRO 2": ({"parallelism": {"pipeline": 2, "zero_stage": 2}}, "zero_stage: 2.*set.*zero_stage to 1"),
    "pipeline with ZeRO 3": ({"parallelism": {"pipeline": 2, "zero_stage": 3}}, "zero_stage: 3.*pipeline to 1"),
    "ZeRO without a stage": ({"parallelism": {"zero_stage": 0}}, "parallelism.zero_stage: .*1, 2 or 3"),
    "AutoTP": ({"parallelism": {"tensor_engine": "deepspeed"}}, "parallelism.*tensor_engine: .*set parallelism.tensor"),
    "Ulysses": ({"parallelism": {"sequence": 2}}, "parallelism.*sequence: .*Ulysses.*activation_checkpointing"),
    "DualPipeV": ({"parallelism": {"pipeline_schedule": "dualpipev"}}, "pipeline_schedule: .*DualPipeV is not built"),
    "experts": ({"parallelism": {"expert": 2}}, "parallelism.*expert: .*Remove it"),
    "heads": ({"parallelism": {"tensor": 3}}, r"parallelism.tensor: 3 .*model\.heads = .*set parallelism.tensor to"),
    "key heads": (
        {"parallelism": {"tensor": 2}, "model": {"key_value_heads": 1}},
        "parallelism.tensor: 2 .*key_value_heads = 1.*set parallelism.tensor to 1",
    ),
    "feed-forward": ({"parallelism": {"tensor": 2}, "model": {"d_ff": 63}}, "d_ff = 63.*to a multiple of 2"),
    "stages": ({"parallelism": {"pipeline": 64}}, "parallelism.pipeline: 64 stages.*set parallelism.pipeline to"),
    "stages of a decoder": (
        {"parallelism": {"pipeline": 3}, "model": DECODER, "data": {"layout": "sequence"}},
        "parallelism.pipeline: 3 stages.*has 2; set parallelism.pipeline to 2",
    ),
    "global batch": (
        {"train": {"global_batch_sequences": 7, "micro_batch_sequences": 2}},
        "train.global_batch_sequences: 7 is no multiple.*set it to 6",
    ),
    "idle replicas": ({"parallelism": {"data": 99}}, "parallelism.data: 99 replicas.*set parallelism.data to"),
    "offload without ZeRO 3": (
        {"parallelism": {"zero_stage": 2, "offload": {"optimizer": "cpu"}}},
        "parallelism.offload: zero_stage 2.*zero_stage to 3",
    ),
    "offload to a disk": ({"parallelism": {"offload": {"optimizer": "nvme"}}}, "offload.optimizer: nvme.*use cpu"),
    "elastic": ({"elastic": {"min_replicas": 3, "max_replicas": 2}}, "elastic: min_replicas = 3.*lower"),
    "rounding on tensor ranks": (
        {"train": {"quantize": "int8"}, "parallelism": {"tensor": 2}},
        "train.quantize: int8.*set parallelism.tensor to 1",
    ),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_loading_and_planning_name_the_field_and_the_fix(case, tmp_path):
    changes, message = ILLEGAL[case]
    tree = {**TINY}
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    file = tmp_path / "illegal.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(str(file))
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        CliRunner().invoke(cli, ["plan", str(file)], catch_exceptions=False)
