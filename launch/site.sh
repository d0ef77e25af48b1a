# Settings of this site, read by launch/run.sh on every node. Edit this file, or name another with PTUNE_SITE=FILE.
# Variables that the job's environment sets already win.
#
# : "${PTUNE_PYTHON:=/shared/venvs/ptune/bin/python}"   # the interpreter; by default that of .venv
# : "${NCCL_SOCKET_IFNAME:=ib0}"                        # the network between the nodes
# : "${GLOO_SOCKET_IFNAME:=ib0}"                        # by default the interface that reaches the head
# : "${NCCL_IB_HCA:=mlx5}"
# : "${HF_HOME:=/shared/huggingface}"
# : "${HF_HUB_OFFLINE:=1}"                              # for nodes without a network
# : "${PTUNE_PORT:=29500}"                              # of the head node; by default derived from the job id
# : "${PTUNE_SECRET:=$(cat ~/.ptune-secret)}"            # 16 characters or more, if nodes do not share output_dir
# : "${PTUNE_PROCS:=8}"                                 # ranks per node; by default one per GPU
# : "${PTUNE_START_TIMEOUT_S:=600}"                     # until every node has joined, and then every rank
# : "${PTUNE_LOAD_TIMEOUT_S:=3600}"                     # from then to the end of the first step
# : "${PTUNE_MAX_RESTARTS:=3}"                          # in place, after a failure of a rank
# : "${PTUNE_MAX_REQUEUES:=100}"                        # by the scheduler
# : "${PTUNE_MAX_IDLE_STARTS:=3}"                       # starts in a row that gain no step
# module load cuda/13.0
