"""The gradient's noise scale, from squared norms that the step leaves in its log.

McCandlish et al., "An Empirical Model of Large-Batch Training" (arXiv 1812.06162), appendix A.1:
the gradient of B samples has the expected squared norm G2 + S / B, where G2 is the true gradient's
squared norm and S the variance (the trace of the covariance) of one sample's gradient. Two sizes of
batch in one step, b and B, give both without bias:

    G2 = (B gB2 - b gb2) / (B - b)        S = (gb2 - gB2) / (1/b - 1/B)

A single step's are noisy, so each is averaged over steps, and then divided: the critical batch is
S / G2. It is the paper's simple noise scale, which knows nothing of Adam's preconditioner.

On the host, without torch: the step measures, this only adds up.

Shapes: S steps; 2 norms, of the small batch (row SMALL) and of the whole (row WHOLE).
"""

from dataclasses import dataclass

import numpy as np

SMALL, WHOLE = range(2)
MEMORY_STEPS = 200
"""Steps of the moving averages. |g|^2 of a step is within some 10 %, and where the batch is small
G2 is the small difference of two such numbers."""
FORGETTING = 3
"""Before that, step k of n weighs as k^2: a run's first gradients are far larger than later ones,
and a plain mean would long be theirs."""


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """Moving averages over the steps so far; a value, kept in checkpoints."""

    num_steps: int = 0
    mean_variance: float = 0.0
    """S, averaged: weights add up to 1 from the first step on, so that nothing is to debias."""
    mean_squared_norm: float = 0.0
    """G2, averaged."""

    def after(self, norm_2S: np.ndarray, small_batch: int, global_batch: int) -> "NoiseScale":
        """With the steps whose squared norms are `norm_2S`, of so many samples each.

        Step by step, so that it does not matter at which steps the log was read. Steps whose
        gradients overflowed are left out.
        """
        found = norm_2S.astype(np.float64)
        found = found[:, np.isfinite(found).all(0)]
        b, B = small_batch, global_batch
        norm_S = (B * found[WHOLE] - b * found[SMALL]) / (B - b)
        variance_S = (found[SMALL] - found[WHOLE]) / (1 / b - 1 / B)
        variance, norm = self.mean_variance, self.mean_squared_norm
        new = zip(variance_S.tolist(), norm_S.tolist(), strict=True)
        for step, (new_variance, new_norm) in enumerate(new, start=self.num_steps + 1):
            keep = 1 - max(1 / MEMORY_STEPS, FORGETTING / (step + FORGETTING - 1))
            variance = keep * variance + (1 - keep) * new_variance
            norm = keep * norm + (1 - keep) * new_norm
        return NoiseScale(
            num_steps=self.num_steps + len(norm_S), mean_variance=variance, mean_squared_norm=norm
        )

    @property
    def gradient_variance(self) -> float | None:
        """S: the variance of one sample's gradient, summed over the parameters; None: not known."""
        return self.mean_variance if self.num_steps else None

    @property
    def gradient_squared_norm(self) -> float | None:
        """G2: of the true gradient; None: not known."""
        return self.mean_squared_norm if self.num_steps else None

    @property
    def critical_batch(self) -> float | None:
        """S / G2, in samples; None where an average is not positive: not known yet."""
        variance, norm = self.mean_variance, self.mean_squared_norm
        return variance / norm if variance > 0 and norm > 0 else None

    def known(self) -> dict[str, float]:
        """What is known, for an epoch's line of metrics.jsonl."""
        facts = {
            "critical_batch": self.critical_batch,
            "gradient_variance": self.gradient_variance,
            "gradient_squared_norm": self.gradient_squared_norm,
        }
        return {name: value for name, value in facts.items() if value is not None}
