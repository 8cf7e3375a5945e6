"""model.py: the transformer, written out, and the folders on disk that models come in.

One class runs Qwen2 / 2.5, Qwen3, Llama 3.x, SmolLM2 and the DeepSeek-R1 distillates of both. One
block, for hidden states x (B, T, C):

    h = x + Wo Attention(rope(Wq n), rope(Wk n), Wv n)            n = RMSNorm(x)
    y = h + W_down (silu(W_gate m) * W_up m)                      m = RMSNorm(h)

A `cache` (cache.py) says where tokens stand and what they see; `S`, states of the thought encoder
(encoder.py), change the linear layers. Left out: dropout, mixtures of experts, sliding windows
inside a layer, rope scalings but Llama 3's, tokenizers but byte-level BPE.

Try it:  python rollout.py --model DIR --prompt "What is the capital of France?" --temperature 0
"""
import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import time
import unicodedata
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

IMPLEMENTED = {     # what these fields of config.json may hold; None: not there
    "model_type": ("llama", "qwen2", "qwen3"), "rope_type": ("default", "llama3"),
    "hidden_act": ("silu", None), "mlp_bias": (False, None), "use_sliding_window": (False, None),
    "quantization_config": (None,)}

class ModelConfig:
    """The numbers of config.json under the names used here. UserError for other models."""
    def __init__(self, raw, generation={}):
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        raw = raw | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
        for name, values in IMPLEMENTED.items():
            if raw.get(name) not in values:
                raise UserError(f"{name} {raw.get(name)!r:.100} is not implemented, only {values}")
        kind = raw["model_type"]
        self.vocab_size = raw["vocab_size"]
        self.dim = raw["hidden_size"]                                       # C
        self.n_layers = raw["num_hidden_layers"]                            # L
        self.n_heads = raw["num_attention_heads"]                           # H
        self.n_kv_heads = raw.get("num_key_value_heads") or self.n_heads    # KV
        self.head_dim = raw.get("head_dim") or self.dim // self.n_heads     # D
        self.ffn_dim = raw["intermediate_size"]
        self.max_positions = raw["max_position_embeddings"]
        if max(vars(self).values()) > 2**26 or self.n_layers > 1000:
            raise ValueError(f"sizes {vars(self)}")
        self.rms_eps = raw.get("rms_norm_eps", 1e-6)
        self.rope_theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
        self.rope_scaling = rope if raw["rope_type"] == "llama3" else None
        self.tied = raw.get("tie_word_embeddings", False)                   # head = embedding
        self.out_bias = raw.get("attention_bias", False) and kind != "qwen2"
        self.qkv_bias = self.out_bias or kind == "qwen2"
        self.qk_norm = kind == "qwen3"
        eos = generation.get("eos_token_id", raw.get("eos_token_id"))       # an id, a list or None
        eos_ids = eos if isinstance(eos, list) else [eos]
        self.eos_ids = [i for i in eos_ids if i is not None]

