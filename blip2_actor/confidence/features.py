"""What a calibration looks at: numbers that every finished row and every result has.

The probability that the model gives a text says most. A model is sure of many short texts, and unsure of long
ones although they are right, so the length counts too.
"""

from __future__ import annotations

import math

FEATURES = ("log_odds", "num_tokens")
"""The log-odds of the text by its log-probability, and the number of its tokens."""
MAX_LOGPROB = -1e-4
"""Above this, rounding decides what a log-probability is."""
MIN_LOGPROB = -60.0


def features_of(logprob: float, num_tokens: int) -> tuple[float, ...]:
    """Return the values of `FEATURES` for a text.

    Args:
        logprob: sum of the log-probabilities of its tokens, natural log.
        num_tokens: its tokens, the end token included.
    """
    bounded = min(max(logprob, MIN_LOGPROB), MAX_LOGPROB)
    log_odds = bounded - math.log(-math.expm1(bounded))
    return (log_odds, float(num_tokens))
