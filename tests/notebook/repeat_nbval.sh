#!/bin/sh
# Runs the notebook of %%ranks five times against its committed outputs: all must be equal each time.
set -e
cd "$(dirname "$0")"
for _ in 1 2 3 4 5; do
  "${PYTHON:-python}" -m pytest -q --nbval --nbval-current-env -p no:cacheprovider ranks.ipynb
done
