"""How likely the right answers are: loss, perplexity, accuracy."""

import math
from collections.abc import Sequence

from ptune_dist.metrics.metric import Metric, References, RowLoss, mean


def mean_loss(rows: Sequence[RowLoss], _: References = ()) -> float:
    """Negative log-likelihood per token of the targets of all rows together."""
    return sum(row.loss for row in rows) / sum(row.num_tokens for row in rows)


def perplexity(rows: Sequence[RowLoss], _: References = ()) -> float:
    """exp of the loss."""
    loss = mean_loss(rows)
    return math.exp(loss) if loss < 700 else math.inf


def accuracy(labels: Sequence[str], references: References) -> float:
    """The share of rows whose right label is the likeliest."""
    return mean(label == right for label, (right,) in zip(labels, references, strict=True))


LOSS = Metric("loss", "losses", mean_loss, higher_is_better=False)
PERPLEXITY = Metric("perplexity", "losses", perplexity, higher_is_better=False)
ACCURACY = Metric("accuracy", "label_losses", accuracy, is_mean=True)
