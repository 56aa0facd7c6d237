"""Our trainer learns what Hugging Face's BpeTrainer learns, merge for merge."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Theirs

from gptedge.errors import DataError, UsageError
from gptedge.tokenizer import GPT2_PATTERN, QWEN2_PATTERN, Tokenizer, train_bpe


def their_training(texts: list[str], size: int, special: Sequence[str], pattern: str, min_frequency: int) -> Theirs:
    theirs = Theirs(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(texts, trainer)
    return theirs


def check(
    texts: list[str], size: int, *, special: Sequence[str] = (), pattern: str = QWEN2_PATTERN, min_frequency: int = 2
) -> Tokenizer:
    ours = train_bpe(texts, size, special_tokens=special, pattern=pattern, min_frequency=min_frequency)
    theirs = json.loads(their_training(texts, size, special, pattern, min_frequency).to_str())["model"]
    model = ours.to_dict()["model"]
    assert model["merges"] == theirs["merges"]
    assert model["vocab"] == theirs["vocab"]
    return ours


def test_mixed_text(strings):
    ours = check(list(strings(1500, 1)), 1500, special=["<|endoftext|>", "<|im_start|>"])
    assert ours.special_ids == {0, 1}
    assert ours.encode("<|im_start|>") == [1]


def test_prose_with_gpt2_pattern(strings):
    check(["".join(strings(50, seed)) for seed in range(10)], 900, pattern=GPT2_PATTERN)


def test_ties_everywhere():
    """Every word once and of few letters: nearly every choice is between pairs of one count."""
    rng = random.Random(5)
    check([" ".join("".join(rng.choices("abcd", k=rng.randrange(2, 9))) for _ in range(400))], 600, min_frequency=1)
    check(["abcdefgh hgfedcba badcfehg"], 300, min_frequency=1)


def test_repeats_and_overlaps():
    check(["aaaa aaaaa aaaaaaa a aa aaa", "abababab babab ababa" * 3, "\n" * 37 + " " * 53], 400, min_frequency=0)


def test_few_letters_and_many_merges():
    rng = random.Random(8)
    for seed in range(6):
        words = ["".join(rng.choices("ab", k=rng.randrange(1, 14))) for _ in range(200 + 100 * seed)]
        check([" ".join(words)], 256 + 400, min_frequency=1)


def test_cjk():
    rng = random.Random(6)
    common = "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    check(["".join(rng.choices(common, weights=range(len(common), 0, -1), k=60)) + "。" for _ in range(300)], 1200)


def test_special_tokens_that_are_bytes_or_merges():
    check(["the then them there a a a"] * 5, 290, special=["a", "the", "<s>"])


@pytest.mark.parametrize("min_frequency", [1, 2, 3, 4])
def test_stops_at_the_smallest_frequency(min_frequency):
    words = ["tree", "trees", "street", "steer", "reset", "rest"]
    ours = check(
        [" ".join(word for i, word in enumerate(words) for _ in range(i + 1))], 5000, min_frequency=min_frequency
    )
    assert ours.vocab_size < 5000


def test_runs_out_of_pairs_before_the_size_is_reached():
    ours = check(["hello hello"], 5000)
    assert ours.vocab_size < 300


def test_characters_newer_than_unicode_16():
    check(["\U00011de3\U00011de4 x\U0001e6c0\U0001e6c1 \u1ad0" * 4], 280)


def test_deterministic_and_usable(strings, tmp_path):
    texts = list(strings(300, 2))
    first, second = (train_bpe(iter(texts), 600, special_tokens=["<s>"]) for _ in range(2))
    first.save(tmp_path / "a.json")
    second.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    theirs = Theirs.from_file(str(tmp_path / "a.json"))
    for text in strings(200, 3):
        assert first.encode(text) == theirs.encode(text).ids
        assert (
            first.decode(first.encode(text), skip_special_tokens=False)
            == text
            == theirs.decode(theirs.encode(text).ids, skip_special_tokens=False)
        )


def test_progress_counts_up():
    seen: list[tuple[int, int]] = []
    train_bpe(["the cat sat on the mat"] * 3, 262, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_arguments_are_checked():
    with pytest.raises(UsageError, match="vocab_size is 200, and 256 bytes and 1 special tokens need 257"):
        train_bpe(["a"], 200, special_tokens=["<s>"])
    with pytest.raises(UsageError, match="distinct"):
        train_bpe(["a"], 300, special_tokens=["<s>", "<s>"])
    with pytest.raises(DataError, match=r"text 1: .*U\+DC80 at character 2"):
        train_bpe(["fine", "ab\udc80"], 300)


@pytest.mark.slow
def test_a_larger_corpus(strings):
    check(["".join(strings(100, seed)) for seed in range(300)], 8000)
