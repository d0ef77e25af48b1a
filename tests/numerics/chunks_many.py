"""train_many.py with a head in chunks of five tokens, as large vocabularies and batches make them."""

import ptune_dist.model.head
from tests.numerics import train_many

if __name__ == "__main__":
    ptune_dist.model.head.CHUNK_BYTES = 4 * 272 * 5  # float32 logits of five tokens of a tiny base
    train_many.main()
