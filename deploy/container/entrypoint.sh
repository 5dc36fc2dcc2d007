#!/bin/sh
# What the image runs: JupyterLab for `lab`, `ddp-launch train` for flags alone, else `ddp-launch`.
set -eu

case "${1:-}" in
  lab) shift; set -- python -m jupyterlab --ip=0.0.0.0 --port=8888 --no-browser "$@" ;;
  -*) set -- ddp-launch train "$@" ;;
  *) set -- ddp-launch "$@" ;;
esac

# With `docker run --user 0:0`, nothing trains as root. Folders that belong to root (as those do that
# Docker makes) are given to user 1000, and the program runs as the owner of `runs`. In a rootless
# container root is an ordinary user outside, so it stays root: its files belong to that user.
read -r _ outside _ < /proc/self/uid_map
if [ "$(id -u)" = 0 ] && [ "$outside" = 0 ]; then
  for folder in runs data; do
    [ "$(stat --format=%u "$folder")" != 0 ] || chown 1000:1000 "$folder"
  done
  owner=$(stat --format='--reuid=%u --regid=%g' runs)
  # shellcheck disable=SC2086  # two words
  exec setpriv $owner --clear-groups "$@"
fi

for folder in runs data; do
  if [ ! -w "$folder" ]; then
    echo "ddp-training: error: user $(id -u) cannot write $PWD/$folder, which belongs to user" \
      "$(stat --format=%u "$folder"): add --user $(stat --format=%u:%g "$folder") to docker run" >&2
    exit 2
  fi
done
exec "$@"