def rope_frequencies(config):
    """Angle per position of each pair of channels, (D/2,) float32. Llama 3.1 stretches its context:
    pairs that turn rarely within the original one are slowed down by `factor`."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")      # (D/2,)
    frequencies = config.rope_theta ** -(pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling:
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
        low = scaling["low_freq_factor"]
        kept = ((turns - low) / (scaling["high_freq_factor"] - low)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling["factor"]
    return frequencies

def apply_rope(x, cos, sin):
    """Rotates the pairs (x_i, x_{i+D/2}) of x (B, T, heads, D) by the angle of their position.
    cos, sin: (B or 1, T, 1, D/2). In at least float32: bfloat16 would blur large angles."""
    x1, x2 = x.to(cos.dtype).chunk(2, dim=-1)                               # (B, T, heads, D/2)
    rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)  # (B, T, heads, D)
    return rotated.to(x.dtype)

class Linear(nn.Linear):
    """W x. An adapter puts an AdaptedLinear in its place, which S changes (encoder.py)."""
    def forward(self, x, S=None):
        return super().forward(x)

class Attention(nn.Module):
    """Grouped-query attention: H query heads share KV heads of keys and values."""
    def __init__(self, config):
        super().__init__()
        q_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.wq = Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.wk = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.wv = Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.wo = Linear(q_dim, config.dim, bias=config.out_bias)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity                # Qwen3 norms its heads
        self.q_norm = norm(config.head_dim, eps=config.rms_eps)
        self.k_norm = norm(config.head_dim, eps=config.rms_eps)

    def forward(self, x, rope, mask, cache, layer, S):
        """x (B, T, C) -> (B, T, C). mask: what each query may look at; None: all before it."""
        B, T, _ = x.shape
        q = self.wq(x, S).view(B, T, -1, self.head_dim)                     # (B, T, H, D)
        k = self.wk(x, S).view(B, T, -1, self.head_dim)                     # (B, T, KV, D)
        v = self.wv(x, S).view(B, T, -1, self.head_dim)                     # (B, T, KV, D)
        q = apply_rope(self.q_norm(q), *rope).transpose(1, 2)               # (B, H, T, D)
        k = apply_rope(self.k_norm(k), *rope).transpose(1, 2)               # (B, KV, T, D)
        v = v.transpose(1, 2)                                               # (B, KV, T, D)
        if cache is not None:
            k, v = cache.write(layer, k, v)                                 # (B, KV, slots, D)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)   # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)                             # (B, T, H*D)
        return self.wo(y, S)                                                # (B, T, C)

class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w_gate = Linear(config.dim, config.ffn_dim, bias=False)
        self.w_up = Linear(config.dim, config.ffn_dim, bias=False)
        self.w_down = Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x, S):
        y = F.silu(self.w_gate(x, S)) * self.w_up(x, S)                     # (B, T, ffn_dim)
        return self.w_down(y, S)                                            # (B, T, C)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.rms_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.rms_eps)
        self.ffn = FeedForward(config)

    def forward(self, x, rope, mask, cache, layer, S):
        x = x + self.attention(self.attention_norm(x), rope, mask, cache, layer, S)
        return x + self.ffn(self.ffn_norm(x), S)

class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.rms_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)   # (D/2,)

    def hidden(self, ids, cache=None, S=None):
        """ids (B, T) -> the last layer's hidden states, normed, (B, T, C). S: (L, B or 1, R, R).
        Without a cache the tokens stand at 0 ... T-1 and attend causally."""
        if cache is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]             # (1, T)
            return self.layers(ids, positions, None, None, S)
        cache.reserve(ids.shape[1])
        return self.layers(ids, cache.positions(), cache.mask(), cache, S)

    def layers(self, ids, positions, mask, cache, S):
        """`hidden` at given positions (B or 1, T) and mask (B or 1, 1, T, slots). rollout.py may
        record it on a GPU, so nothing in it depends on a number on the host."""
        angles = positions[:, :, None, None] * self.frequencies             # (B or 1, T, 1, D/2)
        rope = angles.cos(), angles.sin()                                   # once for all layers
        x = self.embedding(ids)                                             # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer, None if S is None else S[layer])
        return self.norm(x)

    def logits(self, hidden):
        """hidden (..., C) -> logits (..., vocab_size), in at least float32."""
        return self.head(hidden).to(torch.promote_types(hidden.dtype, torch.float32))

    def forward(self, ids, cache=None, S=None):
        """ids (B, T) -> logits (B, T, vocab_size)."""
        return self.logits(self.hidden(ids, cache, S))

    def tensors(self):
        """{name in Hugging Face's files: weight, not a copy}. A tied head is not among them."""
        return {hf_name(name): weight.detach() for name, weight in self.named_parameters()}

    @classmethod
    def from_folder(cls, path, dtype=torch.float32, device="cpu"):
        """A model folder -> frozen model. Raises UserError."""
        raw = read_json(Path(path, "config.json"))
        generation = read_json(Path(path, "generation_config.json"), default={})
        with reading(Path(path, "config.json")), torch.device("meta"):      # takes no memory
            model = cls(ModelConfig(raw, generation))
        names = {hf_name(name): name for name in model.state_dict()}
        weights = {}
        for name, tensor in read_folder(path).items():
            if name in names:
                weights[names[name]] = nn.Parameter(tensor.to(device, dtype, copy=True))
            elif not name.endswith("rotary_emb.inv_freq"):                  # in older files
                raise UserError(f"{path}: the tensor {name!r:.100} is not implemented")
        with reading(path):
            if model.config.tied:                       # the file may hold a second copy, or none
                embedding = weights["embedding.weight"]
                if not torch.equal(weights.get("head.weight", embedding), embedding):
                    raise UserError("lm_head.weight differs from the embedding, but they are tied")
                weights["head.weight"] = embedding
            model.load_state_dict(weights, assign=True)     # names what is missing or does not fit
        model.frequencies = model.frequencies.to(device)
        return model.requires_grad_(False)

# ----------------------------------------------------------------------- the model's folder on disk

HF_NAMES = {
    "embedding": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
    "head": "lm_head", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "ffn": "mlp", "w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def hf_name(name):
    """blocks.3.attention.wq -> model.layers.3.self_attn.q_proj, for modules and parameters."""
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))

