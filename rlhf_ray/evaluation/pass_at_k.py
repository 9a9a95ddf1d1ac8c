"""The chance that one of k samples passes, estimated from n of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["pass_at_k"]


def pass_at_k(num_passed: npt.NDArray[np.integer], num_samples: int, k: int) -> npt.NDArray[np.float64]:
    r"""Estimate, without bias, the probability that at least one of ``k`` samples passes.

    .. math:: \text{pass@}k = 1 - \binom{n - c}{k} / \binom{n}{k}
              = 1 - \prod_{i = n - c + 1}^{n} (1 - k / i)

    with ``n = num_samples`` and ``c = num_passed``; the product is the numerically stable form. Chen et al., Evaluating
    Large Language Models Trained on Code (arXiv:2107.03374, equation 1).

    Args:
        num_passed: ``[P]``, samples of each prompt that pass, 0 to n.
        num_samples: Samples per prompt, n.
        k: 1 to n.

    Returns:
        ``[P]``, a probability per prompt; their mean is the metric of a dataset.

    Raises:
        ValueError: ``k`` or a count is out of range.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} is not within 1 and num_samples = {num_samples}")
    passed = np.asarray(num_passed)
    if np.any((passed < 0) | (passed > num_samples)):
        raise ValueError(f"num_passed is not within 0 and num_samples = {num_samples}")
    i = np.arange(1, num_samples + 1)
    # A factor below 0 belongs to i < k, where fewer than k samples fail: the product then has the factor of i = k, 0.
    factors = np.where(i[None, :] > num_samples - passed[:, None], 1.0 - k / i[None, :], 1.0)
    probabilities: npt.NDArray[np.float64] = 1.0 - np.prod(np.maximum(factors, 0.0), axis=1)
    return probabilities
