"""cache.py: the sliding cache, a memory of fixed size, and what leaves it.

The cache-constrained policy (paper, section 3): every token is drawn from pi(y_t | C_t, S_t), where C_t is what this
file keeps and S_t what encoder.py made of the rest. Per layer one buffer for keys and one for values:

    slot     0 ... P-1                 P ... P+W-1
            [ the question, for ever ][ ring of W thoughts: thought n stands in slot P + n mod W ]

When W thoughts are cached and one more is to be written, the oldest E leave: `evict` hands them out, and the next E
thoughts take their slots. When that happens depends on the number of thoughts only, so all rows of a batch evict at the
same step whatever the lengths of their questions, and no shape ever changes. Attention does not care in which slot a
key lies, because its position is in the key itself (RoPE). `window = 0` keeps everything: a ring that never fills.

Positions are `absolute`: a key keeps the angle it was written with, a row's thought n stands at position
prompt_length + n. (StreamingLLM's positions within the cache would turn the question's keys forward by E in `evict`,
and `begin` would lower the positions by as much: RoPE knows differences only, so the ring need not be touched.)

The same class serves decoding and training (what was written has a graph, until `detach` cuts it between segments).

`Decoder` makes a decode step, whose shapes never change, one function: compiled, on a GPU recorded. `pack` lays weights
out for a CPU. Last, not of the cache: devices, processes, folders, and files that are never left half written.

Left out: eviction by attention scores (H2O, PyramidKV, HeadKV), paging, quantised keys.

Try it:  python rollout.py --model DIR --prompt "Tell me a story." --window 64 --show-evictions
"""
import atexit
import contextlib
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from model import FILE_DTYPES, Linear, UserError


def eviction_size(window, evict_ratio):
    """E, the number of thoughts that leave at once: window * evict_ratio. 0 for window 0 (nothing ever leaves).

    Raises UserError unless E is a whole number that divides the window: then each eviction frees one run of slots."""
    if window == 0:
        return 0
    E = round(window * evict_ratio) if 0 < evict_ratio <= 1 else 0              # 0 also for a ratio that is no number
    if window < 0 or E < 1 or abs(E - window * evict_ratio) > 1e-6 or window % E:
        raise UserError(f"--window {window} --evict-ratio {evict_ratio:g} evicts {window * evict_ratio:g} thoughts at "
                        "once: that must be a whole number that divides the window; try --window 16 --evict-ratio 0.25")
    return E


def window_of(window, evict_ratio, config):
    """(window, evict_ratio) of the flags; what they leave open (-1) is as in the run's config, without a run 0 and
    0.25. Raises UserError if they do not fit together."""
    window = config.get("window", 0) if window == -1 else window
    evict_ratio = config.get("evict_ratio", 0.25) if evict_ratio == -1 else evict_ratio
    eviction_size(window, evict_ratio)
    return window, evict_ratio


