#!/usr/bin/env bash
# Start a job on hosts that have no scheduler.
#
# usage: launch/ssh.sh HOSTFILE CONFIG [key.path=value ...]
# HOSTFILE is DeepSpeed's: a line `worker-1 slots=8` for each host, # for comments; slots are the ranks of a host. Every
# host needs this repository and the config at the same place, a shared output_dir, and to be reached by ssh without a
# question. The first host is the head. Each line of output is begun with its host; where one host fails, all are ended,
# and the first failure's status is returned. PTUNE_SSH="ssh -p 2222" picks another command.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: launch/ssh.sh HOSTFILE CONFIG [key.path=value ...]" >&2; exit 2; }
hostfile=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -ra ssh <<<"${PTUNE_SSH:-ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=10 -o ServerAliveCountMax=3}"

hosts=() slots=()
[ -r "$hostfile" ] || { echo "error: $hostfile: no such file" >&2; exit 2; }
while read -r number line; do
  line=${line%%#*}
  [ -n "${line// /}" ] || continue
  if ! [[ $line =~ ^[[:space:]]*([^[:space:]=]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]]; then
    echo "error: $hostfile: line $number: '$line' is not 'HOST slots=NUMBER'" >&2
    exit 2
  fi
  hosts+=("${BASH_REMATCH[1]}") slots+=("${BASH_REMATCH[2]}")
done < <(cat -n "$hostfile")
[ ${#hosts[@]} -gt 0 ] || { echo "error: $hostfile names no host" >&2; exit 2; }
repeated=$(printf '%s\n' "${hosts[@]}" | sort | uniq -d | head -n 1)
[ -z "$repeated" ] || { echo "error: $hostfile names $repeated twice" >&2; exit 2; }

names=("${hosts[@]#*@}") # user@host is ssh's business
head=${PTUNE_HEAD_ADDRESS:-${names[0]}}
job=ssh-$(date +%Y%m%d-%H%M%S)-$$
passed=()
for name in PTUNE_SITE PTUNE_PORT PTUNE_PYTHON PTUNE_START_TIMEOUT_S PTUNE_MAX_RESTARTS; do
  [ -z "${!name:-}" ] || passed+=("$name=${!name}")
done

# On the host: the launcher, and TERM for it (save, exit 75) when standard input ends, as it does when we are gone.
# shellcheck disable=SC2016
on_host='cd "$1" && shift || exit 2
exec 3<&0
env "$@" </dev/null 3<&- & launcher=$!
{ cat <&3 >/dev/null; kill -TERM $launcher; } 2>/dev/null & reader=$!
wait $launcher; status=$?
pkill -P $reader 2>/dev/null; kill $reader 2>/dev/null
exit $status'

pids=() inputs=()
for i in "${!hosts[@]}"; do
  command=$(printf '%q ' bash -c "$on_host" ssh.sh "$PWD" PTUNE_NUM_NODES=${#hosts[@]} PTUNE_NODE_RANK="$i" \
    PTUNE_HEAD_ADDRESS="$head" PTUNE_NODE_NAMES="$(IFS=,; echo "${names[*]}")" PTUNE_JOB_ID="$job" \
    PTUNE_PROCS="${slots[i]}" "${passed[@]}" "$root/launch/run.sh" "$@")
  exec {input}> >(
    trap '' INT TERM # a Ctrl-C in the terminal is ours to pass on
    for other in "${inputs[@]}"; do exec {other}>&-; done
    "${ssh[@]}" "${hosts[i]}" "$command" 2>&1 | sed -u "s/^/${names[i]}: /"
    exit "${PIPESTATUS[0]}"
  )
  pids+=($!) inputs+=("$input")
done

end_hosts() { # each launcher is asked to save and to end
  for input in "${inputs[@]}"; do exec {input}>&-; done
  inputs=()
}
trap end_hosts INT TERM

first=0
for _ in "${pids[@]}"; do
  while wait -n -p ended "${pids[@]}"; status=$?; [ -z "${ended:-}" ]; do :; done # a trap interrupts it
  remaining=()
  for pid in "${pids[@]}"; do [ "$pid" = "$ended" ] || remaining+=("$pid"); done
  pids=("${remaining[@]}")
  if [ "$status" != 0 ] && [ "$first" = 0 ]; then
    first=$status
    end_hosts
  fi
done
exit "$first"
