#!/usr/bin/env bash
# What to run when a GPU is there for half an hour, the most valuable first, each part under ten minutes.
#
#   benchmarks/gpu.sh OUT [FLAG VALUE]...   flags of the training scripts, such as --data_dir
#
# OUT/accept.json      does it compute what a CPU computes (python -m harness.accept)
# OUT/step.json        a training step beside the published form (benchmarks/train_step.py)
# OUT/at, vir-trades   ResNet-18 on CIFAR-10 by AT and VIR-TRADES, for MINUTES (default 5) each
# OUT/*/eval-N.json    their evaluation after N epochs
#
# Stopped at any moment, the same command goes on where it was: what is done is left as it is, and each training
# goes on for MINUTES more. A part that fails is named at the end, and the others run. PYTHON names the
# interpreter (default python); ACCEPT, STEP and EVAL are flags of these parts in the place of the defaults.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT [FLAG VALUE]...}; shift
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
scripts=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$scripts${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python} minutes=${MINUTES:-5} failed=()
step=${STEP---model resnet18 wrn34_10 --method at trades vir --repeats 3}
eval=${EVAL---num_steps 20 --num_restarts 1 --alphas 1 2 --num_examples 2000 --attacks pgd100 apgd-ce apgd-t}

part() { # NAME COMMAND...: one part, for ten minutes at most
  echo "== $1"
  timeout -k 30 600 "${@:2}"
  local code=$?
  [ $code = 0 ] || failed+=("$1")
  return $code
}

once() { # FILE CODE COMMAND...: a part that writes FILE by --out, whole with an exit code up to CODE
  [ -f "$out/$1" ] && return
  rm -f "$out/$1.part"
  part "$1" "${@:3}" --out "$out/$1.part"
  if [ $? -le "$2" ] && [ -f "$out/$1.part" ]; then mv "$out/$1.part" "$out/$1"; fi
}

defense() { # NAME RECIPE [FLAG VALUE]...
  local folder=$out/$1 recipe=$2; shift 2
  echo "== ${folder##*/}"
  if [ -f "$folder/config.json" ]; then
    "$python" "$scripts/train_vir.py" --resume "$folder" --stop_after_minutes "$minutes"
  else
    "$python" "$scripts/train_vir.py" --recipe "$recipe" --out_dir "$folder" --stop_after_minutes "$minutes" "$@"
  fi || failed+=("${folder##*/}")
}

evaluated() { # NAME: the last epoch of a training, or what is left of its evaluation
  local folder=$out/$1 epoch
  [ -f "$folder/log.csv" ] || return
  epoch=$(tail -n 1 "$folder/log.csv" | cut -d , -f 1)
  local result=$folder/eval-$epoch
  [ -f "$result.json" ] && return
  if [ -f "$result.record/config.json" ]; then
    part "$1/eval-$epoch.json" "$python" "$scripts/eval_cifar10.py" --resume "$result.record"
  else
    # shellcheck disable=SC2086
    part "$1/eval-$epoch.json" "$python" "$scripts/eval_cifar10.py" $eval --checkpoint "$folder/last.pt" \
      --out "$result.json"
  fi
}

# shellcheck disable=SC2086
once accept.json 1 "$python" -m harness.accept ${ACCEPT:-}
# shellcheck disable=SC2086
once step.json 0 "$python" "$scripts/benchmarks/train_step.py" $step
defense at at "$@"
defense vir-trades vir-trades "$@"
evaluated at
evaluated vir-trades
[ ${#failed[@]} = 0 ] || { echo "failed, or stopped after ten minutes: ${failed[*]}" >&2; exit 1; }
