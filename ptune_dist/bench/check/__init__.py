"""The first hour on a GPU: `bash launch/gpu_check.sh` runs tests, a profile and benchmarks in the time that it has.

`plan` reads the parts from configs/bench/gpu_check.yaml, `runner` runs them one after another within a time limit,
`folder` keeps what each has found, so that a later call continues, and `page` and `chart` show it. None of these
imports torch. The commands of parts are `gpu_tests`, `profile` (with `kernels`), `recompiles`, `sharded` and `faults`,
and the sides of matrices in configs/bench/. To add a part, add it to the YAML file.
"""
