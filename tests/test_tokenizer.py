"""The tokenizer: ids and chats equal Hugging Face's, no message becomes a special token."""
import collections
import json
import random
import re
import time
import unicodedata

import pytest

from conftest import CONFIG, EOS, tiny_model
from model import Tokenizer, UserError, load_model, to_bytes, write_json, write_safetensors

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = (
    "The price of the 3 tickets is $12.50, don't they'll say; we've 1234567 reasons. Then the user "
    "said: café, naïve, 東京 日本, Привет привет! def f(x): return x ** 2 e\u0301\u0301 ÅÅ 456 12345")
STRINGS = [
    "", "the", " the end ", "don't DON'T we'LL 's", "12345 x1 2", "$1,000.50", "  two   s\n\n\tx  ",
    "\r\n \r\n", "café cafe\u0301 A\u030a \u212b", "東京と日本、한국어", "Привет", "🙂👩‍👩‍👧 🇫🇷", "٣٤ ½ Ⅷ ²",
    "a\u00a0b\u3000c\u2028d\x85", "ſ'ſ 'S", "def f(x):\n    return x", "<think>2</think> <thin",
    "\0\x7f\ufdd0\U0010ffff", "...  ...", " qzx qzxq"]
LETTERS = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 324))]
LETTER_OF = {to_bytes(letter)[0]: letter for letter in LETTERS}
KINDS = {       # name: (special tokens, other added tokens, tokenizer_config.json)
    "qwen": (["<|im_start|>", "<|im_end|>"], ["<tool_call>"],
             {"bos_token": None, "add_bos_token": False, "eos_token": "<|im_end|>"}),
    "r1": (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
           ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],     # not special there
           {"bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"},
            "add_bos_token": True}),
    "llama": (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], [],
              {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "smol": (["<|im_start|>", "<|im_end|>"], [], {"eos_token": "<|im_end|>"}),
    "tiny": (["<|end|>"], ["Answer:"], {}),
}

GOLDEN = {      # what the `tokenizers` library makes of "'s  12345 e\u0301 qzx<think>"
    "qwen": [296, 220, 303, 303, 286, 285, 284, 283, 282, 303, 140, 166, 303, 222, 213, 215, 275,
             219, 231, 230, 225, 228, 273],
    "r1": [39, 115, 32, 32, 49, 50, 51, 52, 53, 328, 276, 32, 113, 122, 120, 340],
    "llama": [39, 115, 32, 32, 261, 51, 260, 328, 276, 336, 60, 116, 104, 105, 110, 107, 62],
    "smol": [38, 114, 31, 31, 48, 49, 50, 51, 52, 325, 273, 31, 112, 121, 119, 59, 115, 103, 104,
             109, 106, 61],
    "tiny": [1, 2, 3, 4, 5],
}

def trained_merges(count=80):
    """The merges of a byte-level BPE trained on TEXT."""
    words = re.findall(r" ?\w+|[^\w\n]+|\n+", TEXT * 2)
    words = [[LETTER_OF[byte] for byte in word.encode()] for word in words]
    merges = []
    for _ in range(count):
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            for i in range(len(word) - 1):              # left to right, as BPE does
                if tuple(word[i:i + 2]) == best:
                    word[i:i + 2] = ["".join(best)]
    return merges

def write_folder(folder, kind, template=None, change=lambda spec: None):
    """A folder like `kind`'s; change(spec) edits tokenizer.json."""
    special, plain, config = KINDS[kind]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {
        "Regex": SPLIT.replace("DIGITS", r"\p{N}{1,3}" if kind == "llama" else r"\p{N}")}}
    steps = [split, byte_level | {"use_regex": False}]
    letters = [LETTER_OF[byte] for byte in range(256)]
    merges = trained_merges()
    post_processor = None
    if kind == "smol":                              # lacks bytes; its special tokens come first
        letters = [LETTER_OF[byte] for byte in range(256) if byte not in b"\4\6\x1d\xc0\xf2"]
        steps = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    if kind == "tiny":                              # nothing but letters
        letters = list("0123456789,=;A")
        merges = []
        steps = [byte_level | {"use_regex": True}]
    tokens = letters + [a + b for a, b in merges]
    if kind == "llama":
        bos = special[0]
        post_processor = {"type": "TemplateProcessing", "pair": [], "single": [
            {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}}}
        tokens.append("Ġqzx")                       # no merge makes it
    if kind == "qwen":
        tokens.reverse()                            # ids need not follow the merges
    tokens = special + tokens + plain if kind == "smol" else tokens + special + plain
    ids = {token: i for i, token in enumerate(tokens)}
    added = [{"id": ids[token], "content": token, "special": token in special, "lstrip": False,
              "rstrip": False, "single_word": False, "normalized": False}
             for token in special + plain]
    if kind != "smol":
        ids = {token: i for token, i in ids.items() if token not in special + plain}
    model = {"type": "BPE", "vocab": ids, "ignore_merges": kind == "llama",
             "merges": [list(pair) if kind == "r1" else " ".join(pair) for pair in merges]}
    normalizers = {"qwen": {"type": "NFC"}, "r1": {"type": "Sequence", "normalizers": []}}
    if len(steps) > 1:
        steps = [{"type": "Sequence", "pretokenizers": steps}]
    spec = {"version": "1.0", "added_tokens": added, "normalizer": normalizers.get(kind),
            "pre_tokenizer": steps[0], "post_processor": post_processor,
            "decoder": byte_level | {"use_regex": True}, "model": model}
    change(spec)
    config = config | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder

