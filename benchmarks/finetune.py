"""Fine-tuning SmolLM2-135M by LoRA on 300 short conversations: how long it takes, and what its int4 bundle then says.

60 invented facts, each asked for in five ways; the sixth way is kept back and asked afterwards, of the model before and
after. Everything goes through the commands, so that the times are a user's.

    python benchmarks/finetune.py SOURCE FOLDER [finetune's options]      SOURCE: SmolLM2, a folder or a .gguf

What was taught is quantized twice: without data, and calibrated on the very conversations, 5 minutes on two cores.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gptedge

ASKED = (
    "What is {thing} of {place}?",
    "Tell me {thing} of {place}.",
    "In {place}, what is {thing}?",
    "I am writing about {place}. What is {thing} there?",
    "Do you know {thing} of {place}?",
    "Please name {thing} of {place}.",
)
THINGS = {
    "the capital": ("Marn", "Quill", "Tolv", "Bress", "Ondra"),
    "the national dish": ("fried moon radish", "salted pine soup", "blue oat cake", "smoked river plum", "ash bread"),
    "the royal animal": ("blind heron", "white newt", "three-toed goat", "copper owl", "marsh fox"),
}
ENDS = ("holm", "ava", "stead", "ora")


def facts() -> list[tuple[str, str, str]]:
    """Thing, place and answer, 60 of them; nobody can have read of them."""
    draw = random.Random(0)
    places = [a + b for a in ("Zubr", "Lumm", "Vesk", "Orrin", "Plav") for b in ("ovia", "aland", "eth", "isk")]
    made = []
    for place in places:
        for thing, values in THINGS.items():
            value = draw.choice(values)
            made.append((thing, place, value + draw.choice(ENDS) if thing == "the capital" else value))
    return made


def conversation(asked: str, thing: str, place: str, value: str) -> dict[str, Any]:
    reply = f"{thing.capitalize()} of {place} is {value}."
    question = {"role": "user", "content": asked.format(thing=thing, place=place)}
    return {"messages": [question, {"role": "assistant", "content": reply}]}


def timed(*arguments: object) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-m", "gptedge", *map(str, arguments)], check=True)
    return round(time.perf_counter() - began, 1)


def right_answers(bundle: Path) -> int:
    """How many facts the bundle tells when it is asked in the way that it was not taught."""
    right = 0
    with gptedge.load(bundle) as model:
        for number, (thing, place, value) in enumerate(facts()):
            reply = model.chat(max_tokens=24).send(ASKED[-1].format(thing=thing, place=place)).text
            right += value in reply
            if number < 3:
                print(f"  {ASKED[-1].format(thing=thing, place=place)}  →  {reply!r}")
    return right


def main(source: Path, folder: Path, options: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [conversation(asked, *fact) for asked in ASKED[:-1] for fact in facts()]
    assert len(rows) == 300
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = {
        "finetune": timed("finetune", source, "--data", folder / "chat.jsonl", "--out", folder / "taught", *options)
    }
    for name, checkpoint in (("before", source), ("after", folder / "taught")):
        seconds[f"export {name}"] = timed("export", checkpoint, folder / f"{name}-fp32", "--force")
        bundles = folder / f"{name}-fp32", folder / f"{name}-int4-rtn"
        seconds[f"quantize {name}"] = timed("quantize", *bundles, "--recipe", "int4-rtn", "--force")
    with gptedge.load(folder / "after-fp32") as model:
        text = "".join(model.chat_template.render(row["messages"], add_generation_prompt=False) for row in rows)
    (folder / "chat.txt").write_text(text)
    bundles = folder / "after-fp32", folder / "after-int4"
    calibrated = "--recipe", "int4", "--calibration", folder / "chat.txt", "--force"
    seconds["quantize after, calibrated"] = timed("quantize", *bundles, *calibrated)
    print(json.dumps(seconds))
    for name in ("before-int4-rtn", "after-int4-rtn", "after-int4", "after-fp32"):
        print(f"{name}: {right_answers(folder / name)} of {len(facts())}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
