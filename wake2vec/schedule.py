"""The learning rate as a pure function of the step, so that a resume needs nothing but the step."""

import math


def learning_rate_at(step: int, *, learning_rate: float, warmup_steps: int, max_steps: int) -> float:
    """Return the rate of one optimizer step: linear warm-up, then a cosine towards zero.

    `step` counts from 1. The last warm-up step and the one after it both have the full rate; the last step of the run
    is not yet zero, so that it still teaches something.
    """
    assert 1 <= step <= max_steps, f"step {step} is outside 1..{max_steps}"
    if step <= warmup_steps:
        return learning_rate * step / warmup_steps
    progress = (step - 1 - warmup_steps) / (max_steps - warmup_steps)
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
