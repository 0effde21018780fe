"""Memory of one rank: parameters, gradients, optimizer states, activations, workspace.

The first three are what DeepSpeed 0.19.8 keeps with our settings, found by weighing its tensors on a CPU engine of two
ranks (tests/test_plan_memory.py does it again): per parameter of a rank's part of the model, with D replicas,

    ZeRO-1  fp32  4 + gradients 4 (while they exist)       + (4 master + 8 moments) / D
            bf16  2 + gradients 4 sums and 2 of backward   + 12 / D
    ZeRO-2  2 or 4 + gradients 4 / D                       + 12 / D
    ZeRO-3  (2 or 4) / D, small ones whole + gradients 4 / D + 12 / D

fp32 has a master copy too. Activations are what autograd saves in our layers (equation 2 of Korthikanti et al. 2022
counts those of Megatron in the same way).
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import RunConfig
from jobs.plan.layout import Layout, micro_batches
from jobs.plan.parameters import Shape, Stack, hidden_matrix_elements, layer_parameters, parameters_by_part
from jobs.plan.techniques import Techniques

# model/deepspeed_config.py: reduce_bucket_size, in elements; gradients travel in fp32.
BUCKET_BYTES = 4 * 50_000_000
# DeepSpeed's defaults: parameters that ZeRO-3 never shards (by elements), and gathered ones that it keeps.
PERSISTENT_ELEMENTS = 100_000
LIVE_PARAMETERS = 1_000_000_000
# model/loss.py: CHUNK_TOKENS.
LOSS_CHUNK_TOKENS = 512
# What is left to tensors: the driver's context and NCCL's buffers take 2 to 4 GiB, fragments of the allocator as much.
USABLE = 0.92


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.workspace


def activation_width(config: RunConfig) -> int:
    """Bytes of one activation."""
    return 2 if config.train.precision == "bf16" else 4


def stage_layers(shape: Shape, layout: Layout) -> int:
    """Layers of the fullest pipeline stage."""
    return -(-shape.layers // layout.pipeline)


def rank_memory(config: RunConfig, shape: Shape, layout: Layout, techniques: Techniques) -> Memory:
    """The fullest rank's memory: that of the first pipeline stage or of the last."""
    first = _stage(config, shape, layout, techniques, first=True)
    last = _stage(config, shape, layout, techniques, first=False)
    return max(first, last, key=lambda memory: memory.total)


