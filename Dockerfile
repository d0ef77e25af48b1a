# syntax=docker/dockerfile:1
# The image for launch/kubernetes/, launch/aws_batch.json and launch/azureml.yaml. Any user id may run it:
#   docker build --tag registry.example.com/ptune_dist:0.1.0 .
# For hosts whose NVIDIA driver is older than 580, add --build-arg PTUNE_CUDA=12.6 (driver 525 or newer).
#   docker run --rm --gpus all --shm-size 16g --volume "$PWD/runs:/runs" registry.example.com/ptune_dist:0.1.0 \
#     launch/run.sh configs/quickstart.yaml output_dir=/runs/quickstart
#
# torch's wheels contain CUDA, cuDNN and NCCL, so the base image is NVIDIA's smallest for the same CUDA version.
# DeepSpeed compiles async_io (offload to NVMe) on first use and asks nvcc for its version; cuda-minimal-build has nvcc
# and the headers of cudart. A -devel image works as well, but is about 5 GB larger and repeats what the wheel contains.
ARG PTUNE_CUDA=13.0
FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS cuda-13.0
FROM nvidia/cuda:12.6.3-base-ubuntu24.04 AS cuda-12.6
# hadolint ignore=DL3006
FROM cuda-${PTUNE_CUDA}
ARG PTUNE_CUDA

# DeepSpeed and Triton compile code on first use and need a compiler and Python's headers. NCCL uses libibverbs,
# librdmacm and their providers for InfiniBand and RoCE. Ubuntu's mirrors drop old versions, so none is pinned here.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates "cuda-minimal-build-${PTUNE_CUDA%.*}-${PTUNE_CUDA#*.}" g++ libaio-dev python3 python3-dev python3-venv \
        ibverbs-providers libibverbs1 librdmacm1t64
# On AWS with EFA, also install Amazon's libfabric and NCCL plugin; the driver comes from the host:
# RUN python3 -c "import urllib.request as u; u.urlretrieve('https://efa-installer.amazonaws.com/aws-efa-installer-VERSION.tar.gz', '/tmp/efa.tgz')" \
#     && tar --extract --file /tmp/efa.tgz --directory /tmp \
#     && cd /tmp/aws-efa-installer && ./efa_installer.sh --yes --skip-kmod --skip-limit-conf --no-verify
ENV CUDA_HOME=/usr/local/cuda LIBRARY_PATH=/usr/local/cuda/lib64/stubs

# The user is numeric so that Kubernetes can tell that it is not root. OpenShift and others use their own ids, which have
# no entry in /etc/passwd; hence a home and a folder for runs that anyone may write to, and USER for Python's getpass.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /home/ptune ptune \
    && install --directory --mode 1777 /home/ptune /runs

# Only what pip needs is copied first, so that an edit of the code does not install everything again.
WORKDIR /opt/ptune_dist
COPY pyproject.toml README.md LICENSE ./
COPY launch/setup.sh launch/constraints.txt launch/
COPY ptune_dist/__init__.py ptune_dist/
COPY ptune_dist/cluster/torch_builds.py ptune_dist/cluster/
RUN --mount=type=cache,target=/root/.cache/pip bash launch/setup.sh
# Any user can read the code, regardless of the umask of the checkout.
COPY --chmod=a+rX . .

ENV PATH=/opt/ptune_dist/.venv/bin:$PATH HOME=/home/ptune USER=ptune
USER 10001:0
ENTRYPOINT []
CMD ["launch/run.sh", "configs/quickstart.yaml", "output_dir=/runs/quickstart"]
