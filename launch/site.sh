# Settings of this site, read by launch/run.sh on every node. Edit it, or name another file with PTUNE_SITE=FILE.
# What the job's environment already sets wins.
#
# : "${PTUNE_PYTHON:=/shared/venvs/ptune/bin/python}"   # the interpreter; .venv of this repository where left out
# : "${NCCL_SOCKET_IFNAME:=ib0}"                        # the network between the nodes
# : "${GLOO_SOCKET_IFNAME:=ib0}"                        # the interface that reaches the head node where left out
# : "${NCCL_IB_HCA:=mlx5}"
# : "${HF_HOME:=/shared/huggingface}"
# : "${HF_HUB_OFFLINE:=1}"                              # nodes without a network
# : "${PTUNE_PORT:=29500}"                              # of the head node; derived from the job's number where left out
# : "${PTUNE_PROCS:=8}"                                 # ranks of a node; one per GPU where left out
# : "${PTUNE_START_TIMEOUT_S:=600}"                     # until every node has come, and then every rank
# : "${PTUNE_LOAD_TIMEOUT_S:=3600}"                     # from there to the end of the first step
# : "${PTUNE_MAX_RESTARTS:=3}"                          # in place, after a rank's fault
# : "${PTUNE_MAX_REQUEUES:=100}"                        # by the scheduler
# : "${PTUNE_MAX_IDLE_STARTS:=3}"                       # starts in a row without a step gained
# module load cuda/13.0
