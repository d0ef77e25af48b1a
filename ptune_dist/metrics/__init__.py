"""Metrics: from the answers to held-out rows to a number. `METRICS` has what `evaluate.metrics` may name."""

from ptune_dist.metrics.likelihood import ACCURACY, LOSS, PERPLEXITY
from ptune_dist.metrics.metric import Metric
from ptune_dist.metrics.text import EXACT_MATCH
from ptune_dist.metrics.translation import BLEU

METRICS: dict[str, Metric] = {
    "loss": LOSS,
    "perplexity": PERPLEXITY,
    "accuracy": ACCURACY,
    "exact_match": EXACT_MATCH,
    "bleu": BLEU,
}
