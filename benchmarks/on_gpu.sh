#!/usr/bin/env bash
# Runs everything that needs a GPU, in two calls of 8 and 4 minutes, without a network:
#
#   benchmarks/on_gpu.sh --out DIR [--call 1|2]... [--step NAME]... [--device cuda|cpu]
#
# Call 1 (480 s)
#   check     45 s   versions, the native module, the self-check
#   backends  75 s   bench train, MTARD, batch 512, captured: backend cuda, then triton
#   values    45 s   every kernel against plain torch on the CPU
#   graphs    35 s   tests of captured attacks and training steps
#   batch256  60 s   bench train, MTARD, batch 256: single calls, then captured
#   layers   120 s   bench run, four stages, attack and training, batch 512 and 256: ours and plain torch
#   profile   30 s   the kernels of one PGD step
#   compile   60 s   the same by torch.compile: stages 1 and 4, then the network's attack
#   rest     480 s   bench train of plain torch, the other rows of the goals
# Call 2 (240 s), its two steps in parallel
#   cifar    225 s   train pgd_at_fast on CIFAR-10, 8 epochs, captured
#   tests    225 s   the tests marked gpu in 8 processes, without the generated layers and the largest tensors
# Only with --step
#   sanitize, tune, race, ncu    compute-sanitizer, awnet bench tune, the convolutions' race, Nsight Compute
#
# Without --call and --step both calls run. Every step has a time limit, and ends with its call at the latest
# (LIMIT=seconds replaces the limits of steps and calls); a step that fails or is stopped does not stop the next.
# DIR gets at most 8 files, written during the measurements: steps.csv (how each step ended), log.txt,
# results/DEVICE.csv and results/DEVICE-train.csv (copy their rows to benchmarks/results/), profile.json,
# tests.txt, cifar.jsonl. A repeated step adds its rows again. --device cpu runs a small version of each step on a
# machine without a GPU.
#
# The script uses the torch of python3 (PYTHON=... names another interpreter). If `make gpu-pack` has filled .gpu/,
# it uses the wheels, the native module, the commit and the images there. Otherwise CIFAR-10 must be in DATA=folder
# (default: data), and the native module is compiled in the background if it is missing.
set -uo pipefail

cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
CALL_1=(check:45 backends:75 values:45 graphs:35 batch256:60 layers:120 profile:30 compile:60 rest:480)
CALL_2=(cifar:225 tests:225)
EXTRA=(sanitize:480 tune:480 race:480 ncu:480)
OUT='' DEVICE=cuda CALLS=() STEPS=()

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; }
fail() { echo "on_gpu.sh: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
  case $1 in
    --out) OUT=${2:?--out needs a folder}; shift 2 ;;
    --call) CALLS+=("${2:?--call needs 1 or 2}"); shift 2 ;;
    --step) STEPS+=("${2:?--step needs a name}"); shift 2 ;;
    --device) DEVICE=${2:?--device needs cuda or cpu}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1 (see --help)" ;;
  esac
done
[ -n "$OUT" ] || fail "--out DIR is missing (see --help)"
[ "$DEVICE" = cuda ] || [ "$DEVICE" = cpu ] || fail "--device must be cuda or cpu, got $DEVICE"
for call in ${CALLS[@]+"${CALLS[@]}"}; do
  [ "$call" = 1 ] || [ "$call" = 2 ] || fail "--call must be 1 or 2, got $call"
