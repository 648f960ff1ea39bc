#!/usr/bin/env bash
# Collects the wheels that a GPU machine without a network may lack beside torch and transformers.
# usage: make_wheels.sh FOLDER [PYTHON_VERSION]   (default 3.12)
# On that machine: pip install --no-index --no-deps --target FOLDER/site FOLDER/*.whl, and PYTHONPATH=FOLDER/site:.
set -euo pipefail
folder=${1:?usage: make_wheels.sh FOLDER [PYTHON_VERSION]}
version=${2:-3.12}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/../.." && pwd)

pinned() { # NAME==VERSION, as constraints.txt has it
    grep -iE "^$1==" "$here/constraints.txt" | head -n 1 | sed 's/ *;.*//' | grep . || {
        echo "make_wheels: constraints.txt does not name $1" >&2
        return 1
    }
}
mkdir -p "$folder"
binary=() pure=()
for name in pydantic pydantic-core annotated-types typing-inspection py-cpuinfo; do
    binary+=("$(pinned "$name")")
done
for name in deepspeed hjson; do pure+=("$(pinned "$name")"); done
"$python" -m pip download --no-deps --only-binary=:all: --python-version "$version" \
    --platform manylinux2014_x86_64 --dest "$folder" "${binary[@]}"
# Without compiled operations deepspeed is a wheel for every Python.
DS_BUILD_OPS=0 "$python" -m pip wheel --no-deps --wheel-dir "$folder" "${pure[@]}"
