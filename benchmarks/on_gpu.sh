#!/usr/bin/env bash
# Everything that a GPU is needed for, in stages of at most 8 minutes, without a network:
#
#   benchmarks/on_gpu.sh --out DIR [--stage NAME]... [--device cuda|cpu] [--again]
#
#   build     the native module, and the self-test of its CUDA part
#   tests     the tests marked gpu, and those of the Triton kernels
#   sanitize  compute-sanitizer (memcheck, racecheck, initcheck) on every kernel
#   tune      awnet bench tune: this device's launch parameters
#   race      the fused convolutions against the library's: which ones this device takes
#   bench     awnet bench run over the layers, every batch; a second run goes on where the first was stopped
#   networks  the same for the block and the whole network
#   compile   the goals' rivals by torch.compile, on the four stages; takes several runs of 8 minutes
#   training  awnet bench train: each recipe's step against plain ones; goes on where it was stopped
#   profile   one PGD step: the time of each kernel, and ncu on the five heaviest
#
# Without --stage all of them run in this order. A stage that has passed leaves DIR/NAME.done and is not run
# again (--again: it is); its words are in DIR/NAME.log. --device cpu runs a stand-in of each stage where there
# is no GPU. The running python3's torch is used (PYTHON names another); wheels in .whl/ fill what it lacks.
set -uo pipefail

cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-480} # seconds for a stage
ALL=(build tests sanitize tune race bench networks compile training profile)
OUT='' DEVICE=cuda AGAIN='' STAGES=()

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; }
fail() { echo "on_gpu.sh: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
  case $1 in
    --out) OUT=${2:?--out needs a folder}; shift 2 ;;
    --stage) STAGES+=("${2:?--stage needs a name}"); shift 2 ;;
    --device) DEVICE=${2:?--device needs cuda or cpu}; shift 2 ;;
    --again) AGAIN=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1 (see --help)" ;;
  esac
