#!/usr/bin/env bash
# Builds .venv: the packages of pyproject.toml at the versions of constraints.txt, and llama.cpp from source.
# `make setup` runs this; interrupted, it goes on from where it was when run again. Variables that it reads:
#   PYTHON=/path/to/python3.12  the interpreter to use
#   TORCH_INDEX=https://...     take torch, and nothing else, from this index; by default the one that fits the machine
#   PYTORCH=https://...         a mirror of download.pytorch.org/whl, in which set-up looks for that index
#   GPU=1                       for the CUDA card that is here: constraints-gpu.txt, Unsloth, llama.cpp with CUDA
#   CARD='T4, 7.5, 570'         with GPU=1: name, compute capability and driver of a card that is not here (an image)
#   LOCK=1                      resolve versions again and write constraints.txt (`make constraints`)
set -euo pipefail
cd "$(dirname "$0")/.."

llama_cpp=llama-cpp-python==0.3.36
llama_cpp_sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
llama_cpp_options=-DLLAVA_BUILD=OFF
pytorch=${PYTORCH:-https://download.pytorch.org/whl}
# The lowest driver of each of torch's CUDA builds. A driver runs all CUDA versions of its major version: 12.x from 525,
# 13.x from 580 (docs.nvidia.com/deploy/cuda-compatibility). torch is built for 12.6, 12.8 and 13.0; the build for 13.0
# is also the one of pip's own index. Cards that 12.6 does not know (Blackwell) have driver 570 at least.
torch_builds='580 13 default
570 12 cu128
525 12 cu126'
virtualenv=virtualenv==21.15.8
venv=$PWD/.venv
log=$venv/setup.log

say() { printf 'setup: %s\n' "$*"; }
fail() { say "$*" >&2; exit 1; }

# --- Whatever can be refused is refused before anything is downloaded.

[ "$(uname -s)" = Linux ] || fail "this project runs on Linux and this is $(uname -s); use a Linux machine, a container or WSL 2"
if [ -n "${GPU:-}" ]; then
    card=${CARD:-$(nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)}
    [ -n "$card" ] ||
        fail "GPU=1, but nvidia-smi finds no card; install NVIDIA's driver, or run this without GPU=1"
    IFS=, read -r name capability driver <<<"${card//, /,}"
    [ "${capability/./}" -ge 75 ] ||
        fail "torch's CUDA build knows cards of compute capability 7.5 (a T4) and newer, and $name has $capability;" \
            "run this without GPU=1, for the CPU"
    cuda= build=
    while read -r lowest version index; do
        if [ "${driver%%.*}" -ge "$lowest" ]; then cuda=$version build=$index; break; fi
    done <<<"$torch_builds"
    [ -n "$cuda" ] ||
        fail "torch is built for CUDA 12 and newer, which needs driver 525, and this is $driver; install a newer driver," \
            "or run this without GPU=1, for the CPU"
    [ "$build" = default ] || TORCH_INDEX=${TORCH_INDEX:-$pytorch/$build}
    PATH=$PATH:/usr/local/cuda/bin
    command -v nvcc >/dev/null ||
        fail "llama.cpp is compiled for the card and nvcc is not here; install the CUDA toolkit, version $cuda," \
            "then run this again"
    compiler=$(nvcc --version | sed -nE 's/.* release ([0-9]+)\..*/\1/p')
    [ "${compiler:-0}" -le "$cuda" ] ||
        fail "nvcc is of CUDA $compiler and driver $driver runs no more than CUDA $cuda; install a newer driver, or" \
            "the CUDA toolkit, version $cuda, and put its nvcc first in PATH"
    # Scoring uses flash attention only with a cache in q8_0 (docs/files.md), and its kernels are the longest to compile.
    llama_cpp_options+=" -DGGML_CUDA=ON -DGGML_CUDA_FA=OFF -DCMAKE_CUDA_ARCHITECTURES=${capability/./}"
fi

python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
    if "$candidate" -c "$supported" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    found=$("${PYTHON:-python3}" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        found="no working Python"
    fail "Python 3.11 to 3.14 is needed and ${PYTHON:-python3} is $found;" \
        "install one, or name it: make setup PYTHON=/path/to/python3.12"
fi
# Debian and Ubuntu split these off, and not every Python there has a package of them: then virtualenv makes .venv.
has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
if ! { has_venv || "$python" -m virtualenv --version || "$python" -m pip --version; } >/dev/null 2>&1; then
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    remedy="install pip for it (https://pip.pypa.io/en/stable/installation)"
    ! apt-cache show "$package" >/dev/null 2>&1 || remedy="install it (apt install $package)"
    fail "$python lacks the venv module; $remedy, or name another: make setup PYTHON=/path/to/python3.12"
fi

compiles() { # language, header, candidates...: succeeds if one of the candidates compiles a line
    local language=$1 header=$2 candidate
    for candidate in "${@:3}"; do
        if echo "#include <$header>" | $candidate -x "$language" -fsyntax-only - 2>/dev/null; then return; fi
    done
    return 1
}
compiles c stdio.h ${CC:-cc gcc clang} && compiles c++ thread ${CXX:-c++ g++ clang++} ||
    fail "no working C and C++ compiler was found, and llama.cpp is compiled here;" \
        "install one (Debian, Ubuntu: apt install g++), then run this again"

static_only() { # a C++ compiler: succeeds if libstdc++ is there as an archive, and not as a shared library
    [ ! -e "$($1 -print-file-name=libstdc++.so)" ] && [ -e "$($1 -print-file-name=libstdc++.a)" ]
}
# Such a compiler gives llama.cpp a libstdc++ of its own. Beside the one of numpy and scipy it ended the process: in
# loading a model, or, with llama.cpp imported first, in importing scipy.
if static_only "${CXX:-c++}"; then
    { compiles c stdio.h cc && compiles c++ thread c++ && ! static_only c++; } ||
        fail "${CXX:-c++} has no shared libstdc++, and with a static one llama.cpp crashes beside numpy;" \
            "install a whole g++ (Debian, Ubuntu: apt install g++), or name one: make setup CXX=/usr/bin/g++"
    say "$CXX has no shared libstdc++: $(command -v c++) compiles in its place"
    export CC=cc CXX=c++ CUDAHOSTCXX=c++
fi

installed=
if compgen -G "$venv/lib/python3*/site-packages/torch/version.py" >/dev/null; then installed=1; fi
reached() { "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=10)' "$1" 2>/dev/null; }
# Without a card, torch needs no CUDA. A network that has pip's index alone has torch with CUDA alone.
if [ -z "${GPU:-}${LOCK:-}${TORCH_INDEX:-}$installed" ]; then
    if reached "$pytorch/cpu/torch/"; then TORCH_INDEX=$pytorch/cpu; else
        say "$pytorch/cpu cannot be reached: torch comes from pip's own index, which may have it with CUDA alone"
    fi
fi

# Measured: 2.4 GB stay in .venv with torch for the CPU, and downloads and builds lie beside it meanwhile. torch for
# CUDA is 2.5 GB more to download (pip's cache keeps a copy) and 3.9 GB unpacked.
case ${GPU:-}${TORCH_INDEX:-} in */cpu*) need=4 ;; 1*) need=16 ;; *) need=13 ;; esac
[ -z "$installed" ] || need=1
free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1000000))
[ "$free" -ge "$need" ] || fail "$need GB of free disk are needed in $PWD and there are $free; free some"