class SlidingCache:
    """Keys and values of B rows: `keys[layer]`, `values[layer]`, each (B, KV, P + W, D).

    Life of a cache: the prompts go through the model once (`Transformer.hidden(prompt_ids, cache)`), `spread` gives
    each rollout its row and its ring, then thoughts go through, one or several at a time, with
    `if cache.full: cache.evict()` before each. n counts the thoughts written, `oldest` is the first one still kept.
    """

    def __init__(self, n_layers, prompt_lengths, window, evict, max_thoughts):
        """prompt_lengths: (B,) true lengths of the right-padded prompts. window: W; 0, or one that max_thoughts never
        fill, keeps them all."""
        self.prompt_lengths = prompt_lengths
        self.window, self.evict_size = (window, evict) if 0 < window < max_thoughts else (max_thoughts, max_thoughts)
        assert self.window % self.evict_size == 0
        self.P, self.n, self.oldest, self.whole = None, 0, 0, False             # whole: attention reads empty slots too
        self.keys, self.values = [None] * n_layers, [None] * n_layers

    def spread(self, rows, multiple=1):
        """Gives every rollout its own row: rows (B,) names, for each, the prompt it continues. Adds the empty ring.
        P grows to a multiple of `multiple`, by slots that nobody sees: so there are few shapes to compile for."""
        self.prompt_lengths, extra = self.prompt_lengths[rows], -self.P % multiple
        self.P += extra
        for buffers in (self.keys, self.values):
            for layer, x in enumerate(buffers):
                ring = x.new_zeros(len(rows), x.shape[1], extra + self.window, x.shape[3])
                buffers[layer] = torch.cat([x[rows], ring], dim=2)              # (B, KV, P + W, D)
        columns = torch.arange(self.P + self.window, device=rows.device)
        self.seen = columns < self.prompt_lengths[:, None]                      # (B, P + W) what a new thought looks at

    def keep(self, rows):
        """Only these rows (b,) of the B go on, the others have ended: buffers (B, KV, P + W, D) -> (b, KV, P + W, D)"""
        self.prompt_lengths, self.seen = self.prompt_lengths[rows], self.seen[rows]
        self.keys, self.values = ([x[rows] for x in buffers] for buffers in (self.keys, self.values))

    @property
    def full(self):
        """True when the oldest E thoughts must leave before the next one is written."""
        return self.n - self.oldest == self.window

    def begin(self, T):
        """Makes room for T more tokens and says where they stand and what each sees.

        The first call is the prompt, whose region takes its width P from it; later calls are thoughts.
        Returns positions (B or 1, T) and mask (B or 1, 1, T, slots in use), True where a query may look."""
        device = self.prompt_lengths.device
        if self.P is None:
            self.P = T
            columns = torch.arange(T, device=device)
            return columns[None], (columns <= columns[:, None])[None, None]     # causal; pads come after what is real
        assert self.n + T - self.oldest <= self.window, "evict first: the ring is full"
        a = self.P + self.n % self.window                                       # where these T go: a run of slots
        assert a + T <= self.P + self.window, "a segment must not wrap around the ring"
        queries = torch.arange(self.n, self.n + T, device=device)
        self.slots, self.n = torch.arange(a, a + T, device=device), self.n + T
        self.used = self.P + (self.window if self.whole else min(self.n, self.window))
        self.seen[:, a:a + T] = True
        mask = self.seen[:, None, None, :self.used]                             # (B, 1, 1, slots)
        if T > 1:
            mask = mask.repeat(1, 1, T, 1)                                      # (B, 1, T, slots)
            mask[..., a:a + T] = queries <= queries[:, None]                    # not what comes later
        return self.prompt_lengths[:, None] + queries, mask                     # (B, T), (B, 1, T, slots)

    def write(self, layer, k, v):
        """Writes what `begin` made room for, k and v (B, KV, T, D); returns all slots in use, (B, KV, slots, D)."""
        if self.keys[layer] is None:                                            # the prompt
            self.keys[layer], self.values[layer] = k, v
            return k, v
        self.keys[layer].index_copy_(2, self.slots, k)                          # in place, in training too: `backward`
        self.values[layer].index_copy_(2, self.slots, v)                        # comes before the next segment
        return self.keys[layer][:, :, :self.used], self.values[layer][:, :, :self.used]

    def evict(self):
        """The oldest E thoughts leave. Returns their keys and values, each (L, B, E, KV*D), detached: constants.

        The keys come as they lie here, turned by their position: so the encoder can tell when a thought was thought
        (README, "where the paper is silent")."""
        assert self.full
        a = self.P + self.oldest % self.window
        b = a + self.evict_size
        self.oldest += self.evict_size
        self.seen[:, a:b] = False
        # L tensors (B, KV, E, D) -> (L, B, KV, E, D) -> (L, B, E, KV, D) -> (L, B, E, KV*D)
        return tuple(torch.stack([x[:, :, a:b].detach() for x in buffers]).transpose(2, 3).flatten(3)
                     for buffers in (self.keys, self.values))

    def detach(self):
        """Keeps the numbers, drops the graph: what one segment wrote is a constant for the next."""
        self.keys, self.values = [x.detach() for x in self.keys], [x.detach() for x in self.values]

    @property
    def megabytes(self):
        """Size of all buffers in MB (10^6 bytes)."""
        return sum(x.numel() * x.element_size() for x in self.keys + self.values) / 1e6


# ------------------------------------------------------------------------------------ one decode step, prepared