done
[ -n "$OUT" ] || fail "--out DIR is missing (see --help)"
[ "$DEVICE" = cuda ] || [ "$DEVICE" = cpu ] || fail "--device must be cuda or cpu, got $DEVICE"
[ ${#STAGES[@]} -gt 0 ] || STAGES=("${ALL[@]}")
for stage in "${STAGES[@]}"; do
  [[ " ${ALL[*]} " == *" $stage "* ]] || fail "there is no stage $stage; there are ${ALL[*]}"
done
mkdir -p "$OUT" || fail "cannot write to $OUT"
OUT=$(cd "$OUT" && pwd)
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || fail "$PYTHON has no torch (PYTHON=... names another Python)"

# what the running Python lacks, from wheels that came with the repository
if compgen -G '.whl/*.whl' >/dev/null; then
  if [ ! -e "$OUT/site.done" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$OUT/site" .whl/*.whl \
      && touch "$OUT/site.done" || fail "the wheels in .whl/ do not install"
  fi
  export PYTHONPATH="$OUT/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

on_gpu() { [ "$DEVICE" = cuda ]; }
awnet() { "$PYTHON" -m awnet "$@"; }
pytest() { "$PYTHON" -m pytest -p no:cacheprovider -q "$@"; }

stage_build() {
  if on_gpu; then
    AWNET_BUILD=cuda "$PYTHON" setup.py -q build_ext --inplace || return
    "$PYTHON" -c 'import torch; from awnet import _C; e = _C.self_test(); print(torch.cuda.get_device_name(), e or "self-test passed"); exit(e is not None)'
  else
    AWNET_BUILD=auto "$PYTHON" setup.py -q build_ext --inplace || return
    "$PYTHON" -c 'import torch; from awnet import _C; print(_C.build_info()["cuda"], _C.self_test())'
  fi
}

stage_tests() {
  if on_gpu; then
    pytest -m gpu tests && { [ ! -d tests/kernels ] || pytest -m '' tests/kernels; }
  else
    AWNET_TEST_DEVICE=cpu pytest -m '' tests/ops/test_gpu.py -k 'bits or nan or layout or empty or refused'
  fi
}

stage_sanitize() {
  local tool backend wrong=0
  if ! on_gpu; then
    "$PYTHON" -m awnet.benchmarks.sanitize --backend cpp \
      && TRITON_INTERPRET=1 "$PYTHON" -m awnet.benchmarks.sanitize --backend triton
    return
  fi
  command -v compute-sanitizer >/dev/null || { echo "there is no compute-sanitizer on the PATH"; return 1; }
  # Triton compiles here, outside of the sanitizer, into its cache
  for backend in cuda triton; do "$PYTHON" -m awnet.benchmarks.sanitize --backend $backend || return; done
  for tool in memcheck racecheck initcheck; do
    for backend in cuda triton; do
      echo "== $tool, $backend"
      # every tensor an allocation of its own, so that memcheck sees where it ends
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
        "$PYTHON" -m awnet.benchmarks.sanitize --backend $backend || wrong=1
    done
  done
  return $wrong
}

# Rows are on disk as soon as they are measured, and --missing leaves out those of this commit.
measure() {
  if on_gpu; then
    awnet bench run --device cuda --dtype bfloat16 --layout channels_last --seconds 0.2 --missing --out "$OUT/results" "$@"
  else
    awnet bench run --smoke --device cpu --seconds 0.01 --missing --out "$OUT/results" "$@" --batch 8
  fi
}

stage_bench() { measure --cases stage1 stage2 stage3 stage4 stem shortcut transition depthwise; }

stage_networks() { measure --cases block network; }

stage_compile() {
  if on_gpu; then
    measure --cases stage1 stage2 stage3 stage4 --modes attack training --batch 256 512 \
      --providers compile compile_frozen static_compile && awnet bench verify --results "$OUT/results"
  else
    measure --cases stage4 --modes attack --providers static_compile && awnet bench verify --results "$OUT/results"
  fi
}

# One mark a run, so that a stage that was stopped measures only what is missing.
trained() {
  local mark="$OUT/training.$1"
  shift
  [ -e "$mark" ] || { awnet bench train --device "$DEVICE" --out "$OUT/results" "$@" && touch "$mark"; }
}

stage_training() {
  if ! on_gpu; then
    trained tiny --recipe pgd_at --model awnet_tiny --size 8 --batch 4 --attack-steps 1 --steps 1
    return
  fi
  trained mtard-512 --recipe mtard --batch 512 --providers awnet unfused \
    && trained mtard --recipe mtard --providers awnet unfused \
    && trained mtard-captured --recipe mtard --batch 512 --capture --providers awnet \
    && trained mtard-fast --recipe mtard_fast --providers awnet unfused \
    && trained trades-fast --recipe trades_fast --model resnet18 --providers awnet unfused \
    && trained standard-fast --recipe standard_fast --model resnet18 --providers awnet unfused \
    && trained literal --recipe mtard --steps 5 --providers awnet literal \
    && trained compile --recipe mtard --providers awnet compile
}

# The tables that the next two write are awnet's own and count at once; DIR gets a copy.
keep_tables() { mkdir -p "$OUT/configs" && cp awnet/ops/configs/*.json "$OUT/configs"; }

stage_tune() {
  if on_gpu; then
    awnet bench tune --device cuda --minutes 6 && keep_tables
  else
    awnet bench tune --help
  fi
}

stage_race() {
  local race=("$PYTHON" -m awnet.benchmarks.convolutions --out "$OUT/convolutions.csv")
  if on_gpu; then
    "${race[@]}" --update && keep_tables
  else
    TRITON_INTERPRET=1 "${race[@]}" --layers 8-8@5k3s1g1 --operations apply --batches 2 --dtypes float32
  fi
}

stage_profile() {
  local step=("$PYTHON" -m awnet.benchmarks.profile_step --device "$DEVICE") name number=0
  if ! on_gpu; then
    "${step[@]}" --model awnet_tiny --batch 4 --steps 1 --out "$OUT"
    return
  fi
  "${step[@]}" --out "$OUT" || return
  command -v ncu >/dev/null || { echo "there is no ncu on the PATH"; return 1; }
  while read -r name; do
    number=$((number + 1))
    echo "== ncu, $name"
    ncu --clock-control none --target-processes all --kernel-name "regex:$name" --launch-count 3 --set full \
      --force-overwrite --export "$OUT/ncu-$number" --page details --print-summary none \
      "${step[@]}" --steps-only || return
  done <"$OUT/heaviest.txt"
}

status=0
for stage in "${STAGES[@]}"; do
  if [ -e "$OUT/$stage.done" ] && [ -z "$AGAIN" ]; then
    echo "$stage: done before"
    continue
  fi
  rm -f "$OUT/$stage.done"
  begun=$SECONDS
  # a stage runs in a process group of its own, so that the limit ends all of it
  export -f on_gpu awnet pytest keep_tables measure trained "stage_$stage"
  export OUT DEVICE PYTHON
  timeout --kill-after=10 "$LIMIT" bash -c "set -uo pipefail; stage_$stage" 2>&1 | tee "$OUT/$stage.log"
  code=${PIPESTATUS[0]}
  if [ "$code" = 0 ]; then
    date -u +%FT%TZ >"$OUT/$stage.done"
    echo "$stage: passed in $((SECONDS - begun)) s"
  elif [ "$code" = 124 ] || [ "$code" = 137 ]; then
    echo "$stage: stopped after $LIMIT s (LIMIT=seconds allows more)"
    status=1
  else
    echo "$stage: failed with $code after $((SECONDS - begun)) s, see $OUT/$stage.log"
    status=1
  fi
done
exit $status
