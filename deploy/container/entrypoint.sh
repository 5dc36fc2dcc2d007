#!/bin/sh
# What the image runs. `lab`: JupyterLab; flags alone: those of `ddp-launch train`; else ddp-launch.
set -eu

case "${1:-}" in
  lab) shift; set -- python -m jupyterlab --ip=0.0.0.0 --port=8888 --no-browser "$@" ;;
  -*) set -- ddp-launch train "$@" ;;
  *) set -- ddp-launch "$@" ;;
esac

# `docker run --user 0:0`: nothing trains as root. Folders of root's are handed over (Docker makes a
# missing one so), and the rest runs as the owner of `runs`. Where root is an ordinary user outside
# (rootless), it stays: what it writes is that user's.
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
