"""Families of bases: everything that depends on the family, in one file each.

To add a family, write its classes in a file of its own (`family.py` is the interface) and name it here.
"""

from ptune_dist.families.causal import Causal
from ptune_dist.families.encoder import Encoder
from ptune_dist.families.family import Family
from ptune_dist.families.seq2seq import Seq2Seq

# In this order a base is asked whose it is: an encoder-decoder may be listed as a language model too.
FAMILIES: dict[str, Family] = {
    "seq2seq": Seq2Seq(),
    "encoder": Encoder(),
    "causal": Causal(),
}
