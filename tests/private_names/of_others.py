"""Names of Python, torch, datasets, huggingface_hub, accelerate, bitsandbytes and PEFT."""

from tests.private_names.rows import Table, attribute, binary, file, instance, parameter, source

LOST_PEER = "tell a lost peer from a fault of the rank itself"
FLEX = "torch.nn.attention.flex_attention"
MODULE = "torch.nn:Module"
TORCHRUN = "torch.distributed.run:get_args_parser"
WAITS = "tell by its stack that a rank waits for others"

TABLE: Table = {
    "base/load.py": [
        instance(MODULE, "_parameters", "replace parameters without memory"),
        instance(MODULE, "_buffers", "replace buffers without memory"),
    ],
    "base/experts.py": [
        instance(MODULE, "_parameters", "replace the weights of experts"),
    ],
    "base/open.py": [
        instance(MODULE, "_parameters", "embed a few tokens by a copy of the embedding"),
        source("torch.nn:Linear", "torch.empty(", "make layers without memory", "torch.empty"),
        source("torch.nn:Embedding", "torch.empty(", "make embeddings without memory", "torch.empty"),
        parameter("accelerate:init_empty_weights", "include_buffers", "make a base without memory, its buffers apart"),
    ],
    "base/quantized.py": [
        attribute("torch.nn.modules.linear:NonDynamicallyQuantizableLinear", "leave torch's attention module as it is"),
    ],
    "base/fp8.py": [
        attribute("torch:_scaled_mm", "multiply in fp8"),
    ],
    "base/int8.py": [
        attribute("torch:_int_mm", "multiply in int8 on a GPU"),
        parameter("bitsandbytes.functional:int8_vectorwise_quant", "threshold", "quantize activations"),
        attribute("bitsandbytes.functional:int8_vectorwise_quant", "quantize activations"),
        source(
            "bitsandbytes._ops", "bitsandbytes::int8_mixed_scaled_mm", "multiply with outliers", "int8_mixed_scaled_mm"
        ),
        source("bitsandbytes._ops", "bitsandbytes::int8_scaled_mm", "multiply in int8", "int8_scaled_mm"),
        attribute("bitsandbytes.backends.cpu.ops:logger", "silence a warning at its import", "backends.cpu.ops"),
    ],
    "base/fused.py": [
        instance(MODULE, "_parameters", "try a norm with other weights"),
        attribute("torch.utils._python_dispatch:TorchDispatchMode", "count the operations of an activation"),
    ],
    "base/fused_kernels.py": [
        attribute("torch._dynamo:mark_dynamic", "compile once for all numbers of rows", "_dynamo"),
    ],
    "cluster/processes.py": [
        attribute("atexit:_run_exitfuncs", "run exit functions without the rest of Python's cleanup"),
    ],
    "base/own_rows.py": [
        instance(MODULE, "_parameters", "have an embedding look up other rows"),
    ],
    "base/trained.py": [
        instance(MODULE, "_parameters", "take a trained head out of the parameters"),
    ],
    "model/attention_products.py": [
        attribute("torch.cpu:_is_amx_tile_supported", "know how fast products in bfloat16 are"),
        attribute("torch.cpu:_is_avx512_bf16_supported", "know how fast products in bfloat16 are"),
    ],
    "model/from_head.py": [
        instance(MODULE, "_modules", "stand in for the module below the head"),
        instance(MODULE, "_forward_pre_hooks", "call the head again within its own call"),
        instance(MODULE, "_forward_hooks", "call the head again within its own call"),
    ],
    "model/attention_flex.py": [
        attribute("torch._dynamo:mark_dynamic", "compile attention for all lengths at once"),
        source(f"{FLEX}:FlexKernelOptions", "BACKEND", "have one kernel for all lengths", "BACKEND"),
        source(f"{FLEX}:FlexKernelOptions", "bwd_BLOCK_M1", "fit the shared memory of small GPUs", "bwd_BLOCK_"),
        parameter(f"{FLEX}:BlockMask", "mask_mod", "give a block mask tables from the host"),
        parameter(f"{FLEX}:BlockMask", "BLOCK_SIZE", "give a block mask tables from the host"),
    ],
    "distributed/world.py": [
        source(
            "torch.distributed.elastic.agent.server.local_elastic_agent",
            '"TORCHELASTIC_RUN_ID"',
            "know that torchrun started this rank",
            "TORCHELASTIC_RUN_ID",
        ),
    ],
    "run/watch.py": [
        binary("torch:cpu", "gloo/transport", LOST_PEER),
        binary("torch:cpu", "Connection closed by peer", LOST_PEER),
        binary("torch:cpu", "recvValue", LOST_PEER),
        binary("torch:cuda", "ncclRemoteError", LOST_PEER),
        binary("torch:cuda", "heartbeat monitor", LOST_PEER),
    ],
    "cluster/ranks.py": [
        *(
            source(TORCHRUN, f'"{flag}"', "start the ranks of a node", flag)
            for flag in (
                "--rdzv-backend",
                "--rdzv-id",
                "--nnodes",
                "--node-rank",
                "--nproc-per-node",
                "--master-addr",
                "--master-port",
                "--max-restarts",
                "--log-dir",
                "--signals-to-handle",
            )
        ),
        source(
            "torch.distributed.launcher.api",
            '"TORCH_ELASTIC_SHUTDOWN_TIMEOUT"',
            "end ranks that do not end by themselves",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        ),
    ],
    "cluster/stacks.py": [
        file("torch.distributed:all_reduce", "/torch/distributed/", WAITS),
        file("torch.cuda:synchronize", "/torch/cuda/", WAITS),
        file("torch.autograd.graph:_engine_run_backward", "/torch/autograd/graph.py", WAITS),
        attribute("torch.autograd.graph:_engine_run_backward", WAITS),
    ],
    "data/stored_tables.py": [
        attribute("datasets.config:HF_HUB_OFFLINE", "turn to the cache at once without a network"),
        attribute("datasets.exceptions:DatasetsError", "turn its complaints into one line"),
        attribute("datasets:are_progress_bars_disabled", "silence progress bars"),
    ],
    "common/hub.py": [
        attribute("huggingface_hub.utils:get_session", "ask once whether the hub can be reached"),
        attribute("huggingface_hub.constants:ENDPOINT", "ask the hub that is configured"),
    ],
    "prompts/export.py": [
        *(
            parameter("peft:PromptTuningConfig", name, "be read by PEFT")
            for name in ("num_transformer_submodules", "modules_to_save", "token_dim", "num_attention_heads")
        ),
        source("peft.tuners.tuners_utils", '{"prompt_embeddings": ', "be read by PEFT", "prompt_embeddings"),
    ],
    "bench/peft_trainer.py": [
        source("peft:PeftModel", "self.prompt_encoder", "start PEFT from our vectors", "prompt_encoder"),
        instance("peft:PromptEmbedding", "embedding", "start PEFT from our vectors"),
    ],
}