class Decoder:
    """One decode step: `decoder(tokens (b,), S)` -> hidden (b, 1, C), with every key and value in its slot.

    What changes from step to step (tokens, positions, slots, mask, states) are numbers in tensors whose shapes stay, so
    the layers may be compiled: then they are one function that reads the whole ring, empty slots masked. On a GPU that
    function is recorded once for each number of rows and replayed: the host launches one thing a token."""

    def __init__(self, model, cache, compile=False):
        self.model, self.cache, self.compile, self.graph = model, cache, compile, None
        cache.whole = compile
        self.layers = compiled_layers(model, len(cache.seen)) if compile else model.layers
        pack(model, len(cache.seen), compile)

    def __call__(self, tokens, S):
        positions, mask = self.cache.begin(1)
        if self.compile and S is not None and S.shape[1] == 1:                  # one for all rows, before any eviction
            S = S.expand(-1, len(tokens), -1, -1).contiguous()
        if not (self.compile and tokens.is_cuda):
            return self.layers(tokens[:, None], positions, mask, self.cache, S)
        inputs = [tokens[:, None], positions, mask, self.cache.slots] + [S] * (S is not None)
        if self.graph is None or len(self.inputs[0]) != len(tokens):
            self.record([x.clone() for x in inputs])
        for kept, new in zip(self.inputs, inputs):
            kept.copy_(new)
        self.graph.replay()
        return self.hidden

    def record(self, inputs):
        """Records the layers on a GPU, reading `inputs`, which later steps overwrite. The trial runs that must come
        before write the new thought to its slot, as the replay will once more."""
        self.inputs, self.cache.slots = inputs, inputs[3]
        arguments = [*inputs[:3], self.cache, inputs[4] if len(inputs) > 4 else None]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.layers(*arguments)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden = self.layers(*arguments)


def compiled_layers(model, rows):
    """model.layers, compiled once for each shape that it meets; kept with the model. On a CPU, for several rows and no
    adapter, the weights are compiled in, laid out as MKL wants them. What PyTorch would check of the model at every
    token is checked once a rollout: that those weights are what they were (an adapter is told by its S)."""
    on_cpu = model.norm.weight.device.type == "cpu"
    fixed = on_cpu and rows > 1 and small(model) and not any(p.requires_grad for p in model.parameters())
    kind = fixed, fixed and sum(p._version for p in model.parameters())
    model.compiled = getattr(model, "compiled", {})
    if kind not in model.compiled:
        more = dict(isolate_recompiles=True, options={                          # a GPU's replay checks nothing anyway
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}) if on_cpu else {}
        model.compiled[kind] = torch.compile(model.layers, fullgraph=True, dynamic=False, **more)
    torch._dynamo.config.recompile_limit = 64  # numbers of rows, times widths of prompts
    torch._inductor.config.cpp_wrapper, torch._inductor.config.freezing = on_cpu, fixed
    return model.compiled[kind]


def small(model):
    """Below 2 GB: a second copy of the weights, laid out for speed, may be afforded."""
    return sum(p.nbytes for p in model.parameters()) < 1 << 31


def pack(model, rows, compile=False):
    """On a CPU, gives every Linear a copy of its frozen weight as products with few rows (a decode step's) read it
    fastest: column by column for one row, in oneDNN's blocks for more (in compiled layers others do that). The numbers
    are the same, the memory is double: so for small models only."""
    affordable, few = small(model), 1 < rows <= 64 and torch.backends.mkldnn.is_available()
    for linear in model.modules():
        if isinstance(linear, Linear):
            w, bias = linear.weight.detach(), linear.bias
            plain = w.device.type == "cpu" and w.dtype == torch.float32
            blocks = few and (not compile or linear is getattr(model, "head", None))
            packs = affordable and plain and (rows == 1 or blocks)
            mark = rows == 1, w.data_ptr(), w._version                          # or it has been done before
            if not packs:
                linear.few_rows = None
            elif getattr(linear.few_rows, "mark", None) != mark:
                linear.few_rows = partial(F.linear, weight=w.t().contiguous().t(), bias=bias) if rows == 1 else partial(
                    blocked, w, torch.ops.mkldnn._reorder_linear_weight(w, rows), bias)
                linear.few_rows.mark = mark


