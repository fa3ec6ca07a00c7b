"""RankMe: the effective rank of the features of any images, without labels.

Garrido et al. 2023, "RankMe: assessing the downstream performance of pretrained self-supervised representations by
their rank", ICML 2023, equation 2: the exponential of the entropy of the normalised singular values p_k, where sigma_k
are the singular values of the features:

    exp(-sum_k p_k log p_k),  p_k = sigma_k / sum_j sigma_j + 1e-7

The effective rank is between 1 and the smaller of n and D. The paper uses the rank to choose among training runs of one
method, for which a higher rank correlated with better linear probes. The rank does not measure whether features are
useful: noise has full rank.

Letters: n images, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unmask.evals.probe_kind import LabelFreeMeasure
from unmask.results import POOLS, PRETRAINED, FeatureScore

EPSILON = 1e-7


def effective_rank(features: np.ndarray) -> float:
    """Return the effective rank of features (n, D), which are neither centred nor scaled."""
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    total = singular.sum()
    if total == 0:  # all features are zero
        return 1.0
    share = singular / total + EPSILON
    return float(np.exp(-(share * np.log(share)).sum()))


def _verdict(rows: Sequence[FeatureScore], limit: int) -> str:
    ranks = {
        name: " and ".join(f"{row.value:.3g} ({POOLS[row.pool]})" for row in rows if row.features == name)
        for name in dict.fromkeys(row.features for row in rows)
    }
    own = ranks.pop(PRETRAINED)
    others = "".join(f"; {name}: {rank}" for name, rank in ranks.items())
    return (
        f"The effective rank of the pre-trained features is {own}, of at most {limit}{others}. Compare it between runs "
        "of one method on the same images: a higher rank usually goes with a better linear probe. By itself it does "
        "not show that pre-training helped."
    )


PROBE = LabelFreeMeasure(
    title="Effective rank (RankMe)",
    metric="effective rank",
    protocol="exponential of the entropy of the normalised singular values (Garrido et al. 2023), no labels",
    measure=effective_rank,
    verdict=_verdict,
)
