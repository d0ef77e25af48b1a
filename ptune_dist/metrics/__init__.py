"""Metrics: from the answers to held-out rows to a number. `METRICS` has what `evaluate.metrics` may name.

To add a metric, write its function and its `Metric` in a file of its own kind (`metric.py` is the interface) and name
it here.
"""

from ptune_dist.metrics.classes import MACRO_F1, MATTHEWS
from ptune_dist.metrics.likelihood import ACCURACY, LOSS, PERPLEXITY
from ptune_dist.metrics.math_answers import FINAL_ANSWER
from ptune_dist.metrics.metric import Metric
from ptune_dist.metrics.numbers import MSE, PEARSON, SPEARMAN
from ptune_dist.metrics.summarization import ROUGE_1, ROUGE_2, ROUGE_L
from ptune_dist.metrics.text import EXACT_MATCH, F1, SQUAD_EM
from ptune_dist.metrics.translation import BLEU, CHRF

METRICS: dict[str, Metric] = {
    "loss": LOSS,
    "perplexity": PERPLEXITY,
    "accuracy": ACCURACY,
    "macro_f1": MACRO_F1,
    "matthews": MATTHEWS,
    "exact_match": EXACT_MATCH,
    "f1": F1,
    "squad_em": SQUAD_EM,
    "final_answer": FINAL_ANSWER,
    "bleu": BLEU,
    "chrf": CHRF,
    "rouge1": ROUGE_1,
    "rouge2": ROUGE_2,
    "rougeL": ROUGE_L,
    "mse": MSE,
    "pearson": PEARSON,
    "spearman": SPEARMAN,
}