class UserError(Exception):
    """An error caused by user input. Printed as one line; exit code 2."""

@contextlib.contextmanager
def reading(path):
    """An error while a file is read becomes a UserError: what is wrong with it, and the cure."""
    try:
        yield
    except UserError as error:                              # not implemented
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from None
    except Exception as error:                              # damage shows in many ways
        raise UserError(f"{path} is damaged ({error!r:.300}); download it again (or `git lfs "
                        "pull`)") from None

@contextlib.contextmanager
def atomic_write(path):
    """Yields a binary file that replaces `path` once all of it is on the disk. Raises UserError."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:                                # such as a full disk
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise UserError(f"{path}: {error.strerror}") from None

def read_json(path, default=None):
    """The dict in a file of JSON; `default`, if given, where there is no file. Raises UserError."""
    if default is not None and not Path(path).exists():
        return default
    with reading(path):
        return dict(json.loads(Path(path).read_bytes()))

def write_json(path, value):
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())

def read_safetensors(path):
    """{name: tensor}, views of the mapped file; writing to them never reaches it. Raises UserError.
    In the file: 8 bytes with the length of the header; the header, JSON of {name: {"dtype": "F32",
    "shape": [2, 3], "data_offsets": [0, 24]}}; the tensors' bytes."""
    with reading(path):
        data = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)
        start = 8 + int.from_bytes(bytes(data[:8].tolist()), "little")
        header = json.loads(data[8:start].numpy().tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            flat = data[start + first:start + last].view(DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])        # refuses sizes that do not fit
        return tensors

def write_safetensors(path, tensors):
    """Writes {name: tensor}, atomically. Raises OSError."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))     # aligned
    header = {}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        header[name] = dict(dtype=kinds[tensor.dtype], shape=[*tensor.shape], data_offsets=offsets)
        end += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():                                     # numpy has no bfloat16
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

def read_folder(folder):
    """{name: tensor} of the safetensors file or files of a model folder. Raises UserError."""
    tensors = {}
    for file in Path(folder).glob("model*.safetensors"):
        tensors |= read_safetensors(file)
    if not tensors:
        raise UserError(f"{folder}: there is no model.safetensors; check the path")
    return tensors

def weights_hash(folder):
    """A short hash of the weights of a model or run: of the last megabyte of each file."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:8]

def model_folder(name):
    """The folder `name`, or where there is none, a copy of that model of the Hugging Face hub."""
    if Path(name).exists() or str(name).count("/") != 1:
        return name
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=["*.json", "*.jinja", "model*.safetensors"])
    except Exception as error:                              # its errors have no common base
        raise UserError(f"there is no folder {name}, and Hugging Face's hub (pip install "
                        f"huggingface_hub) does not give it: {error}") from None

# ------------------------------------------------------------------------------------ the tokenizer

# tokenizer.json writes a token as letters, one for each byte: these bytes, which cannot be printed,
# as the characters from 256 on ("Ġ" is a space), all others as themselves.
BYTE_OF = dict(enumerate([*range(33), *range(127, 161), 173], start=256))
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"     # GPT-2's
GUARD = "\ufdd0"    # not a character: breaks the name of a special token in a user's text

def to_bytes(spelled):
    return spelled.translate(BYTE_OF).encode("latin-1")

