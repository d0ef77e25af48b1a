"""Prompts: one file per method, how they start, how they are stored, and how they are exported.

To add a method, write its class in a file of its own (`method.py` is the interface) and name it here.
"""

from ptune_dist.prompts.adaption_prompt import AdaptionPrompt
from ptune_dist.prompts.cpt import Cpt
from ptune_dist.prompts.late_prompt import LatePrompt
from ptune_dist.prompts.method import Method
from ptune_dist.prompts.multitask import MultitaskPromptTuning
from ptune_dist.prompts.p_tuning import PTuning
from ptune_dist.prompts.partial_tuning import BiasOnly, HeadOnly, LastLayers, NormsOnly
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.prompts.trainable_tokens import TrainableTokens

METHODS: dict[str, type[Method]] = {
    "prompt_tuning": PromptTuning,
    "p_tuning": PTuning,
    "prefix_tuning": PrefixTuning,
    "adaption_prompt": AdaptionPrompt,
    "trainable_tokens": TrainableTokens,
    "late_prompt": LatePrompt,
    "multitask_prompt_tuning": MultitaskPromptTuning,
    "cpt": Cpt,
    "last_layers": LastLayers,
    "bias_only": BiasOnly,
    "norms_only": NormsOnly,
    "head_only": HeadOnly,
}
