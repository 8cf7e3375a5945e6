"""The tokenizer: ids equal Hugging Face's, text comes back, and what is unknown is refused.

The folders are built here: a small byte-level BPE with the pre-tokenizer, and normalizer of the real models.
"""
import collections
import functools
import json
import random
import re
import unicodedata

import pytest

from model import Tokenizer, UserError

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = ("The price of the 3 tickets is $12.50, don't they'll say; we've 1234567 reasons. Then the user said: café, "
        "naïve, 東京 東京 日本 日本, Привет привет!\n\n    def f(x):\n        return x ** 2  # the square\n\tthe  end... "
        "system user assistant You are helpful. answer is 1000 2000 100 10 123 123 456 456 12345 e\u0301\u0301 ÅÅ ") * 2
STRINGS = [
    "", "the", " the end ", "don't DON'T we'LL 's", "12345 x1 2", "$1,000.50", "  two   spaces\n\n\n\tx  ", "\r\n \r\n",
    "café cafe\u0301 A\u030a \u212b", "東京と日本、한국어", "Привет", "🙂👩‍👩‍👧 🇫🇷", "٣٤ ½ Ⅷ ²", "a\u00a0b\u3000c\u2028d\x85",
    "ſ'ſ 'S", "def f(x):\n    return x", "<think>2</think> <thin", "\0\x7f\ufdd0\U0010ffff", "...  ...", " qzx qzxq"]
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTER = {b: chr(b) for b in BYTES} | {b: chr(256 + k) for k, b in enumerate(sorted({*range(256)} - {*BYTES}))}
ORDER = [LETTER[b] for b in BYTES + sorted({*range(256)} - {*BYTES})]


@functools.cache
def trained(count=120):
    """The merges of a byte-level BPE trained on TEXT."""
    words = collections.Counter(re.findall(r" ?\w+|[^\w\n]+|\n+", TEXT))
    words = {tuple(LETTER[b] for b in word.encode()): n for word, n in words.items()}
    merges = []
    for _ in range(count):
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        joined = {}
        for word, n in words.items():
            new = []
            for letter in word:  # left to right, as BPE does
                new = new[:-1] + [new[-1] + letter] if new and (new[-1], letter) == best else new + [letter]
            joined[tuple(new)] = n
        words = joined
    return merges