done
declare -A LIMITS
NAMES=()
for entry in "${CALL_1[@]}" "${CALL_2[@]}" "${EXTRA[@]}"; do
  NAMES+=("${entry%:*}")
  LIMITS[${entry%:*}]=${LIMIT:-${entry#*:}}
done
for step in ${STEPS[@]+"${STEPS[@]}"}; do
  [ -n "${LIMITS[$step]:-}" ] || fail "unknown step $step; available: ${NAMES[*]}"
done
[ ${#CALLS[@]} -gt 0 ] || [ ${#STEPS[@]} -gt 0 ] || CALLS=(1 2)
mkdir -p "$OUT" || fail "cannot write to $OUT"
OUT=$(cd "$OUT" && pwd)
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' \
  || fail "$PYTHON has no torch (PYTHON=... names another Python)"
WORK=$(mktemp -d) || fail "cannot make a temporary folder"
LOG=$OUT/log.txt
: >>"$LOG" || fail "cannot write to $OUT"
[ -e "$OUT/steps.csv" ] || echo "step,ended,seconds,limit" >"$OUT/steps.csv"

say() { echo "$*" | tee -a "$LOG"; }

# --- what came with .gpu/

if compgen -G '.gpu/wheels/*.whl' >/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$WORK/site" .gpu/wheels/*.whl >>"$LOG" 2>&1 || say "the wheels in .gpu/wheels do not install, see $LOG"
  export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${AWNET_COMMIT:-}" ] && [ -s .gpu/commit ]; then
  AWNET_COMMIT=$(cat .gpu/commit)
  export AWNET_COMMIT
fi
DATA=${DATA:-data}
export OUT WORK LOG DEVICE PYTHON DATA

on_gpu() { [ "$DEVICE" = cuda ]; }
# part SECONDS COMMAND...: a part of a step, whose python gets this time limit; if it fails, the step continues
part() {
  local PART=$1 code
  shift
  "$@"
  code=$?
  [ $code = 0 ] || echo "ended with $code: $*"
  return $code
}
python() { timeout --foreground --kill-after=5 "${PART:-3600}" "$PYTHON" "$@"; }
awnet() { python -m awnet "$@"; }
pytest() { python -m pytest -p no:cacheprovider -q "$@"; }
bench() { awnet bench run --out "$OUT/results" --retries 0 "$@"; }
train() { awnet bench train --out "$OUT/results" --retries 0 "$@"; }
on_h200() { bench --device cuda --dtype bfloat16 --layout channels_last --seconds 0.2 --verify-batch 32 "$@"; }
tiny() { bench --smoke --device cpu --seconds 0.01 "$@"; }
mtard() { train --device cuda --recipe mtard --model awnet_resnet18 --steps 10 "$@"; }
tiny_train() {
  train --device cpu --recipe pgd_at --model awnet_tiny --size 8 --batch 4 --attack-steps 1 --steps 1 "$@"
}

# Our backends that run here now, the CUDA one first.
available() {
  "$PYTHON" -c '
import sys
from awnet.ops import available_backends
reasons = available_backends(sys.argv[1])
print(*[name for name in ("cuda", "triton", "cpp") if reasons[name] is None] or ["eager"])' "$DEVICE"
}

# The same once the native module is compiled.
ours() {
  while [ -e "$WORK/building" ]; do sleep 1; done
  available
}

# --- the steps of call 1

step_check() {
  on_gpu && nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv
  if on_gpu; then python benchmarks/gpu_pack.py native || start_build; fi
  awnet info --self-check
}

# Compiles on all cores while other steps run; `ours` waits for it.
start_build() {
  echo "compiling the native module in the background, its output is in $OUT/log.txt at the end"
  touch "$WORK/building"
  AWNET_BUILD=cuda setsid nohup bash -c '"$PYTHON" setup.py -q build_ext --inplace >"$WORK/build.log" 2>&1
    echo "the build ended with $?" >>"$WORK/build.log"; rm -f "$WORK/building"' >/dev/null 2>&1 &
  echo $! >"$WORK/build.pid"
}

step_backends() {
  local status=0 done='' round backend
  if ! on_gpu; then
    tiny_train --providers awnet --backend eager
    return
  fi
  for round in available ours; do # triton runs while the CUDA kernels are compiled
    for backend in $($round); do
      [[ " $done " != *" $backend "* ]] || continue
      part 40 mtard --batch 512 --capture true --providers awnet --backend "$backend" || status=1
      done+=" $backend"
    done
  done
  return $status
}

step_values() {
  local status=0 backend
  for backend in $(ours); do
    [ "$backend" != eager ] || continue
    part 40 python -m awnet.benchmarks.sanitize --backend "$backend" || status=1
  done
  return $status
}

step_graphs() {
  local tests=(tests/attacks/test_graphed.py tests/training/test_step.py tests/training/test_captured_step.py)
  if on_gpu; then
    pytest -v -m gpu "${tests[@]}"
  else
    pytest -v -m "" "${tests[0]}" -k "same_bits and not follows"
  fi
}

step_batch256() {
  local status=0
  if ! on_gpu; then
    tiny_train --providers awnet
    return
  fi
  part 30 mtard --batch 256 --capture false --providers awnet || status=1
  part 30 mtard --batch 256 --capture true --providers awnet || status=1
  return $status
}

step_layers() {
  local backends
  read -ra backends <<<"$(ours)"
  if on_gpu; then
    on_h200 --cases stage1 stage2 stage3 stage4 --modes attack training --batch 512 256 --providers "${backends[@]}" unfused
  else
    tiny --cases stage1 stage4 --modes attack --batch 8 --providers "${backends[@]}" unfused
  fi
}

step_profile() {
  local step=(python -m awnet.benchmarks.profile_step --device "$DEVICE" --out "$WORK/profile")
  on_gpu || step+=(--model awnet_tiny --batch 4 --steps 1)
  "${step[@]}" && cp "$WORK/profile/profile.json" "$OUT/profile.json"
}

step_compile() {
  local status=0
  if ! on_gpu; then
    tiny --cases stage4 --modes forward --providers static_compile
    return
  fi
  # one provider per call: its rows are on disk before the next one compiles
  part 25 on_h200 --cases stage1 stage4 --modes attack --batch 512 --providers compile_frozen || status=1
  part 25 on_h200 --cases stage1 stage4 --modes training --batch 512 --providers compile || status=1
  part 60 on_h200 --cases network --modes attack --batch 512 --providers compile_frozen || status=1
  return $status
}

step_rest() {
  local status=0 backends
  if ! on_gpu; then
    tiny --cases depthwise --modes forward --providers unfused
    return
  fi
  read -ra backends <<<"$(ours)"
  part 60 on_h200 --cases network --modes attack --batch 512 --providers "${backends[@]}" unfused || status=1
  part 60 on_h200 --cases depthwise --modes forward --batch 512 256 --providers "${backends[@]}" unfused || status=1
  part 60 mtard --batch 512 --steps 5 --providers awnet unfused || status=1
  part 120 on_h200 --cases stage1 stage2 stage3 stage4 --modes attack training --batch 512 256 --providers static literal || status=1
  part 240 on_h200 --cases stage1 stage2 stage3 stage4 --modes attack training --batch 512 256 \
    --providers static_compile compile compile_frozen || status=1
  return $status
}

# --- the steps of call 2

step_cifar() {
  local run=(awnet train --out "$WORK/cifar" --overwrite --recipe pgd_at_fast) status
  if ! on_gpu; then
    "${run[@]}" --data digits --model awnet_tiny --epochs 1 --limit 64 --attack-steps 1 --device cpu
  else
    if [ -e .gpu/cifar10.npz ]; then
      DATA=$WORK/data
      python benchmarks/gpu_pack.py unpack .gpu/cifar10.npz "$DATA" || return
    fi
    "${run[@]}" --data cifar10 --data-dir "$DATA" --model awnet_resnet18 --epochs 8 --recipe-options capture=true
  fi
}

step_tests() {
  if on_gpu; then
    OMP_NUM_THREADS=2 pytest -v -n 8 --dist worksteal -m gpu tests -k "not any_shape and not two_to_the_31" >"$OUT/tests.txt" 2>&1
  else
    OMP_NUM_THREADS=1 AWNET_TEST_DEVICE=cpu pytest -v -n 2 -m "" tests/ops/test_gpu.py -k "empty or refused" >"$OUT/tests.txt" 2>&1
  fi
}

# --- steps that only --step runs

step_sanitize() {
  local tool backend status=0
  if ! on_gpu; then
    TRITON_INTERPRET=1 "$PYTHON" -m awnet.benchmarks.sanitize --backend triton
    return
  fi
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH"; return 1; }
  # Triton compiles here, outside of the sanitizer, into its cache
  for backend in cuda triton; do "$PYTHON" -m awnet.benchmarks.sanitize --backend $backend || return; done
  for tool in memcheck racecheck initcheck; do
    for backend in cuda triton; do
      echo "== $tool, $backend"
      # every tensor in a separate allocation, so that memcheck sees where it ends
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
        "$PYTHON" -m awnet.benchmarks.sanitize --backend $backend || status=1
    done
  done
  return $status
}

# The next two steps write awnet's tables, which take effect immediately; DIR gets a copy.
keep_tables() { mkdir -p "$OUT/configs" && cp awnet/ops/configs/*.json "$OUT/configs"; }

step_tune() {
  if on_gpu; then
    awnet bench tune --device cuda --minutes 6 && keep_tables
  else
    awnet bench tune --help
  fi
}

step_race() {
  local race=("$PYTHON" -m awnet.benchmarks.convolutions --out "$OUT/convolutions.csv")
  if on_gpu; then
    "${race[@]}" --update && keep_tables
  else
    TRITON_INTERPRET=1 "${race[@]}" --layers 8-8@5k3s1g1 --operations apply --batches 2 --dtypes float32
  fi
}

step_ncu() {
  local step=("$PYTHON" -m awnet.benchmarks.profile_step --device "$DEVICE") name number=0
  if ! on_gpu; then
    "${step[@]}" --model awnet_tiny --batch 4 --steps-only
    return
  fi
  command -v ncu >/dev/null || { echo "ncu is not on the PATH"; return 1; }
  "${step[@]}" --out "$WORK/profile" || return
  while read -r name; do
    number=$((number + 1))
    echo "== ncu, $name"
    ncu --clock-control none --target-processes all --kernel-name "regex:$name" --launch-count 3 --set full \
      --force-overwrite --export "$OUT/ncu-$number" --page details --print-summary none \
      "${step[@]}" --steps-only || return
  done <"$WORK/profile/heaviest.txt"
}

# --- running them

export -f on_gpu part python awnet pytest bench train on_h200 tiny mtard tiny_train available ours start_build keep_tables
for name in "${NAMES[@]}"; do export -f "step_$name"; done

keep() { [ ! -e "$WORK/cifar/log.jsonl" ] || cp "$WORK/cifar/log.jsonl" "$OUT/cifar.jsonl"; }

RUNNING=()
finish() {
  trap - EXIT
  for pid in ${RUNNING[@]+"${RUNNING[@]}"}; do kill "$pid" 2>/dev/null; done
  [ ! -e "$WORK/building" ] || kill -- "-$(cat "$WORK/build.pid")" 2>/dev/null
  [ ! -e "$WORK/build.log" ] || tail -n 50 "$WORK/build.log" >>"$LOG"
  keep
  rm -rf "$WORK"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# start NAME SECONDS: starts a step in a new process group, so that its time limit ends all its processes
start() {
  say "== $1, at most $2 s"
  # on SIGINT, which a background process ignores by default, pytest and `awnet train` print and store their results
  timeout --signal=INT --kill-after=8 "$2" env --default-signal=INT bash -c "set -uo pipefail; step_$1" > >(tee -a "$LOG") 2>&1 &
  PID=$!
  RUNNING+=("$PID")
}

STATUS=0
# ended NAME CODE SECONDS LIMIT
ended() {
  local how="failed with $2"
  case $2 in
    0) how=passed ;;
    124 | 137) how=stopped ;;
  esac
  [ "$how" = passed ] || STATUS=1
  echo "$1,$how,$3,$4" >>"$OUT/steps.csv"
  say "$1: $how after $3 s of at most $4 s"
}

run_step() {
  local begun=$SECONDS code
  start "$1" "$2"
  wait "$PID"
  code=$?
  RUNNING=()
  ended "$1" "$code" "$((SECONDS - begun))" "$2"
}

smaller() { echo $(($1 < $2 ? $1 : $2)); }

call_1() {
  local end=$((SECONDS + ${LIMIT:-480})) entry name left
  for entry in "${CALL_1[@]}"; do
    name=${entry%:*} left=$((end - SECONDS))
    if [ $left -lt 1 ]; then
      say "$name: not started, the call's time is over"
      echo "$name,not started,0,0" >>"$OUT/steps.csv"
      STATUS=1
      continue
    fi
    run_step "$name" "$(smaller "${LIMITS[$name]}" "$left")"
  done
}

call_2() {
  local begun=$SECONDS entry name code
  local -A pids
  for entry in "${CALL_2[@]}"; do
    name=${entry%:*}
    start "$name" "${LIMITS[$name]}"
    pids[$name]=$PID
  done
  for entry in "${CALL_2[@]}"; do
    name=${entry%:*}
    wait "${pids[$name]}"
    code=$?
    ended "$name" "$code" "$((SECONDS - begun))" "${LIMITS[$name]}"
    keep
  done
  RUNNING=()
}

for step in ${STEPS[@]+"${STEPS[@]}"}; do run_step "$step" "${LIMITS[$step]}"; done
for call in ${CALLS[@]+"${CALLS[@]}"}; do "call_$call"; done
keep
say "steps:"
tee -a "$LOG" <"$OUT/steps.csv"
exit $STATUS
