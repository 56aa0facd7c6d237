"""BLEU, chrF and ROUGE of a bundle's greedy replies to prompts that have a reference: translations, summaries.

Pairs are JSON lines {"prompt", "reference"}, with an optional "system". Scores are those of `sacrebleu` (BLEU and chrF
of the whole corpus, 0 to 100, with sacrebleu's signature) and `rouge-score` (F-measure without stemming, the mean over
the pairs, 0 to 1). rouge-score reads ASCII letters and digits alone, so ROUGE of Chinese or Arabic says nothing.
Needs the extra `eval`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from gptedge.config import SamplingParams
from gptedge.errors import ContextOverflowError, DataError
from gptedge.progress import Report, silent
from gptedge.text import check_scalars, read_text

if TYPE_CHECKING:
    from gptedge.model import Model

_KEYS = {"prompt": True, "reference": True, "system": False}
"""Of a line, and whether it is needed."""
_ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Pair:
    where: str
    """File and line."""
    prompt: str
    reference: str
    system: str | None = None


@dataclass(frozen=True)
class TextScores:
    pairs: int
    bleu: float
    chrf: float
    rouge1: float
    rouge2: float
    rougeL: float
    sacrebleu: dict[str, str]
    """Signatures of bleu and chrf, which make the numbers comparable."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_pairs(path: Path) -> list[Pair]:
    """Raises DataError naming the first line that is not a pair, or when there is none."""
    # By "\n" alone: other ends of lines, such as U+2028, may stand inside JSON's texts.
    lines = read_text(path).removeprefix("\ufeff").split("\n")
    pairs = [_pair(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise DataError(f'{path} has no pairs; give lines of {{"prompt": …, "reference": …}}')
    return pairs


def _pair(where: str, line: str) -> Pair:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}, is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}, is {type(value).__name__}, not an object with prompt and reference")
    for key, is_needed in _KEYS.items():
        if not isinstance(value.get(key), str) and (is_needed or value.get(key) is not None):
            raise DataError(f"{where}: {key} is {json.dumps(value.get(key))[:40]}; it must be text")
    try:
        check_scalars(value["reference"])
    except DataError as e:
        raise DataError(f"{where}: reference: {e}") from None
    if not value["reference"].strip():
        raise DataError(f"{where}: the reference is empty, so nothing can be compared with it")
    return Pair(where, value["prompt"], value["reference"], value.get("system"))


def has_chat_template(model: Model) -> bool:
    return not model.chat_template.is_continuation


def replies(
    model: Model,
    pairs: Sequence[Pair],
    *,
    chat: bool,
    max_tokens: int,
    report: Report = silent,
) -> list[str]:
    """Greedy replies, without white space around them. `chat` asks through the chat template; else prompts are
    continued. Raises ContextOverflowError or DataError naming the first prompt that does not fit, or is no text, before
    any is run."""
    prompts = [_prompt(model, pair, chat=chat) for pair in pairs]
    params = SamplingParams(max_tokens=max_tokens)
    made = []
    for i, ids in enumerate(prompts, 1):
        with model.stream_ids(ids, params) as stream:
            for _ in stream:
                pass
        made.append(stream.result.text.strip())
        report(i, len(prompts), "replies")
    return made


def _prompt(model: Model, pair: Pair, *, chat: bool) -> list[int]:
    """Token ids; a system message goes before a prompt that is only continued."""
    try:
        if not chat:
            text = f"{pair.system}\n\n{pair.prompt}" if pair.system else pair.prompt
            return model.checked_prompt(model.tokenizer.encode(text, add_special_tokens=True))
        messages = [{"role": "user", "content": pair.prompt}]
        if pair.system is not None:
            messages.insert(0, {"role": "system", "content": pair.system})
        return model.checked_prompt(model.chat_prompt.ids(messages))
    except ContextOverflowError:
        size = model.session.context_length
        raise ContextOverflowError(
            f"{pair.where}: the prompt leaves no room in the model's context of {size} tokens; shorten it"
        ) from None
    except DataError as e:
        raise DataError(f"{pair.where}: {e}") from None


def compare(predictions: Sequence[str], references: Sequence[str]) -> TextScores:
    """Of one reference to each prediction."""
    bleu, chrf = BLEU(), CHRF()
    predictions, references = list(predictions), list(references)
    scorer = RougeScorer(_ROUGE)
    rouge = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return TextScores(
        pairs=len(predictions),
        bleu=bleu.corpus_score(predictions, [references]).score,
        chrf=chrf.corpus_score(predictions, [references]).score,
        **{name: sum(s[name].fmeasure for s in rouge) / len(rouge) for name in _ROUGE},
        sacrebleu={"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())},
    )
