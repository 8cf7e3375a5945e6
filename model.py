"""model.py: the transformer, written out, and the folders that models come in.

One class runs Qwen2 / Qwen2.5, Qwen3, Llama 3.x, SmolLM2 and the DeepSeek-R1 distillates of both; what differs between
them is read from config.json. One block, for hidden states x (B, T, C):

    h = x + Wo Attention(rope(Wq n), rope(Wk n), Wv n),   n = RMSNorm(x)
    y = h + W2 (silu(W1 m) * W3 m),                       m = RMSNorm(h)

Matrices that share their input are stacked: `wqkv`, `w13`. The model knows nothing of windows or adapters: it takes a
`cache` (cache.py), which says where tokens stand and what they see, and thought states `S` (encoder.py) for its linear
layers. Below: weights (safetensors), text (tokenizer.json). Left out: dropout, experts, other scalings and tokenizers.

Try it:  python rollout.py --model DIR --prompt "What is the capital of France?" --temperature 0
"""
import contextlib
import functools
import json
import math
import mmap
import re
import unicodedata
from datetime import datetime
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn


class UserError(Exception):
    """Something the person at the keyboard can mend; its one-line text is all they see (exit code 2)."""
    def __init__(self, text):  # which may quote a file, and that may hold anything, of any length
        super().__init__(" ".join((text if len(text) < 1000 else f"{text[:500]} ... {text[-400:]}").splitlines()))


# ---- the transformer -------------------------------------------------------------------------------------------------
class ModelConfig:
    """What config.json (a dict) says, under the names used here. Raises ValueError, KeyError or TypeError for a model
    that this file does not implement, or for numbers that make no model."""
    def __init__(self, raw, generation={}):
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # the name in transformers 5, and in 4
        kind, rope_type = raw.get("model_type"), rope.get("rope_type", rope.get("type", "default"))
        for what, value, known in (
                ("model_type", kind, ("llama", "qwen2", "qwen3")), ("rope type", rope_type, ("default", "llama3")),
                ("hidden_act", raw.get("hidden_act", "silu"), ("silu",)),
                *((name, raw.get(name, False), (False,)) for name in ("mlp_bias", "use_sliding_window"))):
            if value not in known:
                raise ValueError(f"{what} {value!r} is not implemented here, only {known}")
        self.vocab_size, self.dim, self.n_layers = raw["vocab_size"], raw["hidden_size"], raw["num_hidden_layers"]
        self.n_heads = raw["num_attention_heads"]                               # H
        self.n_kv_heads = raw.get("num_key_value_heads") or self.n_heads        # KV
        self.head_dim = raw.get("head_dim") or self.dim // self.n_heads         # D
        self.ffn_dim, self.max_positions = raw["intermediate_size"], raw["max_position_embeddings"]
        sizes = [n for n in vars(self).values() if type(n) is int and 0 < n < 1 << 30]
        if len(sizes) < 8 or self.n_layers > 1000 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"its sizes {vars(self)} do not fit together")
        self.rms_eps = float(raw.get("rms_norm_eps", 1e-6))
        self.rope_theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
        self.rope_scaling = rope if rope_type == "llama3" else None
        self.tied = bool(raw.get("tie_word_embeddings", False))                 # the output layer is the embedding
        self.qkv_bias = kind == "qwen2" or bool(raw.get("attention_bias", False))
        self.out_bias = kind != "qwen2" and bool(raw.get("attention_bias", False))
        self.qk_norm = kind == "qwen3"
        eos = [raw.get("eos_token_id"), generation.get("eos_token_id")]         # each an id, a list of them, or None
        self.eos_ids = sorted({i for ids in eos for i in (ids if isinstance(ids, list) else [ids]) if i is not None})


def rope_frequencies(config):
    """Angle per position of each pair of channels, (D/2,) float32. Llama 3.1 slows the pairs that turn fewer than
    low_freq_factor times within the original context by `factor`, and blends up to those of high_freq_factor turns."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")  # real numbers, also under "meta"
    freq = config.rope_theta ** -(steps / config.head_dim)
    if s := config.rope_scaling:
        turns, low = s["original_max_position_embeddings"] * freq / (2 * math.pi), s["low_freq_factor"]
        keep = ((turns - low) / (s["high_freq_factor"] - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    return freq


def rotate(x, rope):
    """RoPE: turns the pairs (x_i, x_{i+D/2}) of x (B, T, heads, D) by the angles whose (cos, cos) and (-sin, sin), each
    (B or 1, T, 1, D), are given. In float32 (or wider) whatever x is: bfloat16 would blur far angles."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.addcmul(wide * rope[0], wide.roll(x.shape[-1] // 2, dims=-1), rope[1]).to(x.dtype)


