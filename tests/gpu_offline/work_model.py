"""The whole prompted model on a fake GPU: every method and placement, forward and backward."""

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

from ptune_dist.base.int8 import make_int8
from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import DEFAULTS, Recomputer
from ptune_dist.data.batches import Batch
from ptune_dist.families import FAMILIES
from ptune_dist.model.attention import KeysValues
from ptune_dist.model.prompted_model import Contexts, PromptedModel
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.method import BaseFacts
from tests.gpu_offline.counting import CountingFakeTensors, fake_tensors, report