@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_hugging_face(tmp_path, kind):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, kind))
    assert tokenizer.encode("'s  12345 e\u0301 qzx<think>") == GOLDEN[kind]
    if kind == "smol":                              # what it lacks is gone before bytes are joined
        parts = [b" **", b"h", b"e"]
        assert tokenizer.encode(" *\4*h\4e") == [tokenizer.id_of[part] for part in parts]
    library = pytest.importorskip("tokenizers")
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    random.seed(0)
    mixed = ["".join(random.choices(STRINGS + [" ", "\n", "1"], k=4)) for _ in range(300)]
    mixed += [" *\4*", "<\4> \x1d$", "a\4b \4\6c", "x\4's", " *\6_"]     # "smol" lacks these
    for text in STRINGS + mixed:
        want = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == want, repr(text)
    assert tokenizer.n_ids == theirs.get_vocab_size()

@pytest.mark.parametrize("kind", ["qwen", "r1", "llama"])
def test_text_comes_back(tmp_path, kind):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, kind))
    for text in STRINGS + ["".join(map(chr, range(0x3000)))]:
        want = unicodedata.normalize("NFC", text) if kind == "qwen" else text
        assert tokenizer.decode(tokenizer.encode(text)) == want
    euro = tokenizer.encode("€")
    assert tokenizer.decode_bytes(euro[:1]) == b"\xe2" and tokenizer.decode(euro[:2]) == "\ufffd"
    assert tokenizer.decode([tokenizer.n_ids, *euro, tokenizer.n_ids + 256, 10**6]) == "€"

def test_bos_and_prompt(tmp_path):
    for kind, adds_bos in (("qwen", False), ("tiny", False), ("r1", True), ("llama", True)):
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path, kind))
        assert tokenizer.adds_bos == adds_bos
        bos = [tokenizer.added[KINDS[kind][0][0]]] if adds_bos else []
        assert tokenizer.prompt("12") == bos + tokenizer.encode("12")
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, "llama", "{{ messages[0].content }}!"))
    assert tokenizer.decode(tokenizer.prompt("12")) == "12!"
    assert tokenizer.decode(tokenizer.prompt("12", raw=True)) == "<|begin_of_text|>12"
    ids = tokenizer.encode("a<|begin_of_text|>b")               # special tokens in it stay text
    assert tokenizer.bos_id not in ids and tokenizer.decode(ids) == "a<|begin_of_text|>b"

BROKEN = {
    "space'} is not implemented": lambda spec: spec.update(pre_tokenizer={"type": "Metaspace"}),
    "Digits": lambda spec: spec["pre_tokenizer"]["pretokenizers"].insert(1, {"type": "Digits"}),
    "'NFKC'} is not implemented": lambda spec: spec.update(normalizer={"type": "NFKC"}),
    "damaged .*'vocab'.* download": lambda spec: spec["model"].pop("vocab"),
    "Parsing": lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="("),
    "pre_tokenizer None is not implemented": lambda spec: spec.update(pre_tokenizer=None),
}

@pytest.mark.parametrize("word", BROKEN)
def test_unknown_tokenizer_is_one_line_that_names_it(tmp_path, word):
    with pytest.raises(UserError, match=word) as error:
        Tokenizer.from_folder(write_folder(tmp_path, "qwen", change=BROKEN[word]))
    assert str(tmp_path / "tokenizer.json") in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="tokenizer.json: No such file.*check the path"):
        Tokenizer.from_folder(tmp_path / "missing")

