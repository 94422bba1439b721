#!/usr/bin/env bash
# What a CUDA machine has to say of FastFlow, in under ten minutes and with nothing fetched: build, `gpu` tests, compute-sanitizer, benchmarks.
#
#   bash benchmarks/gpu_pass.sh [FOLDER]
#
# Rows go to FOLDER (benchmarks/results), as each is measured; logs and the summary to FOLDER/gpu_pass. It wants what a CUDA image of PyTorch
# has: torch 2.11 or newer, triton, nvcc, ninja, pybind11, setuptools, pytest, hypothesis, tqdm, matplotlib. Stages come in order of worth;
# one that fails or is cut does not stop the next. The exit status is 1 where one failed, was cut or was left out: those that had no time are
# named at the end, to be run by themselves with INSTALL=0 and STAGES.
#
# Without a GPU it runs the same at tiny sizes, to see that it runs; give it a FOLDER then.
#
#   PYTHON=python3     the interpreter          MINUTES=9.5     in all          INSTALL=1     0: FastFlow is installed already
#   STAGES="tests memcheck training_speed ..."     only these
#   COMPILED=--compiled     with what torch.compile makes of each case of an op, which takes seconds a case; left out unless asked for
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} MINUTES=${MINUTES:-9.5} INSTALL=${INSTALL:-1} COMPILED=${COMPILED:---no-compiled}
gpu=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))') || exit 1
if [ "$gpu" = 0 ] && [ $# = 0 ]; then
  echo "no GPU: the sizes are tiny then, and their rows do not belong among the results; give a folder for them" >&2
  exit 2
fi
mkdir -p "${1:-benchmarks/results}/gpu_pass/docs/pictures"
results=$(cd "${1:-benchmarks/results}" && pwd)
logs=$results/gpu_pass
cp docs/*.md "$logs/docs/" # pages whose tables the benchmarks write: theirs are the GPU's, to be looked at first
summary=$logs/summary.txt
end=$("$PYTHON" -c "print(int(60 * $MINUTES))")
failed=0 late=
: >"$summary"
export PYTHONUNBUFFERED=1

say() { printf '%-22s %s\n' "$@" | tee -a "$summary"; }

stage() { # NAME SECONDS COMMAND...: at most so long, and never past the end
  local name=$1 limit=$2 left=$((end - SECONDS)) began=$SECONDS how code
  shift 2
  if [ -n "${STAGES:-}" ] && [[ " $STAGES " != *" $name "* ]]; then return; fi
  if [ "$left" -lt 10 ]; then
    say "$name" "left out: no time"
    failed=1
    late="$late $name"
    return
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  case $code in
    0) how=passed ;;
    77) how="passed over: $(tail -n 1 "$logs/$name.log")" ;;
    124 | 130 | 137) how="cut after $limit s" ;;
    *) how="failed ($code): $(tail -n 1 "$logs/$name.log" | cut -c1-160)" ;;
  esac
  [ "$code" = 0 ] || [ "$code" = 77 ] || failed=1
  say "$name" "$((SECONDS - began)) s  $how"
}

install() {
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
  export FASTFLOW_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
  "$PYTHON" -m pip install --no-build-isolation --no-deps -q -e .
}

tests() {
  # some 3,000 Triton kernels are compiled first, about 140 s on 8 workers; tests of 17 to 30 GB share one of them
  local workers=$(($(nproc) < 8 ? $(nproc) : 8))
  exec "$PYTHON" -m pytest -m gpu -n "$workers" --dist loadgroup -q -rfE --durations=10 --benchmark-disable --show-capture=no tests
}

sanitizer() { # TOOL: on the small cases; 77 where the machine refuses it
  local tool=(compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all)
  if ! command -v compute-sanitizer; then
    echo "no compute-sanitizer here"
    return 77
  fi
  local looked
  looked=$("${tool[@]}" "$PYTHON" -c 'import torch; torch.zeros(3, device="cuda").sum().item()' 2>&1) || {
    echo "$looked"
    echo "compute-sanitizer does not run a small torch program here"
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
first = {"affine_coupling", "conv1x1", "lu_weight"}
found = {name: module.__name__.removeprefix("benchmarks.") for name, module in with_cases().items()}
print(*(found[name] for name in sorted(found.keys() - first)))') # each file with cases

"$PYTHON" - <<'END' | tee -a "$summary"
import platform, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}")
END
stage small_cases 60 "$PYTHON" -m benchmarks.tools.small_cases --device "$device"
if [ "$gpu" = 1 ]; then
  stage tests 300 bash -c "$(declare -f tests); PYTHON=$PYTHON tests"
  stage memcheck 60 bash -c "$(declare -f sanitizer); PYTHON=$PYTHON sanitizer memcheck"
  stage racecheck 60 bash -c "$(declare -f sanitizer); PYTHON=$PYTHON sanitizer racecheck"
fi
COMPILED=--compiled benchmark models.training_speed 120 --docs "$logs/docs" --seconds 3
for name in affine_coupling conv1x1 lu_weight; do benchmark "ops.$name" 45 --seconds 0.1; done
benchmark models.glow 60 --docs "$logs/docs" --seconds 2
benchmark models.memory 60 --docs "$logs/docs" --limit-mib 8192 # or the search for the largest batch outlasts the stage
benchmark tools.profile 30
for name in $others; do benchmark "$name" 40 --seconds 0.1; done
benchmark models.inverse_precision 40 --docs "$logs/docs"

echo
cat "$summary"
for name in training_speed glow; do
  if [ -f "$logs/$name.log" ]; then
    echo
    grep '^|' "$logs/$name.log"
  fi
done
[ -z "$late" ] || printf '\nfor what had no time: STAGES="%s" INSTALL=0 bash benchmarks/gpu_pass.sh\n' "${late# }"
exit "$failed"