def word_pattern(pre_tokenizer):
    """The regular expression by which a tokenizer cuts text into words; no token crosses them."""
    match (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer]):
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}, _]:
            return regex
        case [{"type": "Digits", "individual_digits": True}, {"use_regex": True}]:
            return r"\p{N}|\s+(?=\p{N})|" + WORDS
        case [{"type": "ByteLevel", "use_regex": True}]:
            return WORDS
    raise UserError(f"pre_tokenizer {str(pre_tokenizer):.1000} is not implemented")

def raise_exception(message):
    """Chat templates call it for messages that they refuse."""
    raise ValueError(message)

class Tokenizer:
    """Text to ids and back, as the folder's Hugging Face tokenizer does it (byte-level BPE).
    n_ids: largest id + 1. bos_id: or None. adds_bos: whether plain text begins with it."""
    @classmethod
    def from_folder(cls, folder):
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises UserError."""
        spec = read_json(Path(folder, "tokenizer.json"))
        config = read_json(Path(folder, "tokenizer_config.json"), default={})
        with reading(Path(folder, "tokenizer.json")):
            template = Path(folder, "chat_template.jinja")
            if template.exists():
                config["chat_template"] = template.read_text("utf-8", errors="replace")
            return cls(spec, config)

    def __init__(self, spec, config):
        self.template = config.get("chat_template")
        if isinstance(self.template, list):                 # several, with names
            self.template = {t["name"]: t["template"] for t in self.template}.get("default")
        self.template_args = {}             # more variables for it, like {"enable_thinking": False}
        self.system = ""                    # a system message that `prompt` begins with
        self.date = None                    # today in a template, a time.struct_time; None: today
        pattern = word_pattern(spec.get("pre_tokenizer"))
        normalizer = spec.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
            raise UserError(f"normalizer {normalizer!r:.200} is not implemented, only NFC")
        self.nfc = normalizer == {"type": "NFC"}
        self.added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.special = {token["content"] for token in spec["added_tokens"] if token["special"]}

        vocab = spec["model"]["vocab"]                                      # {spelled token: id}
        self.id_of = {to_bytes(token): vocab[token] for token in vocab if token not in self.added}
        self.lacking = "".join(chr(i) for i in range(32) if bytes([i]) not in self.id_of)
        # tiktoken joins those neighbours whose union has the lowest rank, Hugging Face those that
        # come first in `merges`: so a token's rank is its place there, after the 256 bytes.
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [to_bytes("".join(pair).replace(" ", "")) for pair in spec["model"]["merges"]]
        if spec["model"].get("ignore_merges"):              # Llama 3: a word of vocab stays whole
            tokens += self.id_of
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
        names = {name: len(ranks) + i for i, name in enumerate([*self.added, GUARD])}
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens=names)
        self.id_of |= {name.encode(): i for name, i in self.added.items()}
        self.bytes_of = {i: token for token, i in self.id_of.items()}
        self.n_ids = 1 + max(self.bytes_of)

        tokens = [config.get("bos_token"), config.get("eos_token")]         # names, or in dicts
        bos, eos = [token["content"] if isinstance(token, dict) else token for token in tokens]
        self.names = {"bos_token": bos or "", "eos_token": eos or ""}       # for chat templates
        self.bos_id = self.added.get(bos)
        self.eos_id = self.added.get(eos)
        self.adds_bos = config.get("add_bos_token", f"'{bos}'" in str(spec.get("post_processor")))

    def encode(self, text, control=False):
        """Ids of a text, without BOS. Special tokens in it stay text, unless `control`."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        # Hugging Face drops bytes without a token before it joins the rest: "!\x04!" is one "!!".
        # So they are moved behind the punctuation that they would part here.
        if self.lacking and not control:
            text = re.sub(rf"([{self.lacking}]+)((?:[^\w\s]|_)+)", r"\2\1", text)
        names = {*self.added, GUARD} if control else self.added.keys() - self.special
        ranks = self.bpe.encode(text, allowed_special=names, disallowed_special=())
        tokens = self.bpe.decode_tokens_bytes(ranks)
        return [self.id_of[token] for token in tokens if token in self.id_of]       # not the guard

    def decode_bytes(self, ids):
        """The UTF-8 bytes of ids; an id that the tokenizer does not have gives none."""
        return b"".join(self.bytes_of.get(int(i), b"") for i in ids)

    def decode(self, ids):
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def prompt(self, text, raw=False):
        """Ids of a user's message in the chat format; if raw or without a format, of plain text."""
        if self.template and not raw:
            system = [{"role": "system", "content": self.system}] if self.system else []
            return self.chat(system + [{"role": "user", "content": text}])
        return ([self.bos_id] if self.adds_bos else []) + self.encode(text)

    def chat(self, messages):
        """Ids of a conversation in the model's format, up to where the answer begins. What a user
        writes never becomes a special token or one of the format's. Raises UserError."""
        guarded = []
        for message in messages:
            text = message["content"]
            for name in self.added if message["role"] != "assistant" else []:
                if name in self.special or name in self.template:
                    text = text.replace(name, name[0] + GUARD + name[1:])
            guarded.append(message | {"content": text})
        variables = self.names | dict(
            messages=guarded, add_generation_prompt=True, tools=None, documents=None,
            raise_exception=raise_exception,
            strftime_now=lambda form: time.strftime(form, self.date or time.localtime()))
        try:
            text = compile_template(self.template).render(variables | self.template_args)
        except Exception as error:                          # a template is a program of a stranger
            raise UserError(f"the model's chat template fails: {error}") from None
        return self.encode(text, control=True)

