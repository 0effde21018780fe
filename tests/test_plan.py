"""`telar plan`: counts against the real model, layouts, devices, and the command as a process."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import ConfigError
from configs.load import load_config, parse_config
from jobs.plan.devices import Device, find_device, known_devices
from jobs.plan.duration import in_words, parse_duration
from jobs.plan.flops import training_flops
from jobs.plan.layout import Layout, chosen_layout, legal_layouts, problem
from jobs.plan.make import Question, make_plan
from jobs.plan.memory import rank_memory
from jobs.plan.parameters import parameters_by_part, shape_of
from jobs.plan.step import step_time
from jobs.plan.techniques import Techniques, with_assumptions
from model.mesh import Mesh
from model.transformer import Transformer, build_layers, build_model
from tests.test_layout import ROOT

LLAMA = {
    "architecture": "decoder",
    "positions": "rotary",
    "norm": "rms",
    "norm_placement": "pre",
    "feed_forward": "swiglu",
    "bias": False,
    "key_value_heads": 2,
    "tie_embeddings": False,
}
MODELS = {
    "encoder_decoder": {},
    "encoder_decoder, pre, untied, learned": {
        "norm_placement": "pre",
        "tie_embeddings": False,
        "positions": "learned",
        "max_positions": 128,
    },
    "encoder_decoder, shared keys, swiglu": {"key_value_heads": 1, "feed_forward": "swiglu", "encoder_layers": 1},
    "decoder, tied": {"architecture": "decoder", "feed_forward": "gelu", "positions": "learned"},
    "decoder, llama": LLAMA,
    "encoder": {"architecture": "encoder", "classes": 5},
    "encoder, pre, rms, no bias": {"architecture": "encoder", "norm": "rms", "norm_placement": "pre", "bias": False},
}


def make_config(source=24, target=16, rows=2, batch=4, precision="fp32", zero=1, vocabulary=320, **model):
    layout = "sequence" if model.get("architecture") == "decoder" else "pairs"
    sizes = {"d_model": 32, "heads": 4, "d_ff": 96, "encoder_layers": 2, "decoder_layers": 3, "dropout": 0.0}
    return parse_config(
        {
            "data": {
                "corpora": [{"name": "none", "kind": "text", "path": "/nowhere", "target": "{text}"}],
                "source_tokens": source,
                "target_tokens": target,
                "layout": layout,
                "tokenizer": {"vocabulary_size": vocabulary},
            },
            "model": {**sizes, **model},
            "parallelism": {"zero_stage": zero},
            "train": {
                "steps": 10,
                "global_batch_sequences": batch,
                "micro_batch_sequences": rows,
                "precision": precision,
            },
        },
        "test",
    )


def whole_inputs(config, rows):
    """Full rows of one document each, and labels everywhere."""
    random = torch.Generator().manual_seed(0)
    inputs = []
    for width in (config.data.source_tokens, config.data.target_tokens):
        inputs.append(torch.randint(3, 320, (rows, width), generator=random, dtype=torch.int32))
        inputs.append(torch.arange(width, dtype=torch.int32).repeat(rows, 1))
        inputs.append(torch.ones(rows, width, dtype=torch.int32))
    labels = torch.zeros(rows, config.data.target_tokens, dtype=torch.int64)
    return tuple(inputs), labels, torch.ones(labels.shape)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_real_model(name):
    config = make_config(**MODELS[name])
    with torch.device("meta"):
        model = Transformer(build_layers(config.model, 0), 320, config.model)
    parts = parameters_by_part(shape_of(config))
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())
    attention = sum(p.numel() for n, p in model.named_parameters() if ".attention." in n or ".cross_attention." in n)
    assert sum(count for part, count in parts.items() if part.endswith("attention")) == attention


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_has_a_plan(path):
    config = load_config(path)
    facts = make_plan(config, Question(find_device("h100"), nodes=1)).facts
    with torch.device("meta"):
        model = Transformer(build_layers(config.model, 0), config.data.tokenizer.vocabulary_size, config.model)
    assert facts["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if "encoder," not in name and name != "encoder"])
def test_flops_are_what_torch_counts(name):
    config = make_config(**MODELS[name])
    model = build_model(config.model, 320, 0)
    inputs, labels, weight = whole_inputs(config, rows=2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs, torch.tensor([1, 0]), labels, weight).loss.backward()
    # The counter knows no addmm_, by which the loss adds up the head's gradient: one of the head's three products.
    unseen = training_flops(shape_of(config)).head // 3
    assert (training_flops(shape_of(config)).sample - unseen) * 2 == counter.get_total_flops()


def test_flops_follow_the_published_formula():
    """Narayanan et al. 2021, equation 3 without recomputation: 72 B s l h^2 (1 + s / 6h + V / 12 l h)."""
    config = load_config(ROOT / "configs/gpt3_175b.yaml")
    tokens, layers, wide, vocabulary = 2048, 96, 12288, 50257
    formula = 72 * tokens * layers * wide**2 * (1 + tokens / (6 * wide) + vocabulary / (12 * layers * wide))
    assert training_flops(shape_of(config)).sample == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize("kind", ["window", "blocklog", "linear"])
def test_sparse_attention_costs_less_and_grows_slower(kind):
    def attention(tokens):
        fields = {"kind": kind, "window_tokens": 64, "block_tokens": 64}
        return training_flops(shape_of(make_config(target=tokens, architecture="decoder", attention=fields))).attention

    full = training_flops(shape_of(make_config(target=4096, architecture="decoder"))).attention
    assert attention(4096) < full / 4 and attention(4096) < 2.5 * attention(2048)


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.integers(1, 96),
    gpus=st.sampled_from([1, 2, 4, 8]),
    heads=st.sampled_from([4, 8]),
    batch=st.integers(1, 40),
)
def test_legal_layouts_use_all_ranks_and_are_legal(ranks, gpus, heads, batch):
    config = make_config(rows=1, batch=batch, heads=heads)
    found = list(legal_layouts(config, ranks, gpus))
    assert len(set(found)) == len(found)
    every = {
        (t, p, ranks // (t * p), z)
        for t in range(1, ranks + 1)
        for p in range(1, ranks // t + 1)
        for z in (1, 2, 3)
        if ranks % (t * p) == 0
    }
    legal = {
        (t, p, d, z)
        for t, p, d, z in every
        if heads % t == 0 and 96 % t == 0 and t <= gpus and p <= 5 and (p == 1 or z == 1) and d <= batch
    }
    assert {(one.tensor, one.pipeline, one.data, one.zero) for one in found} == legal


def test_a_layout_that_cannot_be_is_said_why():
    config = make_config(batch=8, rows=2)
    said = {
        "heads = 4 does not divide over 3": Layout(3, 1, 1, 1, 8),
        "do not fit into a node of 2": Layout(4, 1, 1, 1, 2),
        "6 pipeline stages for 5 layers": Layout(1, 6, 1, 1, 8),
        "ZeRO-1 only": Layout(1, 2, 1, 2, 8),
        "5 replicas share 4 micro-batches": Layout(1, 1, 5, 1, 8),
    }
    for text, layout in said.items():
        assert text in problem(config, layout)
    assert problem(config, Layout(2, 2, 4, 1, 8)) is None


def test_replicas_fill_the_nodes():
    config = make_config()
    assert chosen_layout(config, 8, None).ranks == 1
    assert chosen_layout(config, 8, 3).data == 24


@pytest.mark.parametrize(
    ("sizes", "replicas_per_node", "stages_in_node", "replicas_in_node"),
    [
        ((2, 2, 4), 2, True, False),
        ((8, 4, 2), 1, False, False),
        ((1, 2, 4), 4, True, True),
        ((4, 4, 2), 1, False, False),
    ],
)
def test_a_plan_puts_ranks_where_the_mesh_does(sizes, replicas_per_node, stages_in_node, replicas_in_node):
    gpus, (tensor, pipeline, data) = 8, sizes
    layout = Layout(*sizes, 1, gpus)
    mesh = Mesh(data, pipeline, tensor)

    def in_one_node(axis):
        return all(len({rank // gpus for rank in line}) == 1 for line in mesh.lines(axis))

    # Of the ranks that hold the same part of the model, how many are in a node; the mesh knows where each rank stands.
    most = max(sum(rank // gpus == 0 for rank in line) for line in mesh.lines("data"))
    assert layout.replicas_per_node == most == replicas_per_node
    assert layout.replicas_in_node == in_one_node("data") == replicas_in_node
    assert layout.stages_in_node == in_one_node("pipeline") == stages_in_node


@settings(deadline=None, max_examples=30)
@given(zero=st.sampled_from([1, 2, 3]), data=st.sampled_from([2, 8, 64]), tensor=st.sampled_from([1, 2, 4]))
def test_memory_is_shared_by_replicas_and_tensor_ranks(zero, data, tensor):
    config = make_config(batch=256, precision="bf16", d_model=1024, d_ff=4096, bias=False)
    shape = shape_of(config)
    techniques = Techniques()
    one = rank_memory(config, shape, Layout(tensor, 1, data, zero, 8), techniques)
    twice = rank_memory(config, shape, Layout(tensor, 1, 2 * data, zero, 8), techniques)
    parameters = sum(parameters_by_part(shape).values())
    assert one.optimizer == pytest.approx(2 * twice.optimizer)
    # Every parameter's master copy and moments lie once on all ranks together, norms on every tensor rank.
    assert one.optimizer * tensor * data == pytest.approx(12 * parameters, rel=0.01)
    assert (one.gradients == twice.gradients) == (zero == 1)
    assert (twice.parameters < one.parameters) == (zero == 3)


def test_recomputation_and_sequence_parallelism_save_activations():
    config = load_config(ROOT / "configs/llama_70b.yaml")
    shape, layout = shape_of(config), Layout(8, 1, 8, 1, 8)
    plain, split, again = (
        rank_memory(config, shape, layout, Techniques(**fields)).activations
        for fields in ({}, {"sequence_parallel": True}, {"recompute": "full"})
    )
    assert again < split < plain


@settings(deadline=None, max_examples=30)
@given(factor=st.floats(1.1, 8.0), layout=st.sampled_from([(1, 1, 8, 3), (4, 2, 4, 1), (8, 4, 16, 1), (2, 1, 16, 2)]))
def test_devices_and_links_that_are_faster_make_steps_shorter_by_as_much(factor, layout):
    config = load_config(ROOT / "configs/llama_8b.yaml")
    slow = find_device("a100")
    rates = [name for name in Device.model_fields if name.endswith(("tflops", "per_second"))]
    update = {name: getattr(slow, name) * factor for name in rates}
    fast = slow.model_copy(update={**update, "launch_microseconds": slow.launch_microseconds / factor})
    before, after = (
        step_time(config, shape_of(config), Layout(*layout, 8), device, Techniques()) for device in (slow, fast)
    )
    assert before.seconds == pytest.approx(after.seconds * factor)
    assert before.utilisation == pytest.approx(after.utilisation)
    # Nothing of the step is counted twice or left out.
    parts = (before.matrices, before.attention, before.memory, before.launch, before.head, before.optimizer)
    assert before.seconds == pytest.approx(sum(parts) + before.communication + before.bubble + before.stragglers)


def test_a_tiny_model_is_no_quicker_than_its_kernels_are_started():
    config = load_config(ROOT / "configs/multi30k_tiny.yaml")
    tiny, wide = (
        step_time(one, shape_of(one), Layout(1, 1, 1, 1, 8), find_device("h100"), Techniques())
        for one in (config, load_config(ROOT / "configs/llama_8b.yaml"))
    )
    layers = tiny.matrices + tiny.attention + tiny.memory + tiny.launch
    # 8 layers, 100 kernels of 5 microseconds.
    assert layers == pytest.approx(
        8 * 500e-6 * config.train.global_batch_sequences / config.train.micro_batch_sequences
    )
    assert wide.launch == 0


def one_forward_one_backward(stages, micro_batches):
    """Time of 1F1B on a clock: forward takes 1, backward 2; each stage runs its fixed order when inputs are there."""
    orders = []
    for stage in range(stages):
        warm = min(stages - stage, micro_batches)
        order = [("f", i) for i in range(warm)]
        for i in range(micro_batches):
            order.append(("b", i))
            if warm + i < micro_batches:
                order.append(("f", warm + i))
        orders.append(order)
    done, clocks = {}, [0.0] * stages
    while any(orders):
        for stage, order in enumerate(orders):
            if not order:
                continue
            kind, i = order[0]
            before = (stage - 1, "f", i) if kind == "f" else (stage + 1, "b", i)
            if 0 <= before[0] < stages and before not in done:
                continue
            clocks[stage] = max(clocks[stage], done.get(before, 0.0)) + (1 if kind == "f" else 2)
            done[(stage, kind, i)] = clocks[stage]
            order.pop(0)
    return max(clocks)


@pytest.mark.parametrize(("stages", "batch"), [(2, 8), (4, 8), (8, 32)])
def test_the_bubble_is_that_of_the_schedule(stages, batch):
    config = make_config(rows=1, batch=batch, decoder_layers=8, architecture="decoder")
    step = step_time(config, shape_of(config), Layout(1, stages, 1, 1, 8), find_device("h100"), Techniques())
    busy = step.matrices + step.attention + step.memory + step.launch + step.head
    busy += sum(flow.seconds for flow in step.flows)
    assert step.bubble / busy == pytest.approx(one_forward_one_backward(stages, batch) / (3 * batch) - 1)


def test_bytes_on_the_wire_of_a_hand_counted_step():
    """Four layers, d = 32, 2 replicas of 2 tensor ranks in one node, fp32, 4 micro-batches of 2 rows of 16 tokens."""
    config = make_config(batch=8, architecture="decoder", decoder_layers=4, bias=False, norm="rms")
    step = step_time(config, shape_of(config), Layout(2, 1, 2, 1, 8), find_device("h100"), Techniques())
    sent = {flow.name: flow for flow in step.flows}
    assert all(flow.link == "node" for flow in sent.values())
    # Per layer and micro-batch 4 all-reduces of 2 x 16 x 32 floats, of which each of 2 ranks sends as many bytes.
    assert sent["tensor"].bytes == 4 * 2 * 4 * (2 * 16 * 32 * 4)
    held = (4 * (4 * 32 * 32 + 2 * 32 * 96) + 320 * 32) / 2
    assert sent["gradients"].bytes == pytest.approx(held * 4 / 2, rel=0.02)
    assert sent["parameters"].bytes == pytest.approx(held * 4 / 2, rel=0.02)


def test_collectives_of_replicas_use_all_network_cards_of_a_node():
    """Bus bandwidth between nodes: one card per rank of the group in a node, never more than the node's own links."""
    config, device = load_config(ROOT / "configs/llama_8b.yaml"), find_device("h100")
    rates = []
    for tensor in (1, 4, 8):
        step = step_time(config, shape_of(config), Layout(tensor, 1, 64 // tensor, 1, 8), device, Techniques())
        flow = next(flow for flow in step.flows if flow.name == "gradients")
        assert flow.link == "network"
        rates.append(flow.bytes / flow.seconds / 1e9)
    assert rates == pytest.approx([0.8 * 400, 0.8 * 100, 0.8 * 50])


def test_a_node_reads_what_its_replicas_train_on():
    config = load_config(ROOT / "configs/gpt_124m.yaml")
    one, four = (make_plan(config, Question(find_device("h100"), nodes=nodes)).facts for nodes in (1, 4))
    assert one["data"]["node_bytes_per_second"] == pytest.approx(2 * one["run"]["tokens_per_second"])
    assert four["data"]["node_bytes_per_second"] == pytest.approx(2 * four["run"]["tokens_per_second"] / 4)
    assert one["data"]["bytes"] == 100_000 * 512 * 1024 * 2
    assert one["run"]["gpu_hours"] == pytest.approx(100_000 * one["run"]["step_seconds"] * 8 / 3600)
    assert one["run"]["energy_kwh"] == pytest.approx(one["run"]["gpu_hours"] * 0.7)


def test_devices_are_listed_when_one_is_unknown(tmp_path):
    assert set(known_devices()) == {"h100", "h200", "a100", "cpu"}
    with pytest.raises(ConfigError, match=r"unknown device 'h10'.*did you mean h100.*h100, h200, a100, cpu, or a YAML"):
        find_device("h10")
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        find_device(str(tmp_path / "none.yaml"))
    file = tmp_path / "mine.yaml"
    fields = {**find_device("h100").model_dump(), "name": "mine", "watts": 350}
    file.write_text(yaml.safe_dump(fields))
    assert find_device(str(file)).watts == 350.0
    wrong = {"watts": (-1, "watts: .*greater than 0"), "memory_gib": ("big", "memory_gib: .*valid number, not 'big'")}
    for name, (value, said) in wrong.items():
        file.write_text(yaml.safe_dump({**fields, name: value}))
        with pytest.raises(ConfigError, match=said):
            find_device(str(file))
    file.write_text(yaml.safe_dump({**fields, "wats": 1}))
    with pytest.raises(ConfigError, match="wats: unknown field; known: name"):
        find_device(str(file))
    del fields["watts"]
    file.write_text(yaml.safe_dump(fields))
    with pytest.raises(ConfigError, match="watts: is required"):
        find_device(str(file))


def test_durations():
    assert parse_duration("3h", "--mtbf") == 10800 and parse_duration("1.5d", "--mtbf") == 129600
    for wrong in ("3", "h", "0s", "-3h", "3 hours", ""):
        with pytest.raises(ConfigError, match="--mtbf"):
            parse_duration(wrong, "--mtbf")
    assert [in_words(s) for s in (0.0411, 42, 450, 12000, 3e6)] == ["41.1 ms", "42 s", "7.5 min", "3.33 h", "34.7 d"]


def test_assumptions_are_checked():
    assert with_assumptions(Techniques(), ["recompute=full", "overlap=true"]).recompute == "full"
    for wrong in ("recompute", "speed=9", "recompute=some", "interleave=0"):
        with pytest.raises(ConfigError, match="--assume " + wrong):
            with_assumptions(Techniques(), [wrong])


def telar(*arguments):
    command = [sys.executable, "-X", "importtime", "-m", "jobs.cli", "plan", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )


def test_the_command_is_quick_and_imports_nothing_heavy():
    before = os.times()
    done = telar(
        "configs/gpt3_175b.yaml", "--nodes", "128", "--gpus-per-node", "8", "--device", "h100", "--simulate", "30d"
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    # Processor time: the wall clock counts other processes of the machine too.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2.0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "pydantic" in imported
    assert not {"torch", "ray", "deepspeed", "numpy", "matplotlib", "pyarrow"} & imported
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    for text in ("175 billion", "1,024 NVIDIA H100", "MFU", "bubble", "goodput", "kWh", "no: activations"):
        assert text in done.stdout


def test_the_command_speaks_json():
    done = telar(
        "configs/llama_70b.yaml",
        "--nodes",
        "16",
        "--device",
        "h200",
        "--set",
        "train.steps=7",
        "--mtbf",
        "3h",
        "--json",
    )
    facts = json.loads(done.stdout)
    assert facts["run"]["steps"] == 7 and facts["checkpoints"]["mtbf_seconds"] == 10800
    speeds = [one["tokens_per_second"] for one in facts["layouts"] if one["problem"] is None]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) > 3
    assert all(one["tensor"] * one["pipeline"] * one["data"] == 128 for one in facts["layouts"])
    room = facts["device"]["memory_gib"] * 2**30
    assert all(one["memory_bytes"]["total"] <= room for one in facts["layouts"] if one["problem"] is None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("configs/smoke.yaml", "--device", "tpu"), "--device: unknown device 'tpu'"),
        (("configs/smoke.yaml", "--mtbf", "often"), "--mtbf: 'often'"),
        (("configs/smoke.yaml", "--plot", "a.png"), "--plot: there is nothing to draw"),
        (("configs/smoke.yaml", "--simulate", "9w", "--mtbf", "1s"), "--simulate: 5.44e+06 failures"),
        (("configs/smoke.yaml", "--set", "model.heads=3"), "model.heads: 3 heads"),
        (("configs/nothing.yaml",), "no such configuration file"),
        ((), "CONFIG"),
    ],
)
def test_wrong_input_is_named(arguments, said):
    done = telar(*arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and said in errors[0]