def _stage(config: RunConfig, shape: Shape, layout: Layout, techniques: Techniques, first: bool) -> Memory:
    parts = parameters_by_part(shape)
    alone = layout.pipeline == 1
    layers = stage_layers(shape, layout)
    outer = sum(parts.get(name, 0) for name in ("embedding", "positions")) if first or alone else 0
    head = 0
    if not first or alone:
        # A tied head on another stage holds a copy of the embedding.
        tied = shape.model.tie_embeddings and shape.model.architecture != "encoder"
        head = (0 if alone else parts["embedding"]) if tied else parts.get("head", parts.get("classifier", 0))
    per_layer = sum(stack.depth * layer_parameters(shape, stack) for stack in shape.stacks) / shape.layers
    parameters = (outer + head + layers * per_layer) / layout.tensor
    muon = 0.0
    if config.optimizer.name == "muon":
        muon = hidden_matrix_elements(shape) / shape.layers * layers / layout.tensor
    width, replicas = activation_width(config), layout.data
    held = parameters * width / (replicas if layout.zero == 3 else 1)
    if layout.zero == 3:
        held += _persistent(shape, layers) * width * (1 - 1 / replicas)
    if layout.zero == 1:
        gradients = parameters * (4 + (2 if width == 2 else 0))
    else:
        gradients = parameters * 4 / replicas
    # Master and two moments in fp32; Muon keeps one moment of its matrices.
    optimizer = (12 * parameters - 4 * muon) / replicas
    offload = config.parallelism.offload
    if layout.zero == 3 and config.cluster.device != "cpu":
        if offload.optimizer == "cpu":
            # Sums of gradients go to the host with the states that they update.
            optimizer = gradients = 0.0
        if offload.parameters == "cpu":
            held = 0.0
    in_flight = min(layout.pipeline if first else 1, -(-micro_batches(config) // layout.data))
    activations = in_flight * _saved(config, shape, layout, techniques, layers)
    if techniques.interleave > 1 and layout.pipeline > 1 and first:
        # Narayanan et al. 2021, section 2.2: so much more is in flight while the chunks take turns.
        activations *= 1 + (layout.pipeline - 1) / (layout.pipeline * techniques.interleave)
    workspace = _workspace(config, shape, layout, parameters, has_head=not first or alone)
    if techniques.recompute == "full":
        workspace += max(_layer_saved(config, shape, stack, layout, techniques) for stack in shape.stacks)
    return Memory(held, gradients, optimizer, activations, workspace)


def _persistent(shape: Shape, layers: int) -> float:
    """Parameters in tensors so small that ZeRO-3 keeps them whole on every rank: elements."""
    model, total = shape.model, 0.0
    for stack in shape.stacks:
        sizes = [model.d_model] * stack.norms * (2 if model.norm == "layer" else 1)
        for matrix in stack.matrices:
            sizes += [matrix.elements, *([matrix.outputs] if model.bias else [])]
        total += stack.depth * sum(size for size in sizes if size < PERSISTENT_ELEMENTS)
    embedding = shape.vocabulary * model.d_model
    return total / shape.layers * layers + (embedding if embedding < PERSISTENT_ELEMENTS else 0)


def _workspace(config: RunConfig, shape: Shape, layout: Layout, parameters: float, has_head: bool) -> float:
    """Buffers that come and go: gradients on their way, scores of a chunk of the loss, gathered parameters."""
    width = activation_width(config)
    # The bf16 optimizer of ZeRO-1 reduces its sums of gradients where they lie.
    total = 0.0 if layout.zero == 1 and width == 2 else float(BUCKET_BYTES)
    if has_head and shape.model.architecture != "encoder":
        # fp32 scores and their two-byte copy, and the head's gradient in fp32.
        total += LOSS_CHUNK_TOKENS * shape.vocabulary * (4 + width) / layout.tensor
        total += 4 * shape.vocabulary * shape.model.d_model / layout.tensor
    if layout.zero == 3:
        total += min(parameters, LIVE_PARAMETERS) * width * (1 - 1 / layout.data)
    return total


def _saved(config: RunConfig, shape: Shape, layout: Layout, techniques: Techniques, layers: int) -> float:
    """Bytes that autograd keeps of one micro-batch in so many layers, averaged over encoder and decoder layers."""
    model, rows, width = shape.model, config.train.micro_batch_sequences, activation_width(config)
    if techniques.recompute == "full":
        entered = sum(stack.depth * stack.tokens for stack in shape.stacks) * model.d_model * width * rows
        return entered / shape.layers * layers / (layout.tensor if techniques.sequence_parallel else 1)
    kept = sum(stack.depth * _layer_saved(config, shape, stack, layout, techniques) for stack in shape.stacks)
    ends = shape.tokens * model.d_model * width * rows
    return kept / shape.layers * layers + ends


def _layer_saved(config: RunConfig, shape: Shape, stack: Stack, layout: Layout, techniques: Techniques) -> float:
    """Bytes that autograd keeps of one layer and one micro-batch."""
    model, width = shape.model, activation_width(config)
    wide = model.d_model * width
    attentions = 2 if stack.memory_tokens else 1
    dropped = model.dropout > 0
    # Whole on every tensor rank: norms' inputs, inputs of the first matrices, masks of dropout and what they met.
    # RMSNorm keeps the normalised input beside the input, which LayerNorm (and a fused RMSNorm) computes anew.
    fused = techniques.elementwise == "fused"
    whole = stack.norms * (wide * (2 if model.norm == "layer" or fused else 3) + (2 * wide if dropped else 0) + 8)
    # Split over tensor ranks: queries, keys, values, the mixed values, a number per row of scores, and features of
    # the feed-forward layer.
    split = (2 * wide + 4 * model.heads) * attentions
    features = {"relu": 1, "gelu": 2, "swiglu": 3 if fused else 4}[model.feed_forward]
    split += features * model.d_ff * width
    # Our attention repeats shared keys and values for every head, flash attention does not.
    narrow = wide * model.heads_of_keys // model.heads if techniques.attention == "flash" else wide
    keys = 2 * narrow * (stack.tokens + stack.memory_tokens)
    bytes_per_row = stack.tokens * split + keys
    scores = stack.tokens * (stack.tokens + stack.memory_tokens)
    mask = 0.0
    if techniques.attention == "masked" and model.attention.kind == "full":
        # The mask is one byte per score and becomes a bias of the scores' type in the kernel; one for all heads.
        mask = scores * width
    elif techniques.attention == "unfused":
        # Scores, probabilities and the mask of dropout (Korthikanti et al. 2022, equation 1: 5 a s^2 b).
        bytes_per_row += 5 * model.heads * scores
    shared = layout.tensor if techniques.sequence_parallel else 1
    rows = config.train.micro_batch_sequences
    return rows * (stack.tokens * whole / shared + bytes_per_row / layout.tensor + mask)
