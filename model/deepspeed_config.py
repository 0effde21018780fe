"""Our schema -> DeepSpeed's configuration dictionary, as one pure function. Nobody writes DeepSpeed JSON."""

from __future__ import annotations

from typing import Any

from configs.schema import RunConfig


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; the optimizer is ours and passed beside it.

    The engine owns accumulation (it says which micro-batch is the last one) and loss scaling by tokens, so DeepSpeed
    is told of one micro-batch per step.
    """
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_sequences,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {
            "stage": config.parallelism.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            # Its true would put another function in the place of torch.nn.functional.linear for the process's life
            # (ZeRO-3). Gradients then come in another order than in a fresh process, and ZeRO-2 between such
            # processes adds up gradients of different parameters without noticing.
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    offload = config.parallelism.offload
    if offload.active:
        # Ours is torch's Adam, which computes the same wherever its tensors lie.
        result["zero_force_ds_cpu_optimizer"] = False
    if offload.optimizer == "cpu":
        result["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload.parameters == "cpu":
        result["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    if config.parallelism.pipeline > 1:
        # Its default sends a tensor rank's share of what crosses to the next stage, and can do so for one tensor only.
        result["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if config.train.precision == "bf16":
        # fp32 accumulation and reduction: many micro-batches of bf16 gradients would lose their small parts.
        result["bf16"] = {"enabled": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
        result["communication_data_type"] = "fp32"
    return result
