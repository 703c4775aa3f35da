#!/usr/bin/env bash
# Builds, installs, tests, sanitizes, tunes and measures on a machine with a GPU; no network is needed. At most 25 min.
#
#   benchmarks/gpu.sh [--simulated] [--steps NAME,NAME] [--budget SECONDS] [FOLDER]
#
# FOLDER gets a log of each step and the figures; default: benchmarks/results/gpu. Prints a table of steps, and exits
# with 1 when one failed, ran out of time or missed a bar. --simulated tries all of it out without a GPU: what needs one
# is "not run". --steps runs some of build, info, tests, tune, bench, memcheck and racecheck, for machines on which one
# command may take only so long: what an earlier command built and tuned stays. --budget is for all steps of a command.
# PYTHON names another interpreter. It needs Cython, scikit-build-core, cmake, ninja, numpy, msgspec, typer, rich,
# hypothesis and pytest; besides nvcc, compute-sanitizer, a C++ compiler and timeout (coreutils).
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
device=cuda
folder=$root/benchmarks/results/gpu
all_steps=build,info,tests,tune,bench,memcheck,racecheck
steps=$all_steps
budget_s=1500
refuse() { echo "$1: benchmarks/gpu.sh [--simulated] [--steps NAME,NAME] [--budget SECONDS] [FOLDER]" >&2; exit 2; }
while (($#)); do
  case $1 in
    --simulated) device=simulated ;;
    --steps) shift; steps=${1:-}
      for name in ${steps//,/ }; do [[ ,$all_steps, == *,$name,* ]] || refuse "$name is no step of $all_steps"; done
      [[ -n ${steps//,/} ]] || refuse "--steps needs some of $all_steps" ;;
    --budget) shift; budget_s=${1:-}
      [[ $budget_s =~ ^[1-9][0-9]*$ ]] || refuse "--budget needs a number of seconds" ;;
    -*) refuse "$1 is no option" ;;
    *) folder=$1 ;;
  esac
  shift
done
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
python=$(command -v "$python") || { echo "there is no $python: set PYTHON" >&2; exit 2; }

export KVBM_DEVICE=$device PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # where toolkits put compute-sanitizer
unset PYTHONPATH KVBM_BACKEND KVBM_NATIVE
began=$SECONDS
rows=()
has_failed=0

note() { # step, result, seconds, log
  rows+=("$(printf '%-10s %-10s %6s s  %s' "$1" "$2" "$3" "$4")")
  echo "== $1: $2"
}

# step NAME LIMIT_S COMMAND...: run in the folder, where no source tree stands before the installed package.
step() {
  local name=$1 limit=$2 start=$SECONDS code left
  shift 2
  if [[ ,$steps, != *,$name,* ]]; then
    note "$name" "left out" 0 "--steps"
    return 0
  fi
  left=$((budget_s - SECONDS + began))
  if ((left < 5)); then
    note "$name" "NO TIME" 0 "the $budget_s s of all steps are over"
    has_failed=1
    return 1
  fi
  ((limit > left)) && limit=$left
  echo "== $name (at most $limit s): $*"
  (cd "$folder" && timeout --kill-after=10 "$limit" "$@") 2>&1 | tee "$folder/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) note "$name" passed $((SECONDS - start)) "$name.log"; return 0 ;;
    124 | 137) note "$name" "TIMED OUT" $((SECONDS - start)) "after $limit s, $name.log" ;;
    *) note "$name" FAILED $((SECONDS - start)) "status $code, $name.log" ;;
  esac
  has_failed=1
  return 1
}

finish() {
  printf '\n%-10s %-10s %8s  %s\n' step result time log
  printf '%s\n' "${rows[@]}"
  echo "figures and logs: $folder"
  exit $has_failed
}

pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q)
kvbm=("$python" -c "from kvbm.cli.main import main; main()")
kernels=("$root"/tests/device/test_kernels_*.py)

if [[ $device == cuda ]]; then
  export KVBM_CUDA=${KVBM_CUDA:-ON}
  which=(-m gpu)
else
  export KVBM_CUDA=${KVBM_CUDA:-OFF}
  which=(-m "not gpu")
fi

# The limits add up to the budget: what comes last is sure of its time.
step build 360 "$python" -m pip install --no-build-isolation --no-deps --force-reinstall "$root" || finish
step info 30 "${kvbm[@]}" info
step tests 330 "${pytest[@]}" "${which[@]}" "$root/tests/gpu" "$root/tests/device"

if [[ $device == cuda ]]; then
  step tune 90 "${kvbm[@]}" tune --json "$folder/tune.json"
else
  step tune 90 "${kvbm[@]}" tune --dry-run --repeats 1 --most-mib 1 --json "$folder/tune.json"
fi
plot=()
"$python" -c "import matplotlib" 2>/dev/null && plot=(--plot "$folder/gpu.png")
step bench 270 "${kvbm[@]}" bench gpu --bars --json "$folder/gpu.json" ${plot[@]+"${plot[@]}"}

# Single launches with known inputs; the random ones repeat them, some fifty times slower under the sanitizer.
for tool in memcheck racecheck; do
  if [[ $device == cuda ]]; then
    step "$tool" 210 compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all \
      "${pytest[@]}" -m gpu -k "not random" "${kernels[@]}"
  else
    note "$tool" "not run" 0 "needs a GPU"
  fi
done
finish