class Linear(nn.Linear):
    """y = W x + b: one matrix, or several stacked, of `parts` rows each. S is for AdaptedLinear, put in its place."""
    def __init__(self, dim, *parts, bias=False):
        super().__init__(dim, sum(parts), bias)
        self.parts, self.few_rows = parts, None                                 # few_rows: cache.pack sets it

    def reset_parameters(self):  # "meta" has no numbers to draw; PyTorch would import 77 MB of code to find that out
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x, S=None):
        few = self.few_rows and x.numel() <= 64 * self.in_features and not torch.is_grad_enabled()
        return self.few_rows(x) if few else F.linear(x, self.weight, self.bias)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        q_dim, kv_dim, self.head_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.head_dim
        self.attention_norm, self.ffn_norm = nn.RMSNorm(c.dim, eps=c.rms_eps), nn.RMSNorm(c.dim, eps=c.rms_eps)
        self.wqkv = Linear(c.dim, q_dim, kv_dim, kv_dim, bias=c.qkv_bias)
        self.wo = Linear(q_dim, c.dim, bias=c.out_bias)
        norm = nn.RMSNorm if c.qk_norm else nn.Identity                         # Identity takes any arguments
        self.q_norm, self.k_norm = norm(c.head_dim, eps=c.rms_eps), norm(c.head_dim, eps=c.rms_eps)
        self.w13, self.w2 = Linear(c.dim, c.ffn_dim, c.ffn_dim), Linear(c.ffn_dim, c.dim)
        self.heads = c.n_heads, c.n_kv_heads, c.n_kv_heads

    def forward(self, x, rope, mask, cache, layer, S):
        """x (B, T, C) -> (B, T, C). mask (B or 1, 1, G*T, slots) goes with a cache; without, attention is causal."""
        x = x + self.attention(self.attention_norm(x), rope, mask, cache, layer, S)
        gate, up = self.w13(self.ffn_norm(x), S).chunk(2, dim=-1)
        return x + self.w2(F.silu(gate) * up, S)

    def attention(self, n, rope, mask, cache, layer, S):
        B, T, _ = n.shape
        q, k, v = self.wqkv(n, S).view(B, T, -1, self.head_dim).split(self.heads, dim=2)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))                        # (B, H, T, D), twice (B, KV, T, D)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # the G heads that share keys are further rows of one product: no key is copied for its heads
            k, v = cache.write(layer, k, v)                                     # (B, KV, slots, D)
            q = q.reshape(B, k.shape[1], -1, self.head_dim)                     # (B, H, T, D) -> (B, KV, G*T, D)
            written_out = B == 1 and q.dtype == torch.float32 and torch.compiler.is_compiling()  # then it is faster
            y = ((q @ k.mT * self.head_dim ** -0.5 + mask).softmax(dim=-1) @ v if written_out else
                 F.scaled_dot_product_attention(q, k, v, attn_mask=mask)).reshape(B, -1, T, self.head_dim)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1), S)                  # (B, H, T, D) -> (B, T, C)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.rms_eps)
        self.head = Linear(config.dim, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight if config.tied else self.head.weight
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)  # (D/2,)

    def hidden(self, ids, cache=None, S=None):
        """ids (B, T) -> the last hidden states, normed, (B, T, C). Tokens stand at 0..T-1 and see what is before them;
        a cache takes them and says where they stand, what they see. S: thought states (L, B or 1, M, R), or None."""
        T = ids.shape[1]
        positions, mask = (torch.arange(T, device=ids.device)[None], None) if cache is None else cache.begin(T)
        return self.layers(ids, positions, mask, cache, S)

    def layers(self, ids, positions, mask, cache, S):
        """`hidden` of ids (B, T) at positions (B or 1, T), given what they see, mask (..., T, slots), True where a
        query may look, or None for all. Nothing here depends on numbers that only the device knows."""
        angles = positions[:, :, None, None] * self.frequencies                 # (B or 1, T, 1, D/2)
        cos, sin = angles.cos(), angles.sin()                                   # once a token, for all layers
        rope = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)    # (B or 1, T, 1, D)
        x = self.embedding(ids)                                                 # (B, T, C)
        if mask is not None:                                                    # 0 or -inf, to be added to the scores
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
            mask = torch.cat([mask] * (self.config.n_heads // self.config.n_kv_heads), dim=-2)  # (..., G*T, slots)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer, None if S is None else S[layer])
        return self.norm(x)

    def forward(self, ids, cache=None, S=None):
        """ids (B, T) -> logits (B, T, vocab)."""
        return self.head(self.hidden(ids, cache, S))

    @classmethod
    def from_folder(cls, path, dtype=torch.bfloat16, device="cpu"):
        """Reads a folder; all weights are frozen. UserError for what is missing, damaged or of the wrong shape."""
        files = Path(path, "config.json"), Path(path, "generation_config.json")
        with reading(files[0]), torch.device("meta"):                           # shapes without numbers
            model = cls(ModelConfig(*(read_json(file) for file in files if file == files[0] or file.exists())))
        wanted, found = {name: tensor.shape for name, tensor in model.tensors().items()}, read_folder(path)
        found.pop("lm_head.weight" if model.config.tied else None, None)        # some folders hold a second copy
        for name in sorted(wanted.keys() | found.keys()):
            there = tuple(found[name].shape) if name in found else "missing"
            if there != (promised := tuple(wanted[name]) if name in wanted else "unexpected"):
                raise UserError(f"{path}: tensor {name} is {there}, in config.json {promised}; download both again")
        weights = {name: torch.empty(p.shape, dtype=dtype, device=device) for name, p in model.named_parameters()}
        model.load_state_dict(weights, strict=False, assign=True)               # not strict: a tied head has no file
        model.head.weight = model.embedding.weight if model.config.tied else model.head.weight
        model.requires_grad_(False).frequencies = model.frequencies.to(device)
        for name, tensor in model.tensors().items():
            tensor.copy_(found.pop(name))                                       # a shard is let go with its last tensor
        return model

    def tensors(self):
        """The weights under their names in a Hugging Face folder: {"model.layers.3.self_attn.k_proj.weight": tensor},
        views of the parameters, of wqkv and w13 one for each of their parts."""
        found = {}
        for name, parameter in self.named_parameters():
            *path, kind = name.split(".")
            names = HUGGING_FACE_NAMES.get(path[-1], path[-1]).split()
            sizes = self.get_submodule(".".join(path)).parts if len(names) > 1 else [len(parameter)]
            start = ".".join(["model.layers", *path[1:-1], ""] if path[0] == "blocks" else [])
            found |= {f"{start}{n}.{kind}": part for n, part in zip(names, parameter.detach().split(sizes))}
        return found


HUGGING_FACE_NAMES = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "wo": "self_attn.o_proj", "w2": "mlp.down_proj",
    "wqkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "w13": "mlp.gate_proj mlp.up_proj"}


# ---- a Hugging Face folder's files: JSON, and the safetensors format written out -------------------------------------
# safetensors: 8 bytes hold the header's length, then the header (JSON: name -> dtype, shape, data_offsets), then the
# tensors' bytes back to back. It comes from the network: nothing in the header is believed unchecked.
FILE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextlib.contextmanager
def reading(what, cure="check the path, download it again, or use another model"):
    """Whatever a missing, cut short or hostile file leads to becomes a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = getattr(error, "strerror", error if isinstance(error, ValueError) else f"unexpected {error!r:.99}")
        raise UserError(f"{what}: {why}; {cure}") from None


def read_json(path):
    """The JSON object in a file, as a dict. Raises UserError if the file is missing or holds anything else."""
    with reading(path):
        if not isinstance(value := json.loads(Path(path).read_bytes()), dict):
            raise ValueError("not a JSON object")
        return value


def read_safetensors(path):
    """{name: tensor} of one .safetensors file, views of the mapped file: pages come into memory when touched, and
    writing never reaches the file. Raises UserError if it is missing, cut short or malformed."""
    with reading(path):
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(data[:8], "little")  # where the tensors' bytes begin
        if start > min(len(data), 100_000_000) or data[8:9] != b"{":
            raise ValueError("cut short, or no safetensors file at all (a git-lfs pointer?)")
        header = json.loads(data[8:start].decode(), object_pairs_hook=list)  # a dict would hide repeated names
        header = [(name, dict(entry)) for name, entry in header if name != "__metadata__"]
        header.sort(key=lambda item: item[1]["data_offsets"])
        promised = start + (header[-1][1]["data_offsets"][-1] if header else 0)
        if len(data) != promised:
            raise ValueError(f"cut short or overlong: it has {len(data)} bytes, its header promises {promised}")
        tensors, end = {}, 0
        for name, entry in header:
            with reading(f"{path}: tensor {name!r:.99}"):
                kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
                if kind not in FILE_DTYPES:
                    raise ValueError(f"dtype {kind!r:.20} is not one of {', '.join(FILE_DTYPES)}")
                if not all(type(i) is int and i >= 0 for i in [*shape, first, last]) or len(shape) > 64:
                    raise ValueError("a malformed shape or data_offsets")
                dtype, n, at = FILE_DTYPES[kind], math.prod(shape), start + first  # Python's ints: no overflow
                if first != end or last - first != n * dtype.itemsize or name in tensors:
                    raise ValueError("its data_offsets do not fit its shape or its neighbours, or it is there twice")
                flat = torch.frombuffer(data, count=n, offset=at, dtype=dtype) if n else torch.empty(0, dtype=dtype)
                tensors[name], end = (flat.clone() if at % dtype.itemsize else flat).reshape(shape), last  # aligned
        return tensors


def read_folder(folder):
    """{name: tensor} of a model folder, one file or sharded. Raises UserError if any part is missing or broken."""
    single, index, shards = Path(folder, "model.safetensors"), Path(folder, "model.safetensors.index.json"), {}
    if single.exists():
        return read_safetensors(single)
    with reading(folder):
        if not index.exists():
            raise ValueError(f"neither {single.name} nor {index.name} is there (pytorch_model.bin is not read)"
                             if Path(folder).is_dir() else "no such folder")
        for name, place in (places := read_json(index)["weight_map"]).items():
            if not re.fullmatch(r"[\w.-]+\.safetensors", place):  # or it might lead out of the folder
                raise ValueError(f"{index.name} places tensor {name!r:.99} in {place!r:.99}")
            if place not in shards:
                shards[place] = read_safetensors(Path(folder, place))
        return {name: shards[place][name] for name, place in places.items() if name in shards[place]}


# ---- the tokenizer: tokenizer.json through tiktoken ------------------------------------------------------------------
GUARD = "\ufdd0"  # never a character: `chat` puts it before text of a message that must not become a token


def _pattern(pre_tokenizer):
    """The one regular expression that cuts text as tokenizer.json's pre_tokenizer does; ValueError if none is known."""
    *steps, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        match steps, last.get("use_regex", True):
            case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}], False:
                return rf"{regex}|(?:(?!{regex})[\s\S])+"  # what nothing matches is a piece too; tiktoken drops it
            case [], True:  # GPT-2's
                return r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
            case [{"type": "Digits", "individual_digits": True}], True:  # the same once every digit is cut off
                return r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
    raise ValueError(f"pre_tokenizer {' + '.join(step['type'] for step in [*steps, last])} is not known here")