# --- The virtual environment.

make_venv() {
    if has_venv; then "$python" -m venv "$venv"
    elif "$python" -m virtualenv --version; then "$python" -m virtualenv "$venv"
    else # pip installs it beside .venv, where Debian's pip may also write, and .venv does not need it afterwards
        "$python" -m pip install --target "$venv.partial" "$virtualenv" &&
            PYTHONPATH=$venv.partial "$python" -m virtualenv "$venv"
        local status=$?
        rm -rf "$venv.partial"
        return $status
    fi
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "1/3 virtual environment: .venv, $("$python" --version)"
    rm -rf "$venv"
    lines=$(make_venv 2>&1) || fail "$python could not make .venv: ${lines##*$'\n'}"
fi
export TMPDIR=$venv/tmp PATH=$venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
rm -rf "$TMPDIR"
mkdir "$TMPDIR"
trap 'rm -rf "$TMPDIR"' EXIT
: >"$log"

pip() { # pip with its output in the log, of which downloads of 20 MB and more and errors are shown
    local shown='s/^.*Downloading ([^ ]+)-[0-9][^ ]* (\(([2-9][0-9]|[0-9]{3,})\.[0-9] MB\)|\([0-9.]+ GB\)).*/setup:     \1 \2/p; /^ *ERROR:/p'
    if ! "$venv/bin/python" -m pip "$@" --progress-bar off 2>&1 | tee -a "$log" | sed -unE "$shown"; then
        local why="the lines above or .venv/setup.log say why"
        ! grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout' "$log" || why="the package index cannot be reached"
        fail "pip $1 failed: $why; running this again goes on from here"
    fi
}

# --- Packages.

say "2/3 packages: the first time 0.7 GB to download (3.2 GB with CUDA), a minute or more"
wanted=$TMPDIR/requirements.txt
if [ -n "${GPU:-}" ]; then
    # The whole set as it ran. A resolver would choose other versions: Unsloth's metadata refuse the certifi that ran with it.
    grep -v -e '^#' -e '^llama-cpp-python==' constraints-gpu.txt >"$wanted"
    constraints=constraints-gpu.txt
else
    "$venv/bin/python" -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
del extras["unsloth"]
pins = {pin for group in [project["dependencies"], *extras.values()] for pin in group}
print(*sorted(pin for pin in pins if not pin.startswith("llama-cpp-python")), sep="\n")
' >"$wanted"
    constraints=constraints.txt
    [ -z "${LOCK:-}" ] || constraints=/dev/null
fi
pip install "$(grep '^pip==' "$wanted")"
if [ -n "${TORCH_INDEX:-}" ]; then
    mapfile -t torch < <(grep -E '^torch(vision)?==' "$wanted")
    pip install --no-deps --index-url "$TORCH_INDEX" "${torch[@]}"
fi
if [ -n "${GPU:-}" ]; then
    pip install -c "$constraints" "$(grep '^torch==' "$wanted")" # and the CUDA libraries that it names
    pip install --no-deps -r "$wanted"
else
    pip install -r "$wanted" -c "$constraints"
fi

# --- llama.cpp: the runtime, its converter and its gguf library, all from the source package of llama-cpp-python.

# The compiler optimises for the CPU that it runs on, so wheels are kept for this very source, compiler and CPU.
key=$({
    echo "$llama_cpp_sha256 $llama_cpp_options"
    cat setup/llama.cmake
    ${CXX:-c++} --version
    grep -m 1 -E '^(flags|Features)' /proc/cpuinfo
} 2>&1 | sha256sum)
wheels=${XDG_CACHE_HOME:-${HOME:-$venv}/.cache}/medical-reasoner/llama.cpp-${key:0:16}
if [ ! -d "$wheels" ]; then
    say "3/3 llama.cpp: compiling, about 2 minutes on two cores"
    echo "$llama_cpp --hash=sha256:$llama_cpp_sha256" >"$TMPDIR/llama.txt"
    pip download --no-deps --no-build-isolation --no-binary :all: -r "$TMPDIR/llama.txt" -d "$TMPDIR"
    tar -xzf "$TMPDIR"/llama_cpp_python-*.tar.gz -C "$TMPDIR"
    source=$(echo "$TMPDIR"/llama_cpp_python-*/)
    export CMAKE_ARGS="$llama_cpp_options '-DCMAKE_PROJECT_llama.cpp_INCLUDE=$PWD/setup/llama.cmake'"
    pip wheel --no-deps --no-build-isolation -w "$TMPDIR/wheels" \
        "$source" "$source/vendor/llama.cpp" "$source/vendor/llama.cpp/gguf-py"
    mkdir -p "$wheels.partial"
    mv "$TMPDIR"/wheels/*.whl "$wheels.partial"
    mv "$wheels.partial" "$wheels"
fi
pip install --no-deps --force-reinstall "$wheels"/*.whl

if [ -n "${LOCK:-}" ]; then
    sed -i '/^[^#]/d' constraints.txt
    "$venv/bin/python" -c '
from importlib.metadata import distributions
pins = {d.name.lower().replace("_", "-"): d.version.partition("+")[0] for d in distributions()}
chosen_by_torch = ("cuda-", "nvidia-", "triton")
print(*(f"{name}=={pins[name]}" for name in sorted(pins) if not name.startswith(chosen_by_torch)), sep="\n")
' >>constraints.txt
fi
"$venv/bin/python" -m pipeline plots --frame-only
if [ -n "${GPU:-}" ] && [ -z "${CARD:-}" ]; then
    "$venv/bin/python" -c 'import torch; torch.ones(1, device="cuda") + 1' 2>>"$log" ||
        fail "torch cannot use $name (driver $driver): the end of .venv/setup.log says why"
fi
# Which set of versions this is: a stage refuses to run with others.
echo "constraints${GPU:+-gpu}.txt" >"$venv/ready"
say "done"
