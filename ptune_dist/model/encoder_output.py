"""What an encoder left, as the decoders of transformers take it."""

from transformers.modeling_outputs import BaseModelOutput


class EncoderOutput(BaseModelOutput):
    """Hidden states alone: a mixture of experts also asks for its encoder's routing, to report it."""

    router_logits = None
