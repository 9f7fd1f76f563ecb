#!/usr/bin/env bash
# Trains and evaluates the four defenses of Zeng et al.'s MNIST table by the recipe of their code: SmallCNN,
# 100 epochs, 40 attack steps.
#
#   benchmarks/paper_mnist.sh OUT [FLAG VALUE]...   flags of the training scripts, such as --data_dir
#
# OUT/DEFENSE is a run folder with eval.json in it. Stopped at any moment, the same command goes on where it
# was. PYTHON names the interpreter (default python).
set -euo pipefail
out=${1:?usage: benchmarks/paper_mnist.sh OUT [FLAG VALUE]...}; shift
scripts=$(cd "$(dirname "$0")/.." && pwd)

defense() { # NAME SCRIPT ALPHA [FLAG VALUE]...
  local folder=$out/$1 script=$scripts/$2 alpha=$3; shift 3
  if [ -f "$folder/config.json" ]; then
    "${PYTHON:-python}" "$script" --resume "$folder"
  else
    "${PYTHON:-python}" "$script" --recipe paper --alpha "$alpha" --out_dir "$folder" "$@"
  fi
  [ -f "$folder/eval.json" ] || "${PYTHON:-python}" "$scripts/eval_mnist.py" \
    --checkpoint "$folder/last.pt" --out "$folder/eval.json"
}

defense at train_at_mnist.py 0 "$@"
defense at-alpha0.5 train_at_mnist.py 0.5 "$@"
defense trades train_trades_mnist.py 0 "$@"
defense trades-alpha2 train_trades_mnist.py 2 "$@"
