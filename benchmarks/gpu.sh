#!/usr/bin/env bash
# What to run when a GPU is there for half an hour, the most valuable first, each part under ten minutes.
#
#   benchmarks/gpu.sh OUT [FLAG VALUE]...   flags of the training scripts, such as --data_dir
#
# OUT/accept.json      does it compute what a CPU computes (python -m harness.accept): 10 minutes at most
# OUT/step.json        a training step beside the published form (benchmarks/train_step.py): 5 at most
# OUT/at, vir-trades   ResNet-18 on CIFAR-10 by AT and VIR-TRADES, for MINUTES (default 4) each; a first epoch
#                      that takes longer has 10
# OUT/*/eval-N.json    their evaluation after N epochs: 3 at most, each
#
# Stopped at any moment, the same command goes on where it was: what is done is left as it is, accept and the
# step benchmark (in a checkout without changes) and an evaluation go on, and each training goes on for MINUTES
# more. What does not fit into one half hour is left to the next, which needs no accept and no step benchmark any
# more: MINUTES=9. A part that fails or is stopped is named at the end, and the others run. PYTHON names the
# interpreter (default python); ACCEPT, STEP and EVAL are flags of these parts in the place of the defaults.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT [FLAG VALUE]...}; shift
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
scripts=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$scripts${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python} minutes=${MINUTES:-4} failed=()
step=${STEP---model resnet18 wrn34_10 --method at trades vir --repeats 3}
eval=${EVAL---num_steps 20 --num_restarts 1 --alphas 1 2 --num_examples 2000 --attacks pgd100 apgd-ce apgd-t}

part() { # NAME SECONDS COMMAND...: one part, for so long at most
  echo "== $1"
  timeout -k 30 "$2" "${@:3}"
  local code=$?
  [ $code = 0 ] || failed+=("$1")
  return $code
}

once() { # FILE CODE SECONDS COMMAND...: a part that writes FILE by --out, whole with an exit code up to CODE
  [ -f "$out/$1" ] && return
  part "$1" "$3" "${@:4}" --out "$out/$1.part"
  local code=$?
  [ -f "$out/$1.part" ] || return
  if [ $code -le "$2" ]; then
    mv "$out/$1.part" "$out/$1"
  elif [ $code = 2 ]; then # of another machine or commit: set aside
    mv --backup=numbered "$out/$1.part" "$out/$1.before"
    unset "failed[-1]"
    once "$@"
    [ -f "$out/$1" ] || [ -f "$out/$1.part" ] || mv "$out/$1.before" "$out/$1.part" # of neither: as it was
  fi
}

defense() { # NAME RECIPE [FLAG VALUE]...
  local how=(--recipe "$2" --out_dir "$out/$1" --stop_after_minutes "$minutes" "${@:3}")
  [ -f "$out/$1/config.json" ] && how=(--resume "$out/$1" --stop_after_minutes "$minutes")
  part "$1" 600 "$python" "$scripts/train_vir.py" "${how[@]}"
}

evaluated() { # NAME: the last epoch of a training, or what is left of its evaluation
  local folder=$out/$1 epoch
  [ -f "$folder/log.csv" ] || return
  epoch=$(tail -n 1 "$folder/log.csv" | cut -d , -f 1)
  local result=$folder/eval-$epoch
  [ -f "$result.json" ] && return
  if [ -f "$result.record/config.json" ]; then
    part "$1/eval-$epoch.json" 180 "$python" "$scripts/eval_cifar10.py" --resume "$result.record"
  else
    # shellcheck disable=SC2086
    part "$1/eval-$epoch.json" 180 "$python" "$scripts/eval_cifar10.py" $eval --checkpoint "$folder/last.pt" \
      --out "$result.json"
  fi
}

# shellcheck disable=SC2086
once accept.json 1 600 "$python" -m harness.accept ${ACCEPT:-}
# shellcheck disable=SC2086
once step.json 0 300 "$python" "$scripts/benchmarks/train_step.py" $step
defense at at "$@"
defense vir-trades vir-trades "$@"
evaluated at
evaluated vir-trades
[ ${#failed[@]} = 0 ] || { echo "failed, or stopped for its time: ${failed[*]}" >&2; exit 1; }
