#!/usr/bin/env bash
# Builds, tests and measures FastFlow on a CUDA machine, without downloading anything. Stops after ten minutes.
#
#   bash benchmarks/gpu_pass.sh [FOLDER]
#
# Rows go to FOLDER (benchmarks/results) as they are measured, logs and the summary to FOLDER/gpu_pass. It needs torch 2.11 or
# newer, triton, nvcc, ninja, pybind11, setuptools, pytest, pytest-xdist, pytest-benchmark, hypothesis, tqdm and matplotlib.
#
# Stages run in order of importance, each with a time limit; a stage that fails or is cut does not stop the next. The tests run
# at the same time as the stages that check memory accesses; nothing else runs while times are measured. The exit status is 1 if
# a stage failed, was cut or had no time. The last line is a command that runs the stages that were cut or had no time.
#
# Without a GPU it runs the same stages with tiny sizes, as a test of the script; FOLDER is required then.
#
#   PYTHON=python3              interpreter
#   MINUTES=9.5                 time limit of all stages together
#   INSTALL=1                   0: FastFlow is installed already
#   STAGES="tests memcheck"     only these stages
#   COMPILED=--no-compiled      --compiled: torch.compile too, which takes seconds per case of an op and minutes per model
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} MINUTES=${MINUTES:-9.5} INSTALL=${INSTALL:-1} COMPILED=${COMPILED:---no-compiled}
gpu=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))') || exit 1
if [ "$gpu" = 0 ] && [ $# = 0 ]; then
  echo "no GPU: sizes are tiny, and their rows must not be added to the results; give a folder for them" >&2
  exit 2
fi
mkdir -p "${1:-benchmarks/results}/gpu_pass/docs/pictures"
results=$(cd "${1:-benchmarks/results}" && pwd)
logs=$results/gpu_pass
cp docs/*.md "$logs/docs/" # the benchmarks write tables into copies of the pages
table=$logs/glow_network.json # of network="auto"; its place in the package is fastflow/nn/networks/glow_network.json
summary=$logs/summary.txt
end=$("$PYTHON" -c "print(int(60 * $MINUTES))")
: >"$summary"
export PYTHONUNBUFFERED=1

say() { printf '%-22s %s\n' "$@" | tee -a "$summary"; }

stage() { # NAME SECONDS COMMAND...: runs it for at most SECONDS and at most until the end
  local name=$1 limit=$2 left=$((end - SECONDS)) began=$SECONDS how code
  shift 2
  if [ -n "${STAGES:-}" ] && [[ " $STAGES " != *" $name "* ]]; then return; fi
  if [ "$left" -lt 10 ]; then
    say "$name" "left out: no time"
    return
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  case $code in
    0) how=passed ;;
    77) how="skipped: $(tail -n 1 "$logs/$name.log")" ;;
    124 | 130 | 137) how="cut after $limit s" ;;
    *) how="failed ($code): $(tail -n 1 "$logs/$name.log" | cut -c1-160)" ;;
  esac
  say "$name" "$((SECONDS - began)) s  $how"
}

install() {
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
  export FASTFLOW_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
  "$PYTHON" -m pip install --no-build-isolation --no-deps -q -e .
}

tests() {
  # They compile some 3,000 Triton kernels, which takes about 1,100 seconds of one core. Tests of 17 to 30 GB wait for each other.
  local workers=$(($(nproc) < 16 ? $(nproc) : 16))
  exec "$PYTHON" -m pytest -m gpu -n "$workers" --dist worksteal -q -rfE --durations=10 --benchmark-disable \
    --show-capture=no tests
}

sanitizer() { # TOOL: runs the small cases under compute-sanitizer; 77 if the machine does not allow it
  local tool=(compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all)
  if ! command -v compute-sanitizer; then
    echo "no compute-sanitizer here"
    return 77
  fi
  local looked
  looked=$("${tool[@]}" "$PYTHON" -c 'import torch; torch.zeros(3, device="cuda").sum().item()' 2>&1) || {
    echo "$looked"
    echo "compute-sanitizer does not run a small program of torch here"
    return 77
  }
  "${tool[@]}" "$PYTHON" -m benchmarks.tools.small_cases
}

if [ "$gpu" = 1 ]; then
  device=cuda quick=()
  [ "$INSTALL" = 0 ] || stage install 240 bash -c "$(declare -f install); PYTHON=$PYTHON install"
else
  device=cpu quick=(--quick)
fi
benchmark() { # FOLDER.NAME SECONDS OPTIONS...
  local module=$1 limit=$2
  shift 2
  stage "${module##*.}" "$limit" "$PYTHON" -m "benchmarks.$module" --device "$device" --results "$results" "${quick[@]}" "$COMPILED" "$@"
}

others=$("$PYTHON" -c 'from benchmarks.tools.harness import with_cases
first = {"affine_coupling", "conv1x1", "glow_network", "lu_weight"}
found = {name: module.__name__.removeprefix("benchmarks.") for name, module in with_cases().items()}
print(*(found[name] for name in sorted(found.keys() - first)))')

"$PYTHON" - <<'END' | tee -a "$summary"
import platform, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}")
END
if [ "$gpu" = 1 ]; then
  # the shell ignores interrupts in background jobs, but an interrupted pytest lists its failures
  stage tests 300 env --default-signal=INT bash -c "$(declare -f tests); PYTHON=$PYTHON tests" &
  running=$!
fi
stage small_cases 90 "$PYTHON" -m benchmarks.tools.small_cases --device "$device"
if [ "$gpu" = 1 ]; then
  stage memcheck 100 bash -c "$(declare -f sanitizer); PYTHON=$PYTHON sanitizer memcheck"
  stage racecheck 100 bash -c "$(declare -f sanitizer); PYTHON=$PYTHON sanitizer racecheck"
  wait "$running"
fi
benchmark models.training_speed 100 --docs "$logs/docs" --seconds 2
benchmark models.glow 60 --docs "$logs/docs" --seconds 1
benchmark ops.glow_network 150 --seconds 0.1 # each shape is compiled, which takes seconds
benchmark tools.fastest_networks 20 --table "$table"
benchmark ops.affine_coupling 50 --seconds 0.1
benchmark ops.conv1x1 30 --seconds 0.1
benchmark ops.lu_weight 30 --seconds 0.1
benchmark models.memory 50 --docs "$logs/docs" --limit-mib 8192 # the search for the largest batch takes longer with more
benchmark tools.step_profile 20
benchmark tools.overhead 20
for name in $others; do benchmark "$name" 25 --seconds 0.1; done
benchmark models.inverse_precision 30 --docs "$logs/docs"
benchmark models.mnist_flows 20 --docs "$logs/docs" --seconds 1
benchmark models.neural_spline_flow 25 --docs "$logs/docs" --seconds 1
benchmark models.autoregressive_flow 25 --docs "$logs/docs" --seconds 1
benchmark models.residual_flow 25 --docs "$logs/docs" --seconds 1

echo
cat "$summary"
for name in training_speed glow; do
  if [ -f "$logs/$name.log" ]; then
    echo
    grep '^|' "$logs/$name.log"
  fi
done
late=$(awk '/  cut after |left out: no time/ {print $1}' "$summary" | xargs)
[ -z "$late" ] || printf '\nSTAGES="%s" INSTALL=0 bash benchmarks/gpu_pass.sh  # runs the stages that had too little time\n' "$late"
! grep -qE '  (cut after|failed)|left out: no time' "$summary"