def test_load_model_fits_model_and_tokenizer(tmp_path):
    n_ids = Tokenizer.from_folder(write_folder(tmp_path, "qwen")).n_ids
    write_json(tmp_path / "config.json", CONFIG | {"vocab_size": n_ids})
    write_safetensors(tmp_path / "model.safetensors", tiny_model(vocab_size=n_ids).tensors())
    model, tokenizer = load_model(tmp_path, "cpu")
    assert model.config.eos_ids == [*EOS, tokenizer.added["<|im_end|>"]]
    new = {"id": n_ids, "content": "<new>", "special": True}
    write_folder(tmp_path, "qwen", change=lambda spec: spec["added_tokens"].append(new))
    with pytest.raises(UserError, match="no row for the token '<new>'"):
        load_model(tmp_path, "cpu")

CHATML = (
    "{% for m in messages %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
R1 = (
    "{{bos_token}}{%- for m in messages %}{%- if m['role'] == 'user' %}"
    "{{'<｜User｜>' + m['content']}}{%- endif %}"
    "{%- if m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}")
CHATS = {       # kind: (template, what it makes of CONVERSATION)
    "qwen": (CHATML, "".join((
        "<|im_start|>user\n The price? <|im_end|>\n<|im_start|>assistant\n<think>x</think> 12",
        "<|im_end|>\n<|im_start|>user\nthe end<|im_end|>\n<|im_start|>assistant\n"))),
    "r1": (R1, "".join((
        "<｜begin▁of▁sentence｜><｜User｜> The price? <｜Assistant｜> 12<｜end▁of▁sentence｜>",
        "<｜User｜>the end<｜Assistant｜>"))),
}
CONVERSATION = [
    {"role": "user", "content": " The price? "},
    {"role": "assistant", "content": "<think>x</think> 12"}, {"role": "user", "content": "the end"}]

@pytest.mark.parametrize("kind", CHATS)
def test_chat(tmp_path, kind):
    template, text = CHATS[kind]
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, kind, template))
    ids = tokenizer.chat(CONVERSATION)
    assert tokenizer.decode(ids) == text
    names = [token for token in re.split("(<[^<>]*>)", text) if token in tokenizer.added]
    assert [i for i in ids if i in tokenizer.added.values()] == [tokenizer.added[t] for t in names]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ids == theirs.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, return_dict=False)

@pytest.mark.parametrize("kind", CHATS)
def test_a_message_never_makes_a_token_of_the_template(tmp_path, kind):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, kind, CHATS[kind][0]))

    def added_ids(content):
        return [i for i in tokenizer.prompt(content) if i in tokenizer.added.values()]
    text = "".join(tokenizer.special) + "<|im_<|im_end|>end|><\ufdd0|im_end|><｜User｜><｜User｜>"
    assert added_ids(text) == added_ids("x") == added_ids("x\ufdd0")
    assert text.replace("\ufdd0", "") in tokenizer.decode(tokenizer.prompt(text))

def test_templates_that_fail(tmp_path):
    for template, words in (
            ("{{ raise_exception('roles') }}", "roles"), ("{% if %}", "template fails"),
            ("{{ ''.__class__.__mro__ }}", "unsafe")):
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path, "smol", template))
        with pytest.raises(UserError, match=words):
            tokenizer.chat(CONVERSATION)

def test_what_a_template_may_use(tmp_path):
    template = (
        "{% for m in messages %}\n  {%- generation -%} {{ m.role }}: {{ m.content }}\n"
        "{% endgeneration %}\n{% endfor %}{{ documents is none }} {{ tools is none }}"
        " {{ strftime_now('%Y') }} {{ enable_thinking }}")
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, "qwen", template))
    year = time.strftime("%Y")
    assert tokenizer.decode(tokenizer.prompt("12")) == f"user: 12\nTrue True {year} "
    tokenizer.system = "Add."
    tokenizer.template_args["enable_thinking"] = False
    tokenizer.date = time.strptime("1999", "%Y")
    text = tokenizer.decode(tokenizer.prompt("12"))
    assert text == "system: Add.\nuser: 12\nTrue True 1999 False"
    theirs = pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "12"}]
    ids = theirs.apply_chat_template(chat, return_dict=False, enable_thinking=False)
    assert tokenizer.encode(text.replace("1999", year)) == ids
