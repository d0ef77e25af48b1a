#!/usr/bin/env bash
# Start a job on hosts that have no scheduler.
#
# usage: launch/ssh.sh HOSTFILE [--check] CONFIG [key.path=value ...]
# HOSTFILE has DeepSpeed's format: one line `worker-1 slots=8` per host, where slots is the number of ranks, and
# comments after #. Every host needs this repository and the config at the same path, a shared output_dir, and ssh
# access without a password prompt. The first host is the head; if the others cannot reach it by that name, set
# PTUNE_HEAD_ADDRESS.
# Each line of output starts with its host. If one host fails, or on Ctrl-C, the others are asked to save and exit; the
# status of the first failure is returned. With train.nodes=replicas the others continue without a host that fails, and
# the status is 0 if one of them finishes the run. PTUNE_SSH="ssh -p 2222" replaces ssh.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: launch/ssh.sh HOSTFILE [--check] CONFIG [key.path=value ...]" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
hostfile=$1
shift

[ -r "$hostfile" ] || { echo "error: $hostfile: no such file" >&2; exit 2; }
hosts=() slots=() number=0
while read -r line || [ -n "$line" ]; do
  number=$((number + 1)) line=${line%%#*}
  [ -n "${line//[[:space:]]/}" ] || continue
  if ! [[ $line =~ ^[[:space:]]*([^[:space:]=]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]]; then
    echo "error: $hostfile: line $number: '$line' is not 'HOST slots=NUMBER'" >&2
    exit 2
  fi
  hosts+=("${BASH_REMATCH[1]}") slots+=("${BASH_REMATCH[2]}")
done <"$hostfile"
[ ${#hosts[@]} -gt 0 ] || { echo "error: $hostfile names no host" >&2; exit 2; }
repeated=$(printf '%s\n' "${hosts[@]}" | sort | uniq -d | head -n 1)
[ -z "$repeated" ] || { echo "error: $hostfile names $repeated twice" >&2; exit 2; }

names=("${hosts[@]#*@}") # only ssh needs user@
settings=(
  PTUNE_NUM_NODES=${#hosts[@]} PTUNE_HEAD_ADDRESS="${PTUNE_HEAD_ADDRESS:-${names[0]}}"
  PTUNE_NODE_NAMES="$(IFS=,; echo "${names[*]}")" PTUNE_JOB_ID="ssh-$(date +%Y%m%d-%H%M%S)-$$" PTUNE_STOP_WITH_INPUT=1
)
for name in PTUNE_SITE PTUNE_PORT PTUNE_PYTHON PTUNE_START_TIMEOUT_S PTUNE_LOAD_TIMEOUT_S PTUNE_MAX_RESTARTS \
  PTUNE_RENDEZVOUS PTUNE_TLS; do
  [ -z "${!name:-}" ] || settings+=("$name=${!name}")
done
read -ra ssh <<<"${PTUNE_SSH:-ssh}"
ssh+=(-T -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=10 -o ServerAliveCountMax=3)

# The standard input of all hosts, to which nothing is written. When it ends, because we close it or die, the launchers
# stop.
lifeline=$(mktemp -u) && mkfifo -m 600 "$lifeline" && exec 9<>"$lifeline" 8<"$lifeline" && rm "$lifeline" || exit 1
stop_hosts() {
  exec 9>&-
  trap 'exit 130' INT TERM # a second one does not wait for the hosts
}
trap stop_hosts INT TERM

run_hosts() { # prints the exit status of each host
  exec 9>&-
  trap '' INT TERM # only we handle a Ctrl-C in the terminal
  for i in "${!hosts[@]}"; do
    command=$(printf '%q ' "${settings[@]}" PTUNE_NODE_RANK="$i" PTUNE_PROCS="${slots[i]}" "$root/launch/run.sh" "$@")
    {
      "${ssh[@]}" "${hosts[i]}" "cd $(printf %q "$PWD") && exec env $command" 2>&1 | sed -u "s/^/${names[i]}: /" >&3
      echo "${PIPESTATUS[0]}"
    } <&8 &
  done
  wait
}

nodes=$(PTUNE_NUM_NODES=${#hosts[@]} "$root/launch/run.sh" --show-nodes "$@" 2>/dev/null)
exec 3>&1
first=0 is_finished=''
while read -r status; do
  if [ "$status" = 0 ]; then is_finished=1; fi
  if [ "$status" != 0 ] && [ "$first" = 0 ]; then
    first=$status
    if [ "$nodes" != replicas ]; then stop_hosts; fi
  fi
done < <(run_hosts "$@")
if [ "$nodes" = replicas ] && [ -n "$is_finished" ]; then first=0; fi
exit "$first"
