"""Learning rate as a pure function of the step."""

from __future__ import annotations

from configs.schema import OptimizerSection


def learning_rate(optimizer: OptimizerSection, d_model: int, step: int) -> float:
    """The rate of optimizer step `step`, which counts from 1.

    `noam` is equation 3 of Vaswani et al. 2017, d_model^-0.5 * min(step^-0.5, step * warmup_steps^-1.5), times
    `optimizer.learning_rate`; `constant` climbs linearly to `optimizer.learning_rate` over `warmup_steps` and stays.
    """
    if step < 1:
        raise ValueError(f"step {step}: steps count from 1")
    warmup = optimizer.warmup_steps
    if optimizer.schedule == "noam":
        return optimizer.learning_rate * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
    return optimizer.learning_rate * min(1.0, step / warmup)
