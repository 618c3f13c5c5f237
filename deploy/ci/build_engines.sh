#!/bin/sh
# From a float bundle and frozen ranges to a packed bundle with engines: no training data, no GPU, on any machine.
#
#   deploy/ci/build_engines.sh [FLOAT_BUNDLE [CALIBRATION [OUT]]]
#
#   FLOAT_BUNDLE  default calibration/digits-depthwise/float.edge
#   CALIBRATION   default calibration.json beside it. Where model.int8.onnx.sha256 lies beside that, the rebuilt
#                 int8 graph must have this digest.
#   OUT           a folder that does not exist yet, default build/engines. It gets int8.edge, NAME.edge.zip, sha256sums.txt
#
#   TARGETS       default "rtx-ada jetson-orin-nano": engines for RTX, build kits for Jetson
#   SIGNING_KEY   a private key (edgekit keygen); unset or empty: the pack is not signed
#   PUBLIC_KEY    its public key: the signed pack is then verified as a device would
#   EDGEKIT       the command, default edgekit
#
# Run it from the repository's root. The same inputs and versions give the same graph, engine and kit, byte for byte;
# the pack's manifest says, besides, when it was made.
set -eu

fail() {
    echo "build_engines: $*" >&2
    exit 1
}

float=${1:-calibration/digits-depthwise/float.edge}
frozen=${2:-$(dirname "$float")/calibration.json}
out=${3:-build/engines}
targets=${TARGETS:-rtx-ada jetson-orin-nano}
edgekit=${EDGEKIT:-edgekit}
expected=$(dirname "$frozen")/model.int8.onnx.sha256

[ -d "$float" ] || fail "there is no float bundle $float"
[ -f "$frozen" ] || fail "there are no frozen ranges $frozen"
[ ! -e "$out" ] || fail "$out exists already; remove it, or name another folder"
mkdir -p "$out"

echo "quantize $float with the ranges in $frozen"
"$edgekit" quantize "$float" --out "$out/int8.edge" --calib "$frozen" --json >"$out/quantize.json"
if [ -f "$expected" ]; then
    read -r digest _ <"$expected"
    echo "$digest  $out/int8.edge/model.int8.onnx" | sha256sum -c -
fi

for target in $targets; do
    echo "build $target"
    "$edgekit" build "$out/int8.edge" --target "$target" --json >"$out/$target.json"
done

name=$(basename "$(dirname "$frozen")")
echo "pack $name.edge.zip"
if [ -n "${SIGNING_KEY:-}" ]; then
    "$edgekit" pack "$out/int8.edge" --out "$out/$name.edge.zip" --key "$SIGNING_KEY"
    if [ -n "${PUBLIC_KEY:-}" ]; then
        "$edgekit" verify "$out/$name.edge.zip" --pub "$PUBLIC_KEY"
    fi
else
    "$edgekit" pack "$out/int8.edge" --out "$out/$name.edge.zip"
fi

# What a later run, or another machine, has to reproduce.
(
    cd "$out"
    sha256sum int8.edge/model.int8.onnx int8.edge/engines/* "$name.edge.zip" >sha256sums.txt
    cat sha256sums.txt
)
