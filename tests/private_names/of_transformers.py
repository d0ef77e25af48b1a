"""Names of transformers."""

from tests.private_names.rows import Table, attribute, instance, parameter, source

MODEL = "transformers:PreTrainedModel"
GENERATION = "transformers:GenerationMixin"
AUTO = "transformers.models.auto.modeling_auto"
SDPA = "transformers.integrations.sdpa_attention:sdpa_attention_forward"
CACHE = "transformers.cache_utils:Cache"
MODELS = "transformers.models"
T5 = f"{MODELS}.t5.modeling_t5:T5ForConditionalGeneration"
IGNORED = "_keys_to_ignore_on_load_"
LOADING = "transformers.core_model_loading"
# Architectures whose attention layers the tests run over segments: the classes of their layers.
ATTENTION = {
    "llama": "LlamaAttention",
    "qwen2": "Qwen2Attention",
    "gpt2": "GPT2Attention",
    "opt": "OPTAttention",
    "gpt_neox": "GPTNeoXAttention",
}

TABLE: Table = {
    "model/encoder_prefix.py": [
        attribute(f"{MODEL}._supports_attention_backend", "know whether a base's layers call a registered function"),
        attribute("transformers:AttentionInterface.register", "give layers keys and values before their own"),
        attribute("transformers:AttentionMaskInterface.register", "keep the masks of sdpa"),
        attribute(f"{MODEL}.set_attn_implementation", "give layers keys and values before their own"),
        attribute(SDPA, "attend to a prefix and to a row"),
        *(
            parameter(SDPA, name, "attend to a prefix and to a row")
            for name in ("module", "query", "key", "value", "attention_mask")
        ),
        attribute("transformers.masking_utils:sdpa_mask", "keep the masks of sdpa"),
        parameter(f"{MODELS}.bert.modeling_bert:BertModel.forward", "past_key_values", "give layers keys and values"),
        parameter(f"{MODELS}.bert.modeling_bert:BertModel.forward", "position_ids", "count positions from a prefix on"),
    ],
    "model/attention.py": [
        attribute(f"{MODEL}._supports_attention_backend", "know whether a base's layers call a registered function"),
        attribute("transformers:AttentionInterface.register", "have layers call attention over segments"),
        attribute("transformers:AttentionMaskInterface.register", "keep the masks of sdpa"),
        attribute(f"{MODEL}.set_attn_implementation", "have layers call attention over segments"),
        attribute(SDPA, "attend without segments"),
        *(
            parameter(SDPA, name, "attend without segments")
            for name in ("module", "query", "key", "value", "attention_mask", "scaling")
        ),
        attribute("transformers.masking_utils:sdpa_mask", "keep the masks of sdpa"),
        *(
            instance(f"{MODELS}.{kind}.modeling_{kind}:{name}", "layer_idx", "know whose keys and values are read")
            for kind, name in ATTENTION.items()
        ),
        *(
            source(
                f"{MODELS}.{kind}.modeling_{kind}:{name}",
                "**kwargs,",
                "receive the segments of a pass",
                "segments: Any",
            )
            for kind, name in ATTENTION.items()
        ),
        parameter(f"{MODELS}.mistral:MistralConfig", "sliding_window", "know the window of attention"),
        parameter(f"{MODELS}.gemma2:Gemma2Config", "attn_logit_softcapping", "leave capped attention to the base"),
        parameter(f"{MODELS}.gemma2:Gemma2Config", "layer_types", "leave layers without attention to the base"),
        instance(f"{MODELS}.gpt_oss.modeling_gpt_oss:GptOssAttention", "sinks", "leave sinks to the base"),
    ],
    "model/head.py": [
        parameter("transformers:PreTrainedConfig.get_text_config", "decoder", "know the size of the vocabulary"),
    ],
    "model/from_head.py": [
        attribute(f"{MODEL}.base_model_prefix", "find the module below the head"),
        source(f"{MODELS}.opt.modeling_opt:OPTForCausalLM", "self.model.decoder(", "be OPT's decoder", "decoder"),
        source(
            T5,
            "self.decoder(",
            "stand in for T5's decoder",
            "decoder",
        ),
        parameter(f"{T5}.forward", "encoder_outputs", "skip the encoder"),
        parameter(
            f"{T5}.forward",
            "decoder_inputs_embeds",
            "give a hidden state to the head",
        ),
    ],
    "model/given_cache.py": [
        attribute(CACHE, "give keys and values to bases with their own attention"),
        parameter(CACHE, "layers", "make a cache without storage"),
        *(
            parameter(f"{CACHE}.update", name, "return [context, new]")
            for name in ("key_states", "value_states", "layer_idx")
        ),
        parameter(f"{CACHE}.get_seq_length", "layer_idx", "count the positions of a context"),
        parameter(f"{CACHE}.get_mask_sizes", "query_length", "count the keys of a mask"),
        parameter(f"{CACHE}.get_mask_sizes", "layer_idx", "count the keys of a mask"),
        attribute(f"{CACHE}.get_query_offset", "count the positions before the first query"),
        attribute(f"{CACHE}.is_compileable", "not be compiled"),
        attribute(f"{MODEL}._is_stateful", "leave bases alone that keep more than keys and values"),
        attribute(f"{CACHE}.is_sliding", "have masks without windows"),
        source(
            f"{MODELS}.bloom.modeling_bloom:BloomAttention", "layer_past.update(", "give BLOOM its contexts", "update"
        ),
    ],
    "base/multimodal.py": [
        attribute(f"{AUTO}:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "know whether a language model has a class of its own"),
        attribute("transformers.models.auto.configuration_auto:CONFIG_MAPPING", "make the shape of a text model"),
    ],
    "families/causal.py": [
        attribute(f"{AUTO}:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "know the family of an architecture"),
    ],
    "families/generation.py": [
        parameter(
            f"{GENERATION}.prepare_inputs_for_generation", "inputs_embeds", "know whether a base continues from vectors"
        ),
        source(f"{GENERATION}._validate_model_kwargs", '"kwargs" in model_args', "take what forward takes", "kwargs"),
    ],
    "model/encoder_output.py": [
        attribute("transformers.modeling_outputs:BaseModelOutput", "give a decoder what its encoder left"),
        source(
            f"{MODELS}.nllb_moe.modeling_nllb_moe:NllbMoeModel.forward",
            "encoder_outputs.router_logits",
            "run NLLB-MoE's decoder",
            "router_logits",
        ),
    ],
    "families/causal_padded.py": [
        attribute(f"{MODEL}.base_model_prefix", "run the base without its head"),
        *(
            parameter(target, "past_key_values", "know whether a base keeps keys and values, and give it some")
            for target in (f"{MODELS}.llama:LlamaModel.forward", f"{MODELS}.bloom:BloomForCausalLM.forward")
        ),
        source(GENERATION, "inputs_embeds[:, -next_sequence_length:, :]", "skip vectors that are in a cache", "unread"),
    ],
    "families/segment_inputs.py": [
        source(
            "transformers.masking_utils:_preprocess_mask_arguments",
            "len(attention_mask.shape) == 4",
            "pass a mask of four dimensions through untouched",
            "no_mask",
        ),
    ],
    "families/seq2seq.py": [
        attribute(f"{AUTO}:MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "know the family of an architecture"),
        attribute(f"{MODEL}.get_encoder", "read the contexts of a seq2seq base"),
        attribute(f"{MODEL}.get_decoder", "embed what a decoder reads"),
        attribute("transformers:EncoderDecoderCache", "compute the keys and values of an encoder's output once"),
        *(
            parameter(f"{T5}.forward", name, "give a decoder what its encoder left")
            for name in ("past_key_values", "encoder_outputs", "decoder_inputs_embeds")
        ),
        source(
            f"{MODELS}.t5.modeling_t5:T5Attention",
            "if is_cross_attention and past_key_values is not None and is_updated:",
            "compute the keys and values of an encoder's output once",
            "crossed",
        ),
    ],
    "model/seq2seq_prefix.py": [
        attribute(CACHE, "give an encoder's attention a prefix"),
        attribute("transformers:EncoderDecoderCache", "give a decoder prefixes"),
        instance("transformers:EncoderDecoderCache", "is_updated", "read the encoder's output behind a prefix"),
        attribute("transformers:DynamicCache", "continue from a prefix"),
        *(
            source(
                f"{MODELS}.{kind}", "past_key_values.is_updated.get(", "read the encoder behind a prefix", "is_updated"
            )
            for kind in ("t5.modeling_t5:T5Attention", "bart.modeling_bart:BartAttention")
        ),
    ],
    "families/seq2seq_decoder.py": [
        attribute("transformers.cache_utils:DynamicLayer", "drop the padding of rows that have left"),
        attribute("transformers:EncoderDecoderCache.batch_select_indices", "let rows leave a batch"),
        instance(
            "transformers:EncoderDecoderCache", "cross_attention_cache", "drop the padding of rows that have left"
        ),
    ],
    "families/encoder.py": [
        attribute(f"{AUTO}:MODEL_FOR_MASKED_LM_MAPPING_NAMES", "know the family of an architecture"),
        attribute(f"{AUTO}:MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "know the family of an architecture"),
        attribute(f"{MODEL}.base_model", "tell an encoder's parts from its heads"),
    ],
    "base/architecture.py": [
        attribute(f"{AUTO}:AutoModelForCausalLM._model_mapping", "know the classes that a user has registered"),
    ],
    "base/converted.py": [
        attribute("transformers.conversion_mapping:get_model_conversion_mapping", "know what is joined"),
        *(
            attribute(f"transformers.core_model_loading:{name}", "rename and join as transformers does")
            for name in (
                "Concatenate",
                "MergeModulelist",
                "WeightConverter",
                "WeightRenaming",
                "dot_natural_key",
                "rename_source_key",
            )
        ),
    ],
    "base/experts.py": [
        source(
            "transformers.integrations.moe:use_experts_implementation", "_apply_gate", "gate experts", "_apply_gate"
        ),
    ],
    "base/names.py": [
        *(
            attribute(f"{MODEL}.{IGNORED}{kind}", "know which tensors may differ between a file and a model", IGNORED)
            for kind in ("missing", "unexpected")
        ),
        attribute("transformers.conversion_mapping:get_model_conversion_mapping", "know which tensors need converting"),
        attribute(f"{LOADING}:WeightTransform.rename_source_key", "know which tensors need converting"),
        attribute(f"{LOADING}:WeightConverter.operations", "tell conversions from renames"),
        attribute(f"{MODEL}.base_model_prefix", "find tensors that are stored with or without their prefix"),
    ],
    "base/loaded_weights.py": [
        *(
            source("transformers.utils.loading_report:LoadStateDictInfo", f"{key}:", "know what was not loaded", key)
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        ),
    ],
    "base/fused.py": [
        attribute("transformers.models.llama.modeling_llama:LlamaMLP", "know a gated MLP by its forward"),
        attribute("transformers.models.t5.modeling_t5:T5DenseGatedActDense", "know a gated MLP by its forward"),
        attribute("transformers.models.llama.modeling_llama:apply_rotary_pos_emb", "find rotary embeddings"),
        instance("transformers.models.llama.modeling_llama:LlamaRMSNorm", "variance_epsilon", "know a norm's eps"),
    ],
    "base/quantized.py": [
        attribute("transformers.pytorch_utils:Conv1D", "quantize GPT-2's linear layers"),
    ],
    "base/source.py": [
        attribute("transformers.utils.hub:cached_file", "find the files of a base"),
    ],
    "base/weight_files.py": [
        attribute("transformers.utils.hub:cached_file", "find the files of a base"),
        parameter("transformers.utils.hub:cached_files", "local_files_only", "not ask a hub that cannot be reached"),
        parameter(
            "transformers.utils.hub:cached_files",
            "_raise_exceptions_for_missing_entries",
            "ask for files that may be missing",
        ),
    ],
    "evaluation/generate.py": [
        parameter(f"{GENERATION}.generate", "synced_gpus", "keep gathering for ranks that are not done"),
    ],
    "bench/loading.py": [
        attribute("transformers.integrations:HfDeepSpeedConfig", "have transformers load a base under ZeRO-3"),
    ],
    "bench/peft_trainer.py": [
        parameter("transformers:Trainer.training_step", "inputs", "count the rows that reach the model"),
        parameter("transformers:TrainingArguments", "train_sampling_strategy", "group rows of like length"),
    ],
}
