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


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """Moving averages over the steps so far; a value, kept in checkpoints."""

    num_steps: int = 0
    variance_sum: float = 0.0
    """S averaged, not debiased: the averages start at 0."""
    squared_norm_sum: float = 0.0
    """G2 averaged, not debiased."""

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
        keep = 1 - 1 / MEMORY_STEPS
        variance, norm = self.variance_sum, self.squared_norm_sum
        for new_variance, new_norm in zip(variance_S.tolist(), norm_S.tolist(), strict=True):
            variance = keep * variance + (1 - keep) * new_variance
            norm = keep * norm + (1 - keep) * new_norm
        return NoiseScale(
            num_steps=self.num_steps + len(norm_S), variance_sum=variance, squared_norm_sum=norm
        )

    @property
    def gradient_variance(self) -> float | None:
        """S: the variance of one sample's gradient, summed over the parameters; None: not known."""
        return self.variance_sum / self._weight if self.num_steps else None

    @property
    def gradient_squared_norm(self) -> float | None:
        """G2: of the true gradient; None: not known."""
        return self.squared_norm_sum / self._weight if self.num_steps else None

    @property
    def critical_batch(self) -> float | None:
        """S / G2, in samples; None where an average is not positive: not known yet."""
        variance, norm = self.variance_sum, self.squared_norm_sum
        return variance / norm if variance > 0 and norm > 0 else None

    def known(self) -> dict[str, float]:
        """What is known, for an epoch's line of metrics.jsonl."""
        facts = {
            "critical_batch": self.critical_batch,
            "gradient_variance": self.gradient_variance,
            "gradient_squared_norm": self.gradient_squared_norm,
        }
        return {name: value for name, value in facts.items() if value is not None}

    @property
    def _weight(self) -> float:
        """What the averages' weights add up to."""
        return 1 - (1 - 1 / MEMORY_STEPS) ** self.num_steps
