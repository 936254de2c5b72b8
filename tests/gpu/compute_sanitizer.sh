#!/usr/bin/env bash
# The CUDA kernels under compute-sanitizer's four tools, on a machine with an NVIDIA GPU: every case of the selftest.
#
#     tests/gpu/compute_sanitizer.sh [FOLDER]        one log per tool in FOLDER (default: sanitizer); PYTHON names the interpreter
#
# Exit status: 0 all tools ran and found nothing; 1 one of them found something, or the selftest failed under it; 127 not installed.
set -uo pipefail
folder=$(realpath -m "${1:-sanitizer}")
cd "$(dirname "$0")/../.."

sanitizer=$(PATH="$PATH${CUDA_HOME:+:$CUDA_HOME/bin}" command -v compute-sanitizer) || {
    echo "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin. It comes with the CUDA toolkit (in NVIDIA's repositories the package" \
        "cuda-sanitizer-13-0), or: pip install 'nvidia-cuda-sanitizer-api>=13.4', then put its nvidia/cu13/bin on PATH" >&2
    exit 127
}
mkdir -p "$folder" || exit 1

# torch's allocator would hand out pieces of large blocks: reads past a tensor's end, and of what nobody wrote, would go unseen
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

failed=0
for tool in memcheck racecheck synccheck initcheck; do
    options=(--tool "$tool" --error-exitcode 1)
    clean="ERROR SUMMARY: 0 errors"
    case $tool in
    # torch probes the driver with calls that may fail; a launch of ours that fails raises in the selftest
    memcheck) options+=(--padding 32 --report-api-errors no) ;;
    racecheck) clean="RACECHECK SUMMARY: 0 hazards" ;;
    # no --kernel-name for initcheck: what the kernels left out have written would count as unwritten
    esac
    "$sanitizer" "${options[@]}" "${PYTHON:-python}" -m ltkernels.selftest --device cuda --backend cuda >"$folder/$tool.log" 2>&1
    status=$?
    # a tool that could not attach says nothing, and that is no pass
    if [ $status -eq 0 ] && grep -q "$clean" "$folder/$tool.log"; then
        echo "$tool: clean"
    else
        failed=1
        echo "$tool: FAILED (status $status), see $folder/$tool.log:"
        grep -m 20 -E "^=+ .*(SUMMARY|Error|error|Invalid|hazard|Uninitialized|Barrier)|MISS|error:" "$folder/$tool.log"
    fi
done
exit $failed
