"""Run by the Python of optimum: greedy tokens after prompts, as JSON."""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM

work = json.load(sys.stdin)
model = ORTModelForCausalLM.from_pretrained(work["bundle"])


def greedy(ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=work["count"], do_sample=False)
    return got[0, len(ids) :].tolist()


print(json.dumps({"tokens": [greedy(ids) for ids in work["prompts"]]}))
