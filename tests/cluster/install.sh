#!/usr/bin/env bash
# Install what tests/cluster needs, where that is possible; without it those tests are skipped.
set -euo pipefail

missing=()
command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null || missing+=(slurm-wlm)
command -v munged >/dev/null || missing+=(munge)
command -v ip >/dev/null || missing+=(iproute2)
command -v /usr/sbin/sshd >/dev/null || missing+=(openssh-server)
if [ ${#missing[@]} = 0 ]; then exit 0; fi

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests/cluster will be skipped: it needs ${missing[*]}, which root can install where there is apt-get"
  exit 0
fi
echo "installing ${missing[*]} for tests/cluster"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then # Debian starts the daemons of what it installs; 101 forbids that: the tests start their own
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
if ! { apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  echo "tests/cluster will be skipped: apt-get could not install ${missing[*]}: $(tail -1 "$log")"
fi
rm -f "$log"