def blocked(weight, packed, bias, x):
    """x (..., in) -> (..., out), by oneDNN; for one row it is slower than the plain product."""
    one = x.numel() == x.shape[-1]
    return F.linear(x, weight, bias) if one else torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def halved(size, least):
    """size, halved (rounding up) as long as `least` still fits."""
    return halved((size + 1) // 2, least) if 2 * least <= size else size


def next_logits(model, hidden, n_ids):
    """hidden (..., C) -> logits of the ids that exist, (..., n_ids), at least float32: rows of the embedding beyond
    the tokenizer's ids are never sampled. The sampler and the scorer of grpo.py share it."""
    return model.head(hidden)[..., :n_ids].to(torch.promote_types(hidden.dtype, torch.float32))


# ------------------------------------------------------------------------------------ devices, processes, files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name):
    """auto -> cuda, mps or cpu, the first that this machine has. Raises UserError for one that it lacks."""
    here = [*["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(), "cpu"]
    if name not in ("auto", *here):
        raise UserError(f"--device {name}: this machine has none that PyTorch can use; give --device {here[0]}")
    return here[0] if name == "auto" else name


def pick_dtype(name, device):
    """auto -> bfloat16 on a GPU, float32 on the CPU."""
    return DTYPES[name if name != "auto" else "bfloat16" if device == "cuda" else "float32"]


def pick_compile(name, device):
    """auto -> on a GPU only: on a CPU compiling takes most of a minute and a C++ compiler. device: as for pick_device.
    Raises UserError where there is no compiler."""
    if name == "on" and pick_device(device) != "cuda" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise UserError("--compile on: this machine has no C++ compiler (g++ or clang++); install one, or leave it off")
    return name == "on" or name == "auto" and pick_device(device) == "cuda"


def say(text):
    """A line on stderr, beside the progress bar; of several processes the first speaks."""
    if ranks()[0] == 0:
        tqdm.write(text, file=sys.stderr)


def ranks():
    """(number of this process, how many there are): (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def everyone(value):
    """What each process gave here, a list in the order of their numbers; here they also wait for each other."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def join(prompts, device):
    """Under torchrun, makes this process one of several, each with a GPU (or, without one, cores) of its own."""
    if (n := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        if prompts % n:
            raise UserError(f"--prompts {prompts} cannot be shared by {n} processes; give a multiple of {n}")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())  # or its threads abort the exit


FETCHED = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
           "model*.safetensors", "model.safetensors.index.json"]


def model_folder(name):
    """A folder as it is; for an id of the Hugging Face hub (Qwen/Qwen2.5-3B-Instruct) the folder that it is fetched to:
    config, tokenizer and safetensors files, nothing else. Raises UserError."""
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        return name
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"there is no folder {name}; to fetch it from the Hugging Face hub: "
                        "pip install huggingface_hub") from None
    try:
        return snapshot_download(name, allow_patterns=FETCHED)
    except Exception as error:  # the library's errors have no common base; all of them mean that it was not fetched
        raise UserError(f"{name} is no folder here, and the Hugging Face hub does not give it: "
                        f"{first_line(error)}") from None


def first_line(error):
    """What a library's error says, in one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def free_folder(out, cure):
    """out as a Path, if nothing is there yet. Raises UserError with the cure if it is empty, or names what is there."""
    if not out:
        raise UserError(cure)
    if Path(out).exists() and not (Path(out).is_dir() and all(p.suffix == ".tmp" for p in Path(out).iterdir())):
        raise UserError(f"{out} already holds a run, or something else; {cure}")
    return Path(out)


def make_folder(path):
    """Makes the run folder. Raises UserError if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}); give another --out") from None


@contextlib.contextmanager
def replacing(path):
    """A file to be written (bytes), which takes the place of `path` once all of it is on the disk. If that fails,
    OSError says why, with `path` as its filename, and `path` stays what it was."""
    there = Path(f"{path}.tmp")
    try:
        with open(there, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        there.replace(path)
    except OSError as error:
        there.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def write_json(path, value):
    """Writes a file of JSON; `path` changes only once all is written. Raises OSError."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def write_safetensors(path, tensors):
    """Writes {name: tensor}; `path` changes only once all is written. Raises OSError."""
    header, end, kinds = {"__metadata__": {"format": "pt"}}, 0, {dtype: kind for kind, dtype in FILE_DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # wide dtypes first: all are aligned
    for name in order:
        first, end = end, end + tensors[name].nbytes
        header[name] = dict(dtype=kinds[tensors[name].dtype], shape=[*tensors[name].shape], data_offsets=[first, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:  # as bytes, for numpy has no bfloat16
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
