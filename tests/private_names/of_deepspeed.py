"""Names of DeepSpeed."""

from tests.private_names.rows import Table, attribute, file, instance, parameter, sets_exactly, source

ZERO = "deepspeed.runtime.zero"
PARTITIONS = f"{ZERO}.partition_parameters"
INIT = f"{PARTITIONS}:Init"
SWAPPER = "deepspeed.runtime.swap_tensor.partitioned_param_swapper:AsyncPartitionedParameterSwapper"
OFFLOAD = f"{ZERO}.parameter_offload:DeepSpeedZeRoOffload"
DEVICES = f"{ZERO}.offload_config:OffloadDeviceEnum"

TABLE: Table = {
    "zero/shard.py": [
        attribute("deepspeed.utils:groups", "reuse hpZ's group"),
        attribute("deepspeed.utils.groups:_get_zero_param_intra_parallel_group", "reuse hpZ's group, made only once"),
        parameter(INIT, "config_dict_or_path", "make the bookkeeping of ZeRO-3 without a model"),
        parameter(INIT, "remote_device", "choose where parts are kept"),
        parameter(INIT, "param_swapper", "give it a swapper for the dtype that goes to NVMe"),
        parameter(INIT, "zero_param_parallel_group", "reuse hpZ's group"),
        attribute(f"{INIT}._convert_to_deepspeed_param", "give a parameter the attributes and methods of ZeRO-3"),
        source(INIT, "param.aligned_size = ", "know a parameter's padded size", "aligned_size"),
        instance(INIT, "local_device", "know where gathered parameters are"),
        instance(INIT, "dp_world_size", "know over how many ranks a parameter is cut"),
        instance(INIT, "rank", "know which part is this rank's"),
        instance(INIT, "remote_device", "know where parts are kept"),
        instance(INIT, "pin_memory", "know whether parts on the host are pinned"),
        instance(INIT, "param_swapper", "write parts to NVMe"),
        instance(INIT, "zero_param_process_group", "know whether hpZ makes a second cut"),
        instance(INIT, "num_ranks_in_param_group", "know over how many ranks hpZ cuts"),
        instance(INIT, "rank_in_group", "know which part of hpZ's cut is this rank's"),
        sets_exactly(
            f"{INIT}._partition_param",
            "data ds_numel ds_numel_aligned ds_quant_scale ds_tensor final_location requires_grad status",
            "set the same attributes on a parameter and on its part",
            "ds_numel_aligned",
        ),
        sets_exactly(
            f"{INIT}._partition_param_sec",
            "ds_numel ds_quant_scale ds_secondary_tensor final_location requires_grad status",
            "set the same attributes on hpZ's part",
            "ds_secondary_tensor",
        ),
        source(INIT, "param.ds_status = ", "mark a parameter as not gathered", "ds_status"),
        source(INIT, "param.ds_numel = param.numel()", "know a parameter's size without padding", "ds_numel"),
        attribute(f"{PARTITIONS}:ZeroParamStatus", "mark a parameter as not gathered"),
        attribute(f"{PARTITIONS}:ZeroParamStatus.NOT_AVAILABLE", "mark a parameter as not gathered"),
        attribute(f"{PARTITIONS}:PartitionedParamStatus", "mark a part as in memory"),
        attribute(f"{PARTITIONS}:PartitionedParamStatus.AVAILABLE", "mark a part as in memory"),
        attribute(DEVICES, "mark and compare where parts are kept"),
        attribute(f"{DEVICES}.nvme", "mark a part as on disk"),
        attribute(f"{DEVICES}.cpu", "allocate a part on the host"),
        attribute("deepspeed.runtime.config:DeepSpeedConfig", "give the swapper its settings"),
        attribute(SWAPPER, "write parts to NVMe"),
        parameter(SWAPPER, "model_dtype", "write parts of one dtype to NVMe", "swapped_dtype"),
        instance(SWAPPER, "elements_per_buffer", "keep in memory what is larger than a buffer"),
        instance(SWAPPER, "dtype", "keep in memory what has another dtype"),
        parameter(f"{SWAPPER}.swappable_tensor", "numel", "keep in memory what is too small for NVMe"),
        attribute(f"{SWAPPER}.get_buffer", "fill a part in the swapper's own buffer"),
        attribute(f"{SWAPPER}.swap_out_and_release", "write a filled part to NVMe"),
    ],
    "zero/layout_check.py": [
        source(INIT, "param.convert_to_zero_parameters = ", "cut a parameter in its way", "convert_to_zero_parameters"),
        *(
            source(INIT, f"param.{name} = ", "compare its cut with ours", name)
            for name in ("ds_shape", "ds_persist", "ds_param_type", "ds_tensor", "ds_secondary_tensor")
        ),
    ],
    "zero/passes.py": [
        source(
            "deepspeed:DeepSpeedEngine._configure_zero_optimizer",
            "optimizer = DeepSpeedZeRoOffload(",
            "get the hooks of ZeRO-3 for a base without an optimizer",
            "self._engine.optimizer",
        ),
        attribute(f"{OFFLOAD}.release_backward_leftovers", "release what backward has gathered"),
        attribute("deepspeed.utils:set_z3_leaf_modules", "gather a layer at once"),
    ],
    "zero/prefetch.py": [
        *(
            source(f"{ZERO}.config:DeepSpeedZeroConfig", f'"{key}"', "choose how much is gathered ahead", key)
            for key in ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance")
        ),
    ],
    "zero/residency.py": [
        source(OFFLOAD, "param.ds_persist = True", "know which parameters DeepSpeed keeps gathered", "ds_persist"),
        source(
            f"{ZERO}.partitioned_param_coordinator:PartitionedParameterCoordinator",
            "params_to_release and not param.is_external_param",
            "keep them gathered in every kind of pass",
            "is_external_param",
        ),
        source(
            f"{ZERO}.config:DeepSpeedZeroConfig",
            '"stage3_param_persistence_threshold"',
            "choose which tensors stay gathered",
            "stage3_param_persistence_threshold",
        ),
        source(
            f"{ZERO}.config:DeepSpeedZeroConfig",
            '"stage3_model_persistence_threshold"',
            "choose how many elements stay gathered",
            "stage3_model_persistence_threshold",
        ),
    ],
    "zero/engine.py": [
        attribute("deepspeed.runtime.config:DeepSpeedConfig", "have DeepSpeed check its JSON"),
        attribute(f"{ZERO}.config:DeepSpeedZeroConfig", "name the section of a refused key"),
        attribute("deepspeed.runtime.precision_config:DeepSpeedFP16Config", "name the section of a refused key"),
        attribute("deepspeed.runtime.precision_config:DeepSpeedBF16Config", "name the section of a refused key"),
    ],
    "zero/gathers.py": [
        attribute("deepspeed.comm:comm", "count gathers where DeepSpeed calls the process group"),
        attribute("deepspeed.comm.comm:cdb", "count gathers where DeepSpeed calls the process group"),
        source(
            "deepspeed.comm.comm:all_gather_into_tensor",
            "cdb.all_gather_into_tensor(output_tensor=output_tensor, input_tensor=tensor, group=group",
            "count gathers by these arguments",
            "all_gather_into_tensor",
        ),
        source("deepspeed.comm.comm:allgather_fn", "return all_gather_into_tensor(", "count every gather", "counted"),
        source(f"{PARTITIONS}:_dist_allgather_fn", "dist.allgather_fn", "count every gather", "counted"),
    ],
    "zero/offload.py": [
        attribute("deepspeed.ops.op_builder:AsyncIOBuilder", "say early what NVMe lacks"),
        parameter("deepspeed.ops.op_builder:AsyncIOBuilder.is_compatible", "verbose", "say early what NVMe lacks"),
    ],
    "zero/setup.py": [
        source(
            "deepspeed.comm.torch:build_shm_op",
            "deepspeed.ops.__compatible_ops__.get(",
            "keep DeepSpeed from compiling its shared-memory all-reduce",
            "__compatible_ops__",
        ),
        attribute("deepspeed.utils:logger", "silence its log lines"),
        parameter("deepspeed:init_distributed", "auto_mpi_discovery", "keep it from looking for MPI"),
    ],
    "base/__init__.py": [
        source(
            "deepspeed.accelerator.real_accelerator",
            'os.environ["DS_ACCELERATOR"]',
            "choose the CPU where there is no GPU",
            "DS_ACCELERATOR",
        ),
    ],
    "base/layers.py": [
        source(INIT, "param.ds_numel = param.numel()", "know the size of a parameter that is cut", "ds_numel"),
        source(INIT, "param.ds_tensor = ", "know the bytes of a rank's part", "ds_tensor"),
        source(INIT, "param.ds_secondary_tensor = ", "know the bytes of hpZ's part", "ds_secondary_tensor"),
        source(INIT, "param.ds_tensor.final_location = ", "know which parts are on disk", "final_location"),
        source(f"{ZERO}.offload_config", 'nvme = "nvme"', "know which parts are on disk", '"nvme"'),
    ],
    "bench/work.py": [
        source(INIT, "param.ds_shape = param.shape", "know the shape of a parameter that is cut", "ds_shape"),
    ],
    "cluster/stacks.py": [
        file(f"{ZERO}.stage3", "/deepspeed/runtime/", "tell by its stack that a rank waits for others"),
    ],
}
