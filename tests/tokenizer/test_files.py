"""Reading and writing tokenizer.json, and what is said about files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gptedge.errors import TokenizerError
from gptedge.tokenizer import Tokenizer


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_round_trip_keeps_behaviour(pairs, strings, tmp_path):
    for name, pair in pairs.items():
        path = tmp_path / f"{name}.json"
        pair.theirs.save(str(path))  # as Hugging Face writes it
        ours = Tokenizer.from_file(path)
        ours.save(path)
        again = tokenizers.Tokenizer.from_file(str(path))
        assert again.to_str() == pair.theirs.to_str()
        for text in strings(60, 8):
            ids = pair.theirs.encode(text).ids
            assert ours.encode(text, add_special_tokens=True) == again.encode(text).ids == ids
            assert ours.decode(ids) == again.decode(ids)


def test_same_content_gives_same_bytes(pairs, tmp_path):
    for pair in pairs.values():
        assert pair.ours.to_dict() == pair.source
        pair.ours.save(tmp_path / "a.json")
        Tokenizer.from_file(tmp_path / "a.json").save(tmp_path / "b.json")
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_to_dict_is_a_copy(pairs):
    pairs["gpt2"].ours.to_dict()["model"]["vocab"].clear()
    assert pairs["gpt2"].ours.to_dict()["model"]["vocab"]


def test_ids_and_tokens(pairs):
    for name, pair in pairs.items():
        theirs = pair.theirs.get_vocab(with_added_tokens=True)
        assert pair.ours.vocab_size == max(theirs.values()) + 1
        for token, i in theirs.items():
            assert pair.ours.token_to_id(token) == i == pair.theirs.token_to_id(token)
            assert pair.ours.id_to_token(i) == token, name  # theirs gives the normalized form of an added token
        special = {i for i, t in pair.theirs.get_added_tokens_decoder().items() if t.special}
        assert pair.ours.special_ids == special
        assert [t.id for t in pair.ours.added_tokens] == sorted(pair.theirs.get_added_tokens_decoder())
    assert pairs["gpt2"].ours.token_to_id("no such token") is None
    assert pairs["gpt2"].ours.id_to_token(10**6) is None
    with pytest.raises(TokenizerError, match="no token with the id 1000000"):
        pairs["gpt2"].ours.token_bytes(10**6)


def test_folder_with_and_without_config(pairs, tmp_path):
    write(tmp_path / "tokenizer.json", pairs["llama2"].source)
    plain = Tokenizer.from_folder(tmp_path)
    assert (plain.bos_id, plain.eos_id, plain.pad_id, plain.unk_id) == (None, None, None, None)
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "unk_token": "<unk>",
    }
    write(tmp_path / "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, None, 0)
    assert tokenizer.adds_bos
    assert tokenizer.adds_eos
    source = pairs["llama2"].source | {"post_processor": None}
    bare = Tokenizer.from_dict(source, config)
    assert not bare.adds_bos
    assert not bare.adds_eos


def test_duplicate_added_tokens_and_gaps_in_ids(pairs, strings):
    """Ids in the file are not believed; a token listed twice has its last flags, a merge its last rank."""
    source = pairs["gpt2"].source
    token = source["added_tokens"][0]
    more = [token | {"content": "<new>", "id": 7}, token | {"content": "<new>", "special": False, "lstrip": True}]
    more += [token | {"content": "", "id": 8}, token | {"content": "<|im_", "id": 9}]
    model = source["model"] | {"merges": source["model"]["merges"] + source["model"]["merges"][5:20]}
    source = source | {"added_tokens": source["added_tokens"] + more, "model": model}
    ours, theirs = Tokenizer.from_dict(source), tokenizers.Tokenizer.from_str(json.dumps(source))
    assert ours.token_to_id("<new>") == theirs.token_to_id("<new>")
    for text in strings(500, 12):
        text = text.replace("a", " <new>")
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)


BROKEN_FILES = {
    "not json": ("{nope", "is not JSON"),
    "truncated": ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0', "is not JSON"),
    "empty": ("", "is not JSON"),
    "a list": ("[]", "is not a JSON object"),
    "deep": ("[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_files_that_are_not_json_objects(case, tmp_path):
    content, message = BROKEN_FILES[case]
    path = write(tmp_path / "tokenizer.json", content)
    for load in (lambda: Tokenizer.from_file(path), lambda: Tokenizer.from_folder(tmp_path)):
        with pytest.raises(TokenizerError, match=message) as e:
            load()
        assert str(path) in str(e.value)
        assert "\n" not in str(e.value)


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b'{"version": "\xff\xff"}')
    with pytest.raises(TokenizerError, match="is not JSON"):
        Tokenizer.from_folder(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read: No such file"):
        Tokenizer.from_folder(tmp_path)


def broken(path: str, value: Any) -> tuple[list[str], Any]:
    return path.split("/"), value


BROKEN_BLOCKS = {
    "no model": (broken("model", None), "'model' is missing"),
    "other model": (broken("model", {"type": "Unigram", "vocab": []}), "model type 'Unigram' is not supported"),
    "no vocab": (broken("model/vocab", None), "'vocab' is None, and an object is needed"),
    "vocab list": (broken("model/vocab", []), "'vocab' is"),
    "id string": (broken("model/vocab", {"a": "0"}), "token 'a' has the id '0'"),
    "id true": (broken("model/vocab", {"a": True}), "token 'a' has the id True"),
    "id negative": (broken("model/vocab", {"a": -1}), "token 'a' has the id -1"),
    "merges text": (broken("model/merges", "a b"), "'merges' is 'a b', and a list is needed"),
    "merge unknown": (broken("model/merges", [["a", "b"], ["a", "zz"]]), "merge 0 needs 'ab'|merge 1 needs 'zz'"),
    "merge of three": (broken("model/merges", [["a", "b", "c"]]), "merge 0 is .*two tokens are needed"),
    "merge string of three": (broken("model/merges", ["a b c"]), "merge 0 is .*two tokens are needed"),
    "merge number": (broken("model/merges", [1]), "merge 0 is 1, and two tokens are needed"),
    "merge of numbers": (broken("model/merges", [[1, 2]]), "merge 0 is .*two tokens are needed"),
    "dropout": (broken("model/dropout", 0.1), "'dropout' is 0.1, and only null is supported"),
    "flag": (broken("model/byte_fallback", "yes"), "'byte_fallback' is 'yes', and true or false is needed"),
    "version": (broken("version", "2.0"), "version '2.0' is not supported"),
    "normalizer": (broken("normalizer", {"type": "Precompiled"}), "normalizer type 'Precompiled' is not supported"),
    "normalizer text": (broken("normalizer", "NFC"), "normalizer is 'NFC', and an object is needed"),
    "pre-tokenizer": (broken("pre_tokenizer", {"type": "BertPreTokenizer"}), "'BertPreTokenizer' is not supported"),
    "decoder": (broken("decoder", {"type": "WordPiece"}), "decoder type 'WordPiece' is not supported"),
    "post-processor": (broken("post_processor", {"type": "BertProcessing"}), "'BertProcessing' is not supported"),
    "no type": (broken("decoder", {}), "'type' is missing, and a string is needed"),
    "behavior": (
        broken("pre_tokenizer", {"type": "Split", "pattern": {"String": " "}, "behavior": "Odd", "invert": False}),
        "'behavior' is 'Odd', and one of Removed, Isolated",
    ),
    "pattern": (
        broken("pre_tokenizer", {"type": "Split", "pattern": "x", "behavior": "Isolated", "invert": False}),
        "'pattern' is 'x'",
    ),
    "bad regex": (
        broken("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        "is not a regular expression",
    ),
    "added tokens": (broken("added_tokens", {"a": 1}), "'added_tokens' is .*a list is needed"),
    "added token": (broken("added_tokens", ["<s>"]), "'<s>' is not an object"),
    "added content": (broken("added_tokens", [{"id": 0, "content": 5}]), "'content' is 5, and a string is needed"),
    "added flag": (broken("added_tokens", [{"id": 0, "content": "x"}]), "added_tokens 'x': 'single_word' is missing"),
    "mark": (
        broken("decoder", {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "never"}),
        "'replacement' is 'ab', and one character is needed",
    ),
    "template": (
        broken("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]}),
        "'<s>' is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_BLOCKS)
def test_broken_blocks_are_named_with_the_file(case, gpt2_source, tmp_path):
    (keys, value), message = BROKEN_BLOCKS[case]
    *parents, last = keys
    block = gpt2_source
    for key in parents:
        block = block[key]
    block[last] = value
    path = write(tmp_path / "tokenizer.json", gpt2_source)
    with pytest.raises(TokenizerError, match=message) as e:
        Tokenizer.from_file(path)
    assert str(e.value).startswith(f"{path}: ")
    assert "\n" not in str(e.value)
