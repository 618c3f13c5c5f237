#!/bin/sh
# From a float bundle and frozen ranges to a packed bundle with engines: no training data, no GPU, on any machine.
#
#   deploy/ci/build_engines.sh [FLOAT_BUNDLE [CALIBRATION [OUT]]]
#
#   FLOAT_BUNDLE  default calibration/digits-depthwise/float.edge
#   CALIBRATION   default calibration.json beside it. Where model.int8.onnx.sha256 lies beside that, the rebuilt
#                 int8 graph must have this digest.
#   OUT           a folder that does not exist yet, default build/engines. It gets NAME.edge (the int8 bundle), NAME.edge.zip
#                 and sha256sums.txt. NAME is that of the folder of CALIBRATION: one for each product, the same for all its
#                 releases, for a device counts releases by this name.
#
#   TARGETS       default "rtx-ada jetson-orin-nano": engines for RTX, build kits for Jetson
#   SIGNING_KEY   a private key (edgekit keygen); unset or empty: the pack is not signed
#   PUBLIC_KEY    its public key: the signed pack is then verified as a device would, and NAME.cdx.json lists what is inside
#   EDGEKIT       the command, default edgekit
#   CACHE         a folder kept between runs: with the same float bundle, ranges and edgekit (its code, not only its version)
#                 nothing is made again
#   PYTHON        the Python that reads figures and runs edgekit, default the one beside the command
#
# Gates, each unset: not looked at. A missed one ends the script with 3, and nothing is packed.
#   MIN_SNR       dB between the int8 graph's outputs and the float graph's
#   MIN_SHARE     share of the multiply-accumulates that are int8, 0..1
#   EVAL_DATA     a data set (--data SPEC); with MIN_TOP1, what the int8 graph reaches on it, 0..1
#   MAX_KB        kilobytes of an engine or kit
#   BENCH_BACKEND tensorrt or tensorrt-rtx, on a runner that has the device; with MAX_MS, its p99 in milliseconds
#
# Run it from the repository's root. The same inputs and versions give the same graph, engine and kit, byte for byte;
# the pack's manifest says, besides, when it was made.
set -eu

fail() {
    echo "build_engines: $*" >&2
    exit 1
}

# figure FILE KEY...: a number of a JSON file
figure() {
    "${PYTHON:-python3}" -c 'import functools, json, sys
print(functools.reduce(lambda found, key: found[key], sys.argv[2:], json.load(open(sys.argv[1]))))' "$@"
}

# code_of_edgekit: a digest of the package that quantizes, and of what it computes with. The version alone stays the same
# between two commits, and an int8 graph of older code must not come back.
code_of_edgekit() {
    beside=$(dirname "$(command -v "$edgekit")")/python
    [ -x "$beside" ] || beside=python3
    "${PYTHON:-$beside}" -c 'import hashlib, importlib.metadata as installed, pathlib, sys
del sys.path[0]  # the folder that this runs in, whose edgekit is not the installed one
import edgekit
digest = hashlib.sha256(sys.version.encode())
for package in ("numpy", "onnx", "onnxruntime"):
    digest.update(f"{package} {installed.version(package)}".encode())
root = pathlib.Path(edgekit.__file__).parent
for path in sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"):
    digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
print(digest.hexdigest())'
}

# gate WHAT HAVE "at least"|"at most" WANT
gate() {
    # awk takes what is no number for 0, and a gate that asks for 0 lets all through
    echo "$4" | grep -Eq '^[0-9]+([.][0-9]+)?$' || fail "$1: '$4' is not a number to ask for"
    if awk -v have="$2" -v want="$4" -v least="$3" 'BEGIN { exit !(least == "at least" ? have + 0 >= want + 0 : have + 0 <= want + 0) }'; then
        echo "gate: $1 is $2; asked: $3 $4"
    else
        echo "build_engines: $1 is $2; asked: $3 $4" >&2
        exit 3
    fi
}

float=${1:-calibration/digits-depthwise/float.edge}
frozen=${2:-$(dirname "$float")/calibration.json}
out=${3:-build/engines}
targets=${TARGETS:-rtx-ada jetson-orin-nano}
edgekit=${EDGEKIT:-edgekit}
expected=$(dirname "$frozen")/model.int8.onnx.sha256

