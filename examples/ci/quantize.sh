#!/usr/bin/env bash
# Export a checkpoint, quantize it, and fail when the result is too large or too far from the original.
#
#   SOURCE   the checkpoint: a Hugging Face folder, a .gguf file or a nanoGPT .pt file
#   TEXT     UTF-8 text to measure on, 16,000 tokens or more; other text than the model is calibrated on
#   WORK     where everything goes: fp32/ and quantized/ (bundles), eval.json   (default: build)
#   RECIPE   of gptedge quantize                                               (default: int8)
#   TARGET_MB                                     the size that RECIPE=mixed fills
#   CALIBRATION                                   text for recipes that learn from data (optional)
#   PREFILL KV                                    int8: a graph for prompts, an 8-bit KV cache (optional)
#   MAX_SIZE_MB MAX_KL MIN_TOP1 MAX_PPL_INCREASE  bounds (optional)
#   BASELINE                                      an earlier eval.json to be no worse than (optional)
#
# Ends with gptedge's exit code: 4 when a gate failed.
set -euo pipefail

source=${SOURCE:?set SOURCE to the checkpoint}
text=${TEXT:?set TEXT to a text file}
[ -f "$text" ] || { echo "TEXT is $text, which is no file" >&2; exit 2; }
work=${WORK:-build}
mkdir -p "$work"

options=()
option() { # option FLAG VALUE: adds both, unless the value is empty
    if [ -n "$2" ]; then options+=("$1" "$2"); fi
}

echo "::group::export"
gptedge export "$source" "$work/fp32" --force
echo "::endgroup::"

echo "::group::quantize"
option --target-mb "${TARGET_MB:-}"
option --calibration "${CALIBRATION:-}"
option --prefill "${PREFILL:-}"
option --kv "${KV:-}"
gptedge quantize "$work/fp32" "$work/quantized" --recipe "${RECIPE:-int8}" ${options[@]+"${options[@]}"} --force
echo "::endgroup::"

options=()
option --max-size-mb "${MAX_SIZE_MB:-}"
option --max-kl "${MAX_KL:-}"
option --min-top1 "${MIN_TOP1:-}"
option --max-ppl-increase "${MAX_PPL_INCREASE:-}"
option --baseline "${BASELINE:-}"
# Into the file only once there are figures, so that the last ones stay until then: BASELINE may be the same file.
code=0
gptedge eval "$work/quantized" --reference "$work/fp32" --text "$text" \
    ${options[@]+"${options[@]}"} --json >"$work/eval.json.new" || code=$?
case $code in
    0 | 4) mv "$work/eval.json.new" "$work/eval.json" ;;
    *) rm -f "$work/eval.json.new" ;;
esac
exit "$code"
