"""Run by the Python of llama-cpp-python: quantize a GGUF file. In: [source, target, llama.cpp's number of the kind]."""

import ctypes
import json
import sys

import llama_cpp

source, target, kind = json.load(sys.stdin)
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = kind
if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
    sys.exit(f"llama.cpp could not quantize {source} to type {kind}")
print("null")
