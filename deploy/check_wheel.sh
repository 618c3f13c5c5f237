#!/bin/sh
# Uses a built wheel as a device would, in a clean environment for each interpreter: the runtime, a signed install, a scan.
#
#   deploy/check_wheel.sh WHEEL PYTHON...          from the repository's root; PYTHON: python3.10 python3.11 python3.12
#
#   EXTRAS   default what deploy/Dockerfile installs
# Packages come from pip's index and its cache. Nothing outside a temporary folder is written.
set -eu

fail() {
    echo "check_wheel: $*" >&2
    exit 1
}

[ "$#" -ge 2 ] || fail "give a wheel and at least one interpreter: deploy/check_wheel.sh dist/edgekit-*.whl python3.12"
wheel=$(realpath "$1")
shift
root=$(realpath "$(dirname "$0")/..")
# Read, not copied: what is tried here is what the image holds.
EXTRAS=${EXTRAS:-$(sed -n 's/.*[.]whl)\[\([a-z,]*\)\].*/\1/p' "$root/deploy/Dockerfile")}
[ -n "$EXTRAS" ] || fail "deploy/Dockerfile installs no wheel with extras; name them: EXTRAS=scan,sign"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# What is not imported need not be compiled.
export PIP_NO_COMPILE=1 OMP_NUM_THREADS=1
unset PYTHONPATH

[ -f "$wheel" ] || fail "there is no wheel $wheel; make one: python -m build"
case $wheel in
*-py3-none-any.whl) ;;
*) fail "$wheel is not for every machine: py3-none-any was expected" ;;
esac

for python in "$@"; do
    place=$work/$(basename "$python")-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -m venv --without-pip "$place"
    # One pip for all environments: making one in each takes longer than the rest.
    python3 -m pip --quiet --disable-pip-version-check --python "$place/bin/python" install \
        --constraint "$root/constraints.txt" "${wheel}[$EXTRAS]"
    cd "$place" # where no edgekit lies beside
    bin/python - <<'PYTHON'
import sys, edgekit.runtime

heavy = {"torch", "onnx", "PIL"} & set(sys.modules)
assert not heavy, f"edgekit.runtime loads {heavy}"
assert "site-packages" in edgekit.runtime.__file__, edgekit.runtime.__file__
open("picture.pgm", "wb").write(b"P5 28 28 255\n" + bytes(min(255, 9 * (i % 28)) for i in range(784)))
PYTHON
    bin/edgekit --help >help.txt
    bin/edgekit doctor >doctor.txt || fail "$python: edgekit doctor: $(cat doctor.txt)"
    bin/edgekit keygen --out keys >/dev/null
    bin/edgekit pack "$root/calibration/digits-depthwise/float.edge" --out digits.edge.zip --key keys/edgekit.key >/dev/null
    bin/edgekit verify digits.edge.zip --pub keys/edgekit.pub >verify.txt
    bin/edgekit install digits.edge.zip --root models --pub keys/edgekit.pub >install.txt
    bin/edgekit scan models/current --codes --source picture.pgm --sink jsonl:events.jsonl >/dev/null
    bin/python - <<'PYTHON'
import json
import numpy as np
from edgekit.runtime import Model

frame = np.frombuffer(open("picture.pgm", "rb").read()[-784:], np.uint8).reshape(28, 28)
with Model.open("models/current") as model:
    answer = model(frame)
event = json.loads(open("events.jsonl").readline())
assert event["label"] == answer.label, (event, answer)
PYTHON
    echo "$python: the wheel with $EXTRAS runs, installs a signed pack and scans ($(du -sm . | cut -f1) MB)"
    cd "$root"
done
