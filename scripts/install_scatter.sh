#!/bin/sh
# Installs torch-scatter into the environment of the Python given, from a wheel that is built once and kept.
#
# The package index has its source only. It compiles against the torch that is installed (no build
# isolation), for some four minutes on two cores, so the wheel goes into the user's cache, one folder
# for each torch, Python and machine. Without a compiler the library and its tests still work; then this
# says so and succeeds, unless CI is true: there the tests must see both sides.
#
# usage: scripts/install_scatter.sh PYTHON [pip arguments, e.g. -c constraints.txt]
set -eu
python=$1
shift
version=2.1.2

without() {
    echo "torch-scatter: $1" >&2
    if [ "${CI:-}" = true ]; then
        echo "torch-scatter: CI needs it; stopping." >&2
        exit 1
    fi
    echo "torch-scatter: going on without it. It is optional; the tests that need it are skipped." >&2
    exit 0
}

works() {
    "$python" -c 'import torch_scatter as s; assert s.__version__ == "'"$version"'"' 2>/dev/null
}

works && exit 0

key=$("$python" -c 'import sys, sysconfig, torch
print(f"torch{torch.__version__}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}")')
cache=${XDG_CACHE_HOME:-$HOME/.cache}/nbody_pyg/wheels/$key

install_kept() {
    ls "$cache"/torch_scatter-"$version"-*.whl >/dev/null 2>&1 || return 1
    "$python" -m pip install --quiet --no-index --no-deps --force-reinstall "$cache"/torch_scatter-"$version"-*.whl
    works
}

if install_kept; then
    echo "torch-scatter: installed from $cache"
    exit 0
fi

if ! command -v "${CXX:-c++}" >/dev/null 2>&1 && ! command -v g++ >/dev/null 2>&1; then
    without "no C++ compiler found (CXX, c++, g++)."
fi
echo "torch-scatter: building its wheel once, which takes some minutes; it is kept in $cache"
mkdir -p "$cache"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
"$python" -m pip install --quiet "$@" setuptools wheel || without "setuptools and wheel could not be installed."
if ! "$python" -m pip wheel --no-build-isolation --no-deps --no-binary torch-scatter \
        --wheel-dir "$build" "torch-scatter==$version" >"$build/log" 2>&1; then
    tail -n 20 "$build/log" >&2
    without "the build failed (its last lines stand above)."
fi
# A rename within one folder is atomic: a second set-up at the same time never sees half a wheel
wheel=$(basename "$build"/*.whl)
cp "$build/$wheel" "$cache/.$wheel.$$"
mv -f "$cache/.$wheel.$$" "$cache/$wheel"
install_kept || without "the wheel was built but cannot be imported."
echo "torch-scatter: built and installed"