# A gate that nothing is held against would let all through.
[ -z "${MIN_TOP1:-}" ] || [ -n "${EVAL_DATA:-}" ] || fail "MIN_TOP1 needs EVAL_DATA, the data set to evaluate on"
[ -z "${MAX_MS:-}" ] || [ -n "${BENCH_BACKEND:-}" ] || fail "MAX_MS needs BENCH_BACKEND, on a runner that has the device"
[ -d "$float" ] || fail "there is no float bundle $float"
[ -f "$frozen" ] || fail "there are no frozen ranges $frozen"
[ ! -e "$out" ] || fail "$out exists already; remove it, or name another folder"
# The bundle gets its folder's name, and the pack the bundle's.
name=$(basename "$(realpath "$(dirname "$frozen")")")
mkdir -p "$out"

kept=""
if [ -n "${CACHE:-}" ]; then # its entries say in their name what they were made of
    code=$(code_of_edgekit) || fail "the cache needs the Python that runs $edgekit: PYTHON=/path/to/python"
    kept=$CACHE/$name-$({ cat "$float/manifest.json" "$frozen"; echo "$code"; } | sha256sum | cut -d" " -f1)
fi
if [ -n "$kept" ] && [ -d "$kept" ]; then
    echo "take $name.edge from the cache $kept (remove it to make all anew)"
    cp -R "$kept/$name.edge" "$kept/quantize.json" "$out/"
else
    echo "quantize $float with the ranges in $frozen"
    "$edgekit" quantize "$float" --out "$out/$name.edge" --calib "$frozen" --json >"$out/quantize.json"
fi
if [ -f "$expected" ]; then
    read -r digest _ <"$expected"
    echo "$digest  $out/$name.edge/model.int8.onnx" | sha256sum -c -
fi

[ -z "${MIN_SNR:-}" ] || gate "the SNR in dB" "$(figure "$out/quantize.json" snr_db)" "at least" "$MIN_SNR"
[ -z "${MIN_SHARE:-}" ] || gate "the int8 share" "$(figure "$out/quantize.json" share)" "at least" "$MIN_SHARE"
if [ -n "${EVAL_DATA:-}" ]; then
    "$edgekit" eval "$out/$name.edge" --data "$EVAL_DATA" --json >"$out/eval.json"
    [ -z "${MIN_TOP1:-}" ] || gate "top-1" "$(figure "$out/eval.json" top1)" "at least" "$MIN_TOP1"
fi

for target in $targets; do
    echo "build $target"
    "$edgekit" build "$out/$name.edge" --target "$target" --json >"$out/$target.json"
    [ "$(figure "$out/$target.json" usable)" = True ] || fail "no TensorRT of $target builds its kit: see note in $out/$target.json"
    [ -z "${MAX_KB:-}" ] || gate "$target in kB" "$(($(figure "$out/$target.json" size_bytes) / 1000))" "at most" "$MAX_KB"
done
if [ -n "${BENCH_BACKEND:-}" ]; then
    "$edgekit" bench "$out/$name.edge" --backend "$BENCH_BACKEND" --json >"$out/bench.json"
    [ -z "${MAX_MS:-}" ] || gate "p99 in ms" "$(figure "$out/bench.json" latency_ms p99)" "at most" "$MAX_MS"
fi

if [ -n "$kept" ]; then # beside it, then renamed: a run that is stopped leaves no half entry
    rm -rf "$kept.new"
    mkdir -p "$kept.new"
    cp -R "$out/$name.edge" "$out/quantize.json" "$kept.new/"
    rm -rf "$kept"
    mv "$kept.new" "$kept"
fi

echo "pack $name.edge.zip"
if [ -n "${SIGNING_KEY:-}" ]; then
    "$edgekit" pack "$out/$name.edge" --out "$out/$name.edge.zip" --key "$SIGNING_KEY"
    if [ -n "${PUBLIC_KEY:-}" ]; then
        "$edgekit" verify "$out/$name.edge.zip" --pub "$PUBLIC_KEY" --sbom "$out/$name.cdx.json"
    fi
else
    "$edgekit" pack "$out/$name.edge" --out "$out/$name.edge.zip"
fi

# Graph, engines and kits are the same, byte for byte, in a later run or on another machine; the pack says when it was made.
(
    cd "$out"
    find "$name.edge/engines" -name "*.engine" -o -name "*.kit.zip" | sort |
        xargs sha256sum "$name.edge.zip" "$name.edge/model.int8.onnx" >sha256sums.txt
    cat sha256sums.txt
)