def write_folder(folder, kind, template=None):
    """A folder like `kind`'s: same pre-tokenizer, normalizer, merge spelling, place of specials and BOS habits."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    regex = SPLIT.replace("DIGITS", r"\p{N}{1,3}" if kind == "llama" else r"\p{N}")
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    specials, plain, letters, merges = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], [], ORDER, trained()
    config, post, normalizer, steps = {"eos_token": "<|im_end|>"}, None, None, [split, byte_level]
    if kind == "qwen":
        normalizer, config["bos_token"], config["add_bos_token"], plain = {"type": "NFC"}, None, False, ["<tool_call>"]
    elif kind == "r1":
        normalizer = {"type": "Sequence", "normalizers": []}
        specials = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
        plain = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]  # not special, says DeepSeek's own file
        config = {"bos_token": {"__type": "AddedToken", "content": specials[0]}, "add_bos_token": True}
    elif kind == "llama":
        specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        config = {"bos_token": specials[0], "eos_token": specials[4]}
        post = {"type": "Sequence", "processors": [byte_level, {
            "type": "TemplateProcessing", "pair": [], "single": [
                {"SpecialToken": {"id": specials[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {specials[0]: {"id": specials[0], "ids": [0], "tokens": [specials[0]]}}}]}
    elif kind == "smol":
        letters = [letter for letter in ORDER if letter not in {LETTER[b] for b in b"\x04\x06\x1d\xc0\xf2\xff"}]
        steps = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    elif kind == "gpt2":
        steps = [byte_level | {"use_regex": True}]
    elif kind == "tiny":
        letters, merges, specials, steps = [*"0123456789,=;A"], [], ["<|end|>"], [byte_level | {"use_regex": True}]
    tokens = letters + [a + b for a, b in merges] + (["Ġqzx"] if kind == "llama" else [])  # reached by no merge
    tokens = specials + tokens if kind == "smol" else tokens + specials
    tokens += plain
    ids = {token: i for i, token in enumerate(tokens)}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "fuse_unk": False,
             "end_of_word_suffix": None, "byte_fallback": False, "ignore_merges": kind == "llama",
             "vocab": {token: i for token, i in ids.items() if token not in specials + plain or kind == "smol"},
             "merges": [list(pair) if kind == "qwen" else " ".join(pair) for pair in merges]}
    spec = {"version": "1.0", "truncation": None, "padding": None, "normalizer": normalizer, "decoder": byte_level,
            "added_tokens": [{"id": ids[token], "content": token, "special": token in specials, **flags}
                             for token in specials + plain],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
            "post_processor": post, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        config | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}), "utf-8")
    return folder


def edited(folder, kind, change):
    """A folder of this kind whose tokenizer.json `change` has edited."""
    spec = json.loads((write_folder(folder, kind) / "tokenizer.json").read_text("utf-8"))
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    return folder


GOLDEN_TEXT = "'s    12345 e\u0301 qzx<think>"
GOLDEN = {  # what the `tokenizers` library gave
    "qwen": [6, 82, 256, 220, 220, 16, 17, 18, 19, 20, 220, 127, 102, 220, 80, 89, 87, 27, 83, 71, 72, 77, 74, 29],
    "r1": [6, 82, 256, 220, 220, 16, 17, 18, 19, 20, 360, 300, 220, 80, 89, 87, 380],
    "llama": [6, 82, 256, 220, 220, 16, 17, 18, 265, 360, 300, 376, 27, 83, 71, 72, 77, 74, 29],
    "smol": [9, 85, 258, 19, 20, 21, 22, 23, 357, 297, 217, 83, 92, 90, 30, 86, 74, 75, 80, 77, 32],
    "gpt2": [6, 82, 256, 220, 329, 360, 300, 220, 80, 89, 87, 27, 83, 71, 72, 77, 74, 29],
    "tiny": [1, 2, 3, 4, 5],
}


@pytest.mark.parametrize("kind", ["qwen", "r1", "llama", "smol", "gpt2", "tiny"])
def test_ids_equal_hugging_face(tmp_path, kind):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, kind))
    assert tokenizer.encode(GOLDEN_TEXT) == GOLDEN[kind]
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    random.seed(0)
    for text in STRINGS + ["".join(random.choices(STRINGS + [" ", "\n", "1"], k=4)) for _ in range(500)]:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    assert tokenizer.n_ids == theirs.get_vocab_size()


@pytest.mark.parametrize("kind", ["qwen", "r1", "llama", "gpt2"])
def test_text_comes_back(tmp_path, kind):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, kind))
    for text in STRINGS + ["".join(map(chr, range(0x3000)))]:
        want = unicodedata.normalize("NFC", text) if kind == "qwen" else text
        assert tokenizer.decode(tokenizer.encode(text)) == want
    euro = tokenizer.encode("€")
    assert len(euro) == 3 and tokenizer.decode_bytes(euro[:1]) == b"\xe2" and tokenizer.decode(euro[:2]) == "\ufffd"
    with pytest.raises(AssertionError):
        tokenizer.decode([tokenizer.n_ids])


def test_special_text_stays_text_and_other_added_tokens_are_matched(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, "r1"))
    text = "a<｜end▁of▁sentence｜><think>b"
    first, think = tokenizer.bos_id, tokenizer.n_ids - 2
    assert [i for i in tokenizer.encode(text) if i >= first] == [think] and tokenizer.decode([think]) == "<think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos(tmp_path):
    def bos(kind):
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path, kind))
        return tokenizer.adds_bos, tokenizer.bos_id and tokenizer.decode([tokenizer.bos_id])
    assert bos("llama") == (True, "<|begin_of_text|>") and bos("r1") == (True, "<｜begin▁of▁sentence｜>")
    assert bos("qwen") == bos("tiny") == (False, None)


def test_merges_decide_not_ids(tmp_path):
    """Ids that run against the order of merges give the same pieces, and what no merge makes never comes out."""
    def reverse(spec):
        vocab = spec["model"]["vocab"]
        spec["model"]["vocab"] = {token: len(vocab) - 1 - i for token, i in vocab.items()} | {"Ġqzx": 999, "xq": 998}
    plain = Tokenizer.from_folder(write_folder(tmp_path, "gpt2"))
    want = [[plain.decode_bytes([i]) for i in plain.encode(text)] for text in STRINGS]
    tokenizer = Tokenizer.from_folder(edited(tmp_path, "gpt2", reverse))
    assert [[tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)] for text in STRINGS] == want
    assert tokenizer.n_ids == 1000


def test_pattern_that_leaves_text_unmatched_loses_none(tmp_path):
    def digits_only(spec):
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d\d|x"
    tokenizer = Tokenizer.from_folder(edited(tmp_path, "llama", digits_only))
    assert [tokenizer.decode(tokenizer.encode(text)) for text in STRINGS] == STRINGS


BROKEN = {
    "Metaspace": lambda spec: spec.update(pre_tokenizer={"type": "Metaspace"}),
    "Split + Digits + ByteLevel": lambda spec: spec["pre_tokenizer"]["pretokenizers"].insert(1, {"type": "Digits"}),
    "Split + ByteLevel": lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    "NFKC": lambda spec: spec.update(normalizer={"type": "NFKC"}),
    "WordPiece": lambda spec: spec["model"].update(type="WordPiece"),
    "stripping": lambda spec: spec["added_tokens"][0].update(lstrip=True),
    "'zzz'": lambda spec: spec["model"]["merges"].append("zz z"),
    "'merges'": lambda spec: spec["model"].pop("merges"),
    "parsing": lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="("),
    "NoneType": lambda spec: spec.update(pre_tokenizer=None),
}


@pytest.mark.parametrize("words", BROKEN)
def test_unknown_tokenizer_is_one_line_that_names_it(tmp_path, words):
    with pytest.raises(UserError) as error:
        Tokenizer.from_folder(edited(tmp_path, "qwen", BROKEN[words]))
    assert str(tmp_path / "tokenizer.json") in str(error.value) and words.lower() in str(error.value).lower()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="tokenizer.json: No such file"):
        Tokenizer.from_folder(tmp_path / "missing")
