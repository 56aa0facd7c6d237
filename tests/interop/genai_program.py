"""Run by the Python of onnxruntime-genai: greedy tokens after prompts, and its own encoding of texts, as JSON."""

import json
import sys

import numpy as np
import onnxruntime_genai as og


def greedy(model: og.Model, ids: list[int], count: int) -> list[int]:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([ids], np.int32))
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


work = json.load(sys.stdin)
model = og.Model(work["bundle"])
tokenizer = og.Tokenizer(model)
print(
    json.dumps(
        {
            "tokens": [greedy(model, ids, work["count"]) for ids in work["prompts"]],
            "encoded": [tokenizer.encode(text).tolist() for text in work["texts"]],
        }
    )
)
