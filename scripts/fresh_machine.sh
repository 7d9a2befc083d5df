#!/usr/bin/env bash
# What a newcomer's machine does: a fresh clone of the last commit, an empty HOME, nothing from this environment.
#
#   scripts/fresh_machine.sh                        make setup, make train, make test on pip's public index
#   scripts/fresh_machine.sh setup train            some of the steps
#   scripts/fresh_machine.sh --pip-settings setup   with this machine's pip settings
#
# Prints the seconds of each step and the disk that is then in use. PYTHON and DEVICE are passed on; WORK names the
# folder that is used and, unless KEEP=1, removed at the end.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
settings=(PIP_CONFIG_FILE=/dev/null)
# How the network is reached is no setting of pip's: proxies, and the certificate of a network that has its own.
network=()
for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY SSL_CERT_FILE; do
  [ -z "${!name:-}" ] || network+=("$name=${!name}")
done
if [ "${1:-}" = --pip-settings ]; then
  shift
  settings=(XDG_CONFIG_HOME="${XDG_CONFIG_HOME:-$HOME/.config}")
  while IFS= read -r line; do settings+=("$line"); done < <(env | grep '^PIP_' || true)
fi
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(setup train test)
work=${WORK:-$(mktemp -d)}
mkdir -p "$work/home"
[ -n "${KEEP:-}" ] || trap 'rm -rf "$work"' EXIT
git clone --quiet "$source" "$work/igrpo"

clean() {
  env -i PATH="$PATH" HOME="$work/home" LANG=C.UTF-8 ${PYTHON:+PYTHON="$PYTHON"} ${DEVICE:+DEVICE="$DEVICE"} \
    ${network[@]+"${network[@]}"} "${settings[@]}" "$@"
}
megabytes() { du -sm "$@" 2>/dev/null | awk '{ sum += $1 } END { print sum + 0 }'; }

for step in "${steps[@]}"; do
  start=$SECONDS
  clean make -C "$work/igrpo" --no-print-directory "$step"
  echo "fresh machine: make $step took $((SECONDS - start)) s; .venv holds $(megabytes "$work/igrpo/.venv") MB," \
    "caches in HOME $(megabytes "$work/home") MB, everything $(megabytes "$work") MB"
done