@functools.lru_cache
def compile_template(template):
    """A chat template -> a program. Kept, because compiling takes far longer than running it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment                # comes with torch
    # {% generation %} marks what TRL trains on; {% with %} is a tag that does nothing
    template = re.sub(r"(\{%[-+]?\s*(end)?)generation\b", r"\1with", template)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template)

def set_chat_format(tokenizer, config):
    """Gives the tokenizer a run's system message, date, and arguments of its chat template."""
    tokenizer.system = config.get("system", "")
    try:
        tokenizer.template_args = dict(json.loads(config.get("template_args") or "{}"))
        date = config.get("date")
        tokenizer.date = time.strptime(date, "%Y-%m-%d") if date else None
    except (ValueError, TypeError) as error:
        raise UserError(f"--template-args is a JSON object, --date YYYY-MM-DD: {error}") from None

# -------------------------------------------------------------------------------- for every script

def pick_device(name):
    """auto: cuda if this machine has it, else mps, else cpu. UserError for one that it lacks."""
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    names = [device for device in found if found[device]]
    if name not in ("auto", *names):
        raise UserError(f"--device {name}: PyTorch finds only {', '.join(names)} here")
    return names[0] if name == "auto" else name

def pick_dtype(name, device):
    """auto: bfloat16 on cuda, else float32."""
    if name == "auto":
        name = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return getattr(torch, name)

def load_model(name, device="auto", dtype="auto"):
    """A folder or hub id -> (Transformer, Tokenizer). Raises UserError."""
    folder = model_folder(name)
    device = pick_device(device)
    model = Transformer.from_folder(folder, pick_dtype(dtype, device), device)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.n_ids > model.config.vocab_size:
        token = tokenizer.decode([tokenizer.n_ids - 1])
        raise UserError(f"{folder}: the embedding has no row for the token {token!r:.100}")
    if tokenizer.eos_id not in (None, *model.config.eos_ids):
        model.config.eos_ids.append(tokenizer.eos_id)       # generation_config.json may lack it
    return model, tokenizer

def run_script(main):
    """Runs a script's main(). An error of the user's is one line on stderr and exit code 2."""
    with contextlib.suppress(AttributeError):               # a test's stdout cannot
        sys.stdout.reconfigure(errors="replace")            # cp1252 knows no Chinese
    try:
        main()
        sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
    except (UserError, OSError, ImportError, torch.OutOfMemoryError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError):
            message = ("out of memory: lower --rollout-batch, --micro-batch (of evaluate.py: "
                       "--batch), --max-new-tokens or --window")
        if isinstance(error, OSError) and error.filename is None:
            message = f"cannot write to stdout or a file: {error.strerror}"
        if isinstance(error, ImportError):                  # an optional package
            message += f"; pip install {error.name}"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)

class ArgumentParser(argparse.ArgumentParser):
    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        raise UserError(f"{message}; --help lists every flag")