def _any_of(strings):  # as a regular expression; of none, one that never matches
    return "|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or "(?!)"


class Tokenizer:
    """The ids of Hugging Face's tokenizer of a folder (byte-level BPE). n_ids is 1 + the largest id, bos_id the BOS's
    or None; adds_bos says whether Hugging Face puts that before plain text by itself, which `encode` never does."""

    @classmethod
    def from_folder(cls, folder):
        """Reads tokenizer.json and, if there, tokenizer_config.json and chat_template.jinja. Raises UserError."""
        with reading(Path(folder, "tokenizer.json")):
            return cls(Path(folder))

    def __init__(self, folder):
        spec, config, jinja = (folder / n for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
        spec, config = read_json(spec), read_json(config) if config.exists() else {}
        model, vocab, added = spec["model"], spec["model"]["vocab"], spec.get("added_tokens") or []
        normalizer, kind = spec.get("normalizer") or {"normalizers": []}, model.get("type", "BPE")
        self._forms = {step["type"] for step in normalizer.get("normalizers", [normalizer])}
        strips = any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word"))
        if kind != "BPE" or model.get("byte_fallback") or not self._forms <= {"NFC"} or strips:
            raise ValueError(f"{kind} model, normalizers {self._forms} or stripping added tokens: not known here")
        self._added = {token["content"]: token["id"] for token in added}
        self._special = {token["content"] for token in added if token["special"]}
        # tokenizer.json spells each byte as a printable letter (GPT-2's table): its own, or one from chr(256) on
        own = [*range(33, 127), *range(161, 173), *range(174, 256)]
        byte_of = {chr(b): b for b in own} | {chr(256 + k): b for k, b in enumerate(sorted({*range(256)} - {*own}))}
        spelled = {token: bytes(byte_of[c] for c in token) for token in vocab if token not in self._added}
        # tiktoken joins the neighbours whose joined bytes rank lowest, Hugging Face the pair first in merges: the same
        # if tokens rank in the order merges first make them. Bytes are not made, so their ranks are free, but tiktoken
        # panics without one (SmolLM2 lacks 21). What has a rank is one token: `ignore_merges` ranks what none makes.
        ranks = {bytes([b]): b for b in range(256)}
        self._id_of_rank = [vocab.get(letter) for letter in sorted(byte_of, key=byte_of.get)]
        made = ["".join(merge).replace(" ", "") for merge in model["merges"]]  # "a b" in old files, ["a", "b"] in new
        for token in made + [*spelled] if model.get("ignore_merges") else made:
            if spelled[token] not in ranks:
                ranks[spelled[token]] = len(ranks)
                self._id_of_rank.append(vocab[token])
        cut = _pattern(spec["pre_tokenizer"])
        self._bpe = tiktoken.Encoding("bpe", pat_str=cut, mergeable_ranks=ranks, special_tokens={})
        self._bytes = {vocab[t]: raw for t, raw in spelled.items()} | {i: t.encode() for t, i in self._added.items()}
        if not all(type(i) is int and 0 <= i < 1 << 30 for i in self._bytes):
            raise ValueError("an id that is no number from 0 on")
        self.n_ids = 1 + max(self._bytes)
        self.folder, template = folder, jinja.read_text("utf-8") if jinja.exists() else config.get("chat_template")
        templates = template if isinstance(template, list) else [{"name": "default", "template": template}]
        self.template = {entry["name"]: entry["template"] for entry in templates}.get("default")
        self._named = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items()
                       if key.endswith("_token") and isinstance(value, (dict, str))}  # bos_token and its like
        post = spec.get("post_processor") or {}
        heads = [step["single"][0].get("SpecialToken") for step in post.get("processors", [post]) if "single" in step]
        self.bos_id = self._added.get(heads[0]["id"] if any(heads) else self._named.get("bos_token"))
        self.adds_bos = self.bos_id is not None and config.get("add_bos_token", any(heads))

    def encode(self, text):
        """Ids of plain text, without a BOS. The text of special tokens stays text; other added tokens are matched."""
        return self._ids(re.split(f"({_any_of(self._added.keys() - self._special)})", text))

    def _ids(self, pieces):  # every second piece is an added token
        ids = []
        for k, piece in enumerate(pieces):
            ranks = self._bpe.encode_ordinary(unicodedata.normalize("NFC", piece) if self._forms else piece)
            ids += [self._added[piece]] if k % 2 else [self._id_of_rank[rank] for rank in ranks]
        return [i for i in ids if i is not None]

    def decode_bytes(self, ids):
        """The UTF-8 bytes of ids, special tokens as their text. One character may be spread over several ids."""
        assert all(0 <= i < self.n_ids for i in ids), "an id that the tokenizer does not have"
        return b"".join(self._bytes.get(int(i), b"") for i in ids)

    def decode(self, ids):
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def chat(self, messages):
        """Ids of a conversation in the folder's own format, up to where the answer begins: apply_chat_template's, but
        a message's text never becomes a special token or one that the template names. UserError if it has none."""
        if not isinstance(self.template, str):
            raise UserError(f"{self.folder} has no chat template; use --raw")
        control = re.compile(f"(?={_any_of(t for t in self._added if t in self._special or t in self.template)})")
        marked = [{k: control.sub(GUARD, v.replace(GUARD, "")) for k, v in message.items()} for message in messages]
        try:
            text = self._jinja.render(**self._named, messages=marked, tools=None, add_generation_prompt=True)
        except Exception as error:  # a template is somebody else's program: it may fail in any way
            raise UserError(f"{self.folder}: its chat template fails: {' '.join(str(error).split()):.200}") from None
        return self._ids(p.replace(GUARD, "") for p in re.split(f"(?<!{GUARD})({_any_of(self._added)})", text))

    @functools.cached_property
    def _jinja(self):  # the compiled template, with what transformers gives to one
        from jinja2 import sandbox  # torch depends on jinja2
        def refuse(message):
            raise ValueError(message)
        loops = ["jinja2.ext.loopcontrols"]
        env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
        env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        return env.from_string(self.template)
