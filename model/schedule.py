"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from configs.schema import OptimizerSection


def learning_rate(optimizer: OptimizerSection, d_model: int, step: int, steps: int) -> float:
    """The rate of optimizer step `step` of `steps`; steps count from 1.

    `noam` is equation 3 of Vaswani et al. 2017, d_model^-0.5 * min(step^-0.5, step * warmup_steps^-1.5), times
    `optimizer.learning_rate`. The others climb linearly to `optimizer.learning_rate` over `warmup_steps`; then
    `constant` stays, `cosine` falls to `minimum_ratio` of it along half a cosine (Loshchilov and Hutter 2017), `wsd`
    stays and falls linearly over the last `decay_steps` (Hu et al. 2024).
    """
    if step < 1:
        raise ValueError(f"step {step}: steps count from 1")
    warmup, peak = optimizer.warmup_steps, optimizer.learning_rate
    if optimizer.schedule == "noam":
        return peak * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
    if step <= warmup or optimizer.schedule == "constant":
        return peak * min(1.0, step / warmup)
    least = optimizer.minimum_ratio
    if optimizer.schedule == "cosine":
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return peak * (least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * done)))
    decay = min(optimizer.decay_steps or max(1, steps // 10), max(1, steps - warmup))
    left = min(1.0, max(0, steps - step) / decay)
    return peak * (least + (1.0 - least) * left)
