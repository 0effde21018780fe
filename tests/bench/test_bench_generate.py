"""What the benchmark of generation compares computes the same; no speed is asserted."""

import pytest
import torch

from model.transformer import build_model
from tests.bench import generate as bench


@pytest.mark.parametrize("name", ["MarianMTModel", "LlamaForCausalLM"])
def test_both_sides_write_the_same_tokens(name):
    section = bench.sections(d_model=32, layers=1)[name]
    model = build_model(section, bench.VOCABULARY, 0).eval()
    theirs = bench.exported(model, 16, torch.device("cpu"))
    prompts = torch.randint(3, bench.VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(0))
    contest = bench.contestants(model, theirs, prompts, new_tokens=5)
    ours, peer = contest["telar"](), contest["transformers"]()
    assert ours == peer and [len(row) for row in ours] == [5, 5]
    rates = bench.measure({"one": list, "other": list}, repeats=3, tokens=10)
    assert {len(found) for found in rates.values()} == {3} and min(map(min, rates.values())) > 0
