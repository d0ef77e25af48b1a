"""The CUDA path without a GPU: kernels compiled for real architectures, and the model on fake CUDA tensors.

`faked.py` starts a process that believes it has a GPU, `fake_cuda.py` makes it believe so, `counting.py` counts bytes,
launches and host synchronizations there, and the modules named `work_*` hold what runs there.
"""
