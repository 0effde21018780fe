"""Muon: its iteration against singular values, its steps against torch.optim.Muon, at every ZeRO stage, resumed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.commit import CheckpointError
from configs.schema import ModelSection, OptimizerSection
from model.muon import COEFFICIENTS, orthogonalised
from model.optimizer import build_optimizer
from model.transformer import build_model
from tests.gloo_pool import gloo_pool  # noqa: F401
from tests.test_engine import RATE, assert_equal_to, make_config, train_plainly, train_with_engine
from tests.test_fragments import load_and_go_on, saved


def muon_config(**arguments):
    config = make_config(**arguments)
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"name": "muon"})})


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_the_iteration_keeps_singular_vectors_and_maps_singular_values(rows, columns, scale, seed):
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)) * scale
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / (np.sqrt((matrix**2).sum()) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    found = orthogonalised(torch.tensor(matrix)).numpy()
    np.testing.assert_allclose(found, left * values @ right, atol=1e-3)
    assert found.shape == matrix.shape


def test_what_muon_moves_and_what_decays():
    sizes = {"d_model": 16, "heads": 2, "d_ff": 24, "encoder_layers": 1, "decoder_layers": 1}
    decoder = {**sizes, "architecture": "decoder", "positions": "learned", "max_positions": 9, "tie_embeddings": False}
    for model_section, head in ((ModelSection(**sizes), set()), (ModelSection(**decoder), {"head.weight"})):
        model = build_model(model_section, 31, 0)
        names = {id(p): name for name, p in model.named_parameters()}
        whole = set(names.values())
        vectors = {name for name in whole if name.endswith(".bias") or "norm" in name}
        embeddings = {name for name in whole if name in ("embedding.weight", "embedding.positions")}
        hidden = whole - vectors - embeddings - head
        for kind in ("adam", "muon"):
            groups = build_optimizer(model, OptimizerSection(name=kind, weight_decay=0.1)).param_groups
            found = [
                (bool(group.get("muon")), group["weight_decay"], {names[id(p)] for p in group["params"]})
                for group in groups
            ]
            plain = [(False, 0.1, head)] if head else []
            assert found == (
                [(True, 0.1, hidden), *plain, (False, 0.0, vectors | embeddings)]
                if kind == "muon"
                else [(False, 0.1, hidden | head), (False, 0.0, vectors | embeddings)]
            )


class TorchMuon:
    """torch.optim.Muon and torch.optim.AdamW side by side, with what each parameter is spelled out."""

    def __init__(self, model, section):
        hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "embedding.weight"]
        rest = [p for name, p in model.named_parameters() if p.ndim == 1 or name == "embedding.weight"]
        shared = {"lr": RATE, "weight_decay": section.weight_decay}
        self.parts = [
            torch.optim.Muon(hidden, momentum=section.momentum, adjust_lr_fn="match_rms_adamw", **shared),
            torch.optim.AdamW(rest, lr=RATE, betas=section.betas, eps=section.eps, weight_decay=0.0),
        ]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


@pytest.fixture(scope="module")
def plain():
    """The loop without DeepSpeed. torch's Muon iterates in bfloat16; here, as ours on a CPU, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        return train_plainly(muon_config(), 4, TorchMuon)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (3, {}),
        (3, {"zero_stage": 3}),
        *(
            pytest.param(ranks, more, marks=SLOW)
            for ranks, more in (
                (1, {}),
                (2, {"zero_stage": 2}),
                (3, {"zero_stage": 2}),
                (1, {"zero_stage": 3}),
                (2, {"zero_stage": 3}),
                (4, {"tensor": 2}),
                (4, {"tensor": 2, "zero_stage": 3}),
                (4, {"pipeline": 2}),
                (8, {"pipeline": 2, "tensor": 2}),
            )
        ),
    ],
)
def test_any_ranks_at_any_stage_equal_torch_s_muon(gloo_pool, plain, ranks, more):  # noqa: F811
    for results, parameters, _ in gloo_pool.run(ranks, train_with_engine, muon_config(**more), 4):
        assert_equal_to(plain, results, parameters)


@SLOW
def test_stages_of_which_one_has_a_head_of_its_own(gloo_pool, tmp_path):  # noqa: F811
    """Its matrix is in a parameter group that other stages lack. Saved by stages, resumed by one process."""
    model = {"architecture": "decoder", "tie_embeddings": False}
    config, alone = (muon_config(dropout=0.1, model=model, pipeline=stages) for stages in (2, 1))
    (expected,) = gloo_pool.run(1, train_with_engine, alone, 4)
    for results, parameters, _ in gloo_pool.run(4, train_with_engine, config, 4):
        history = [(result.loss, result.grad_norm, result.target_tokens) for result in expected[0]]
        assert_equal_to((history, expected[1]), results, parameters)
    losses, parameters, _, _ = saved(gloo_pool, config, 4, tmp_path)
    for found, end in gloo_pool.run(1, load_and_go_on, alone, str(tmp_path)):
        assert found == pytest.approx(losses, abs=1e-5)
        assert all(abs(end[name] - value).max() < 1e-4 for name, value in parameters.items())


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (2, "fp32"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in ((1, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"))
        ),
    ],
)
def test_the_same_shape_continues_bit_for_bit(gloo_pool, tmp_path, stage, precision):  # noqa: F811
    config = muon_config(dropout=0.1, zero_stage=stage, precision=precision)
    losses, parameters, _, owned = saved(gloo_pool, config, 2, tmp_path)
    states = {(name, state) for rank in owned for name, state, _, _ in rank}
    assert ("encoder_0.attention.query.weight", "momentum_buffer") in states
    assert ("encoder_0.attention.query.weight", "exp_avg") not in states
    assert ("embedding.weight", "exp_avg_sq") in states
    for found, end in gloo_pool.run(2, load_and_go_on, config, str(tmp_path), True):
        assert found == losses
        assert all((end[name] == value).all() for name, value in parameters.items())


@SLOW
def test_another_shape_continues_and_another_optimizer_is_refused(gloo_pool, tmp_path):  # noqa: F811
    losses, parameters, _, _ = saved(gloo_pool, muon_config(dropout=0.1), 2, tmp_path)
    for ranks, stage in ((1, 1), (3, 2), (3, 3)):
        config = muon_config(dropout=0.1, zero_stage=stage)
        for found, end in gloo_pool.run(ranks, load_and_go_on, config, str(tmp_path)):
            assert found == pytest.approx(losses, abs=1e-4)
            assert all(abs(end[name] - value).max() < 1e-3 for name, value in parameters.items())
    assert gloo_pool.run(1, refused, make_config(), str(tmp_path)) == [True]


def refused(config, folder):
    with pytest.raises(CheckpointError, match=r"optimizer\.name"):
        load_and_go_on(config, folder)
    return True
