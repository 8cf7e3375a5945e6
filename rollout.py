"""rollout.py: batched generation under the cache; as a script, a chat with a model whose memory does not grow.

    y_t ~ pi(. | C_t, S_t)

Each prompt goes through the model once and is shared by its group of G rollouts; then all rows advance together, one
token a step. Before the ring would overflow, the oldest thoughts leave the cache and enter the thought state. A row
ends with the first end token it draws, which counts as one of its tokens; what the loop computes for it afterwards is
masked by length, never by comparing ids. The log-prob of each token drawn is stored: it is the old policy of GRPO.

Left out: speculative decoding, paged caches, serving.

Try it:  python rollout.py --model DIR --prompt "What is the capital of France?" --temperature 0
"""
import argparse
import codecs
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from tqdm import tqdm

from cache import SlidingCache, eviction_size
from encoder import ThoughtEncoder
from model import Tokenizer, Transformer, UserError, read_json, read_safetensors


@dataclass
class Rollout:
    """N prompts and B = N * G completions; row b continues prompt b // G."""
    prompt_ids: torch.Tensor      # (N, P) right-padded
    prompt_lengths: torch.Tensor  # (N,)
    prompt_of: torch.Tensor       # (B,) which prompt a row continues
    tokens: torch.Tensor          # (B, T) sampled ids; beyond a row's length: whatever the loop drew
    lengths: torch.Tensor         # (B,) tokens that count, the end token included
    logps: torch.Tensor           # (B, T) float32, log pi(y_t | C_t, S_t) as sampled
    ended: torch.Tensor           # (B,) True if the row drew an end token, False if it was truncated
    window: int                   # W, 0 for a full cache
    evict_size: int               # E
    n_ids: int                    # ids that may be sampled
    cache_megabytes: float = 0.0

    def completions(self):
        """The sampled ids of every row, as lists, cut at the row's length."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]

    def evictions(self):
        """How often each row's window overflowed while the row was alive, (B,)."""
        if not self.window:
            return torch.zeros_like(self.lengths)
        # The last token drawn is never written, so a row writes length - 1 thoughts.
        over = self.lengths - 1 - self.window
        return (over + self.evict_size - 1).div(self.evict_size, rounding_mode="floor").clamp(min=0)


def next_logits(model, hidden, n_ids):
    """hidden (..., C) -> logits of the ids that exist, (..., n_ids), at least float32: rows of the embedding beyond
    the tokenizer's ids are never sampled. The sampler and the scorer of grpo.py share it."""
    return model.head(hidden)[..., :n_ids].to(torch.promote_types(hidden.dtype, torch.float32))


def sample(logits, temperature, top_k, top_p, generator):
    """Draws one id a row from logits (B, n_ids). Temperature 0 takes the largest; top_k 0 and top_p 1 cut nothing.

    Returns ids (B,) and their log-probs (B,) in the distribution that was sampled from."""
    if temperature == 0:
        ids = logits.argmax(dim=-1)
        return ids, torch.log_softmax(logits, dim=-1).gather(1, ids[:, None])[:, 0]
    logps = torch.log_softmax(logits / temperature, dim=-1)
    if top_k or top_p < 1:
        ordered, order = logps.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()                   # mass of what is likelier
        cut = (before >= top_p) | (torch.arange(logps.shape[-1], device=logps.device) >= (top_k or logps.shape[-1]))
        cut[:, 0] = False                                                       # the likeliest always stays
        logps = torch.log_softmax(logps.masked_fill(cut.scatter(1, order, cut), -torch.inf), dim=-1)
    # A race: with Exp(1) noise, argmax of p / noise falls on each id with probability p (the Gumbel trick, unlogged).
    noise = torch.empty_like(logps).exponential_(generator=generator)
    ids = (logps.exp() / noise).argmax(dim=-1)
    return ids, logps.gather(1, ids[:, None])[:, 0]


def check_prompts(model, prompts, max_new_tokens):
    """Raises UserError if one of the prompts (lists of ids) is empty, or does not fit the model with its thoughts."""
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.config.max_positions:
        raise UserError(f"a prompt of {longest} tokens and --max-new-tokens {max_new_tokens} exceed the model's "
                        f"context of {model.config.max_positions}; shorten one of them")
    if min(map(len, prompts)) == 0:
        raise UserError("a prompt is empty, or holds nothing that this model's tokenizer knows; write another")


@torch.no_grad()
def generate(model, encoder, prompts, group_size=1, *, max_new_tokens, window=0, evict_ratio=0.25, n_ids=None,
             temperature=1.0, top_k=0, top_p=1.0, seed=0, progress="", on_token=None):
    """Samples group_size completions of every prompt under the cache-constrained policy.

    prompts: lists of ids. encoder: a ThoughtEncoder attached to the model, or None for the model as it is. seed makes
    the draw repeatable on one device. progress: title of a tqdm bar. on_token(ids (B,), evicted) sees every step.
    Returns a Rollout. Raises UserError if a prompt and its thoughts do not fit the model's positions."""
    device = model.embedding.weight.device
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    check_prompts(model, prompts, max_new_tokens)
    P = max(map(len, prompts))
    prompt_ids = torch.tensor([p + [0] * (P - len(p)) for p in prompts], device=device)  # (N, P)
    rows = torch.arange(len(prompts), device=device).repeat_interleave(group_size)       # (B,)
    B, n_ids = len(rows), n_ids or model.config.vocab_size
    generator = torch.Generator(device).manual_seed(seed)
    eos = torch.tensor(model.config.eos_ids, dtype=torch.long, device=device)
    E = eviction_size(window, evict_ratio)

    cache = SlidingCache(model.config.n_layers, prompt_lengths, window, E, max_new_tokens)
    U = encoder.start() if encoder else None
    S = encoder.read(U) if encoder else None
    hidden = model.hidden(prompt_ids, cache, S)                                 # (N, P, C)
    hidden = hidden[torch.arange(len(prompts), device=device), prompt_lengths - 1][rows]  # (N, C) -> (B, C)
    cache.spread(rows)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.full((B,), max_new_tokens, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for t in tqdm(range(max_new_tokens), desc=progress, disable=not progress, leave=False):
        tokens[:, t], logps[:, t] = sample(next_logits(model, hidden, n_ids), temperature, top_k, top_p, generator)
        ends = torch.isin(tokens[:, t], eos) & ~ended
        lengths[ends] = t + 1
        ended |= ends
        done = t + 1 == max_new_tokens or bool(ended.all())
        evicted = not done and cache.full
        if evicted:
            leaving = cache.evict()
            if encoder:
                U = encoder.write(U, *leaving)
                S = encoder.read(U)
        if on_token:
            on_token(tokens[:, t], evicted)
        if done:
            break
        hidden = model.hidden(tokens[:, t:t + 1], cache, S)[:, 0]               # (B, 1, C) -> (B, C)
    return Rollout(prompt_ids, prompt_lengths, rows, tokens[:, :t + 1], lengths, logps[:, :t + 1], ended, window, E,
                   n_ids, cache.megabytes)


# ------------------------------------------------------------------------------------ what the three scripts share


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def flag(default, help, choices=None, least=None):
    """A dataclass field that is a command-line flag; choices or a least value bound what it may be."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


def command_line(options, doc, presets=None, argv=None):
    """Fills the dataclass `options` from the command line: a flag for every field, with dashes or underscores.

    presets {name: {field: default}} are picked by the field `preset`. Raises UserError for an unknown flag or value."""
    def refuse(message):
        raise UserError(f"{message}; --help lists every flag")
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = refuse
    for f in fields(options):
        names = dict.fromkeys(["--" + f.name.replace("_", "-"), "--" + f.name])  # in order, without repeats
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is not bool and not f.metadata["choices"]:
            kind["metavar"] = {int: "N", float: "F", str: "S"}[f.type]
        parser.add_argument(*names, default=f.default, help=f.metadata["help"], **kind)
    if presets:
        parser.set_defaults(**presets[parser.parse_args(argv).preset])
    values = vars(parser.parse_args(argv))
    for f in fields(options):
        least = f.metadata["least"]
        if least is not None and not values[f.name] >= least:                   # not: nan is below everything
            raise UserError(f"--{f.name.replace('_', '-')} {values[f.name]} is too small; give {least} or more")
    return options(**values)


def run_script(main):
    """Runs a script's main(); what a person can mend is one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


def pick_device(name):
    """auto -> cuda, mps or cpu, the first that this machine has. Raises UserError for one that it lacks."""
    here = [*["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(), "cpu"]
    if name not in ("auto", *here):
        raise UserError(f"--device {name}: this machine has none that PyTorch can use; give --device {here[0]}")
    return here[0] if name == "auto" else name


def pick_dtype(name, device):
    """auto -> bfloat16 on a GPU, float32 on the CPU."""
    return DTYPES[name if name != "auto" else "bfloat16" if device == "cuda" else "float32"]


def load(folder, run, dtype, device):
    """A model folder, a run folder of train.py, or both -> (model, encoder or None, tokenizer, run's config or {}).

    Raises UserError for folders that are missing, damaged or do not belong together."""
    if not folder and not run:
        raise UserError("which model? give --model DIR (a Hugging Face folder) or --run RUN (a folder train.py wrote)")
    config = read_json(Path(run) / "config.json") if run else {}
    if run and "model" not in config:
        raise UserError(f"{run}/config.json is not that of a run of train.py; give the folder that train.py wrote")
    folder = folder or (Path(run) / "base" if config["model"] == "tiny" else config["model"])
    device = pick_device(device)
    model = Transformer.from_folder(folder, dtype=pick_dtype(dtype, device), device=device)
    encoder = None
    if run:
        encoder = attach(model, config)
        path = Path(run) / "adapter.safetensors"
        saved, wanted = read_safetensors(path), encoder.trainable()
        if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in wanted.items()}:
            raise UserError(f"{path} does not fit {folder} with {run}/config.json: other tensors or shapes; "
                            "give the model that the run was trained on")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(saved[name])
    return model, encoder, Tokenizer.from_folder(folder), config


def window_of(options, config):
    """(window, evict_ratio) of the flags; what they leave open (-1) is as in the run's config, without a run 0 and
    0.25. Raises UserError if they do not fit together."""
    window = config.get("window", 0) if options.window == -1 else options.window
    evict_ratio = config.get("evict_ratio", 0.25) if options.evict_ratio == -1 else options.evict_ratio
    eviction_size(window, evict_ratio)
    return window, evict_ratio


def prompt_ids(tokenizer, text, raw=False):
    """The ids that put a text to a model: in its chat format; as it stands if it has none (a base model) or if raw."""
    if tokenizer.template and not raw:
        return tokenizer.chat([{"role": "user", "content": text}])
    return [tokenizer.bos_id] * tokenizer.adds_bos + tokenizer.encode(text)


def attach(model, config):
    """A ThoughtEncoder for the model as a run's config (a dict) describes it, on the model's device."""
    encoder = ThoughtEncoder(model, config["adapter"], config["rank"], config["global_tokens"], config["alpha"],
                             config["memory_update"])
    return encoder.to(model.embedding.weight.device)


@dataclass
class Options:
    """The flags of `python rollout.py`."""
    model: str = flag("", "model folder, as downloaded from Hugging Face")
    run: str = flag("", "run folder of train.py: its adapter, its model, its window")
    prompt: str = flag("", "what to say to the model")
    raw: bool = flag(False, "take the prompt as it is, without the chat format")
    window: int = flag(-1, "thought tokens kept, 0 keeps all, -1: as the run was trained, else 0", least=-1)
    evict_ratio: float = flag(-1.0, "share of the window that leaves at once, -1: as the run was trained, else 0.25")
    max_new_tokens: int = flag(256, "longest completion, in tokens", least=1)
    temperature: float = flag(0.7, "of sampling; 0 takes the likeliest token", least=0)
    top_k: int = flag(0, "sample among the k likeliest tokens, 0 for all", least=0)
    top_p: float = flag(1.0, "sample among the likeliest tokens that make up this mass", least=0)
    seed: int = flag(0, "makes the draw repeatable", least=0)
    show_evictions: bool = flag(False, "mark on stderr where thoughts left the window")
    dtype: str = flag("auto", "of the weights; auto: bfloat16 on a GPU, else float32", ("auto", *DTYPES))
    device: str = flag("auto", "auto: cuda, mps or cpu", ("auto", "cuda", "mps", "cpu"))


def main():
    o = command_line(Options, "Chat with a model under a bounded cache; only the completion goes to stdout.")
    if not o.prompt:
        raise UserError('nothing to say: give --prompt "..."')
    model, encoder, tokenizer, config = load(o.model, o.run, o.dtype, o.device)
    window, evict_ratio = window_of(o, config)
    ids = prompt_ids(tokenizer, o.prompt, raw=o.raw)
    decoder, count, start = codecs.getincrementaldecoder("utf-8")("replace"), 0, time.time()

    def stream(tokens, evicted):
        nonlocal count
        count += 1
        if tokens[0].item() not in model.config.eos_ids:
            print(decoder.decode(tokenizer.decode_bytes(tokens.tolist())), end="", flush=True)
        if evicted and o.show_evictions:
            print(f"[-{eviction_size(window, evict_ratio)}]", end="", file=sys.stderr, flush=True)

    rollout = generate(model, encoder, [ids], max_new_tokens=o.max_new_tokens, window=window,
                       evict_ratio=evict_ratio, n_ids=tokenizer.n_ids, temperature=o.temperature, top_k=o.top_k,
                       top_p=o.top_p, seed=o.seed, on_token=stream)
    print(decoder.decode(b"", final=True), flush=True)
    print(f"{count} tokens, {count / (time.time() - start):.1f} tokens/s, {int(rollout.evictions()[0])} evictions, "
          f"cache {rollout.cache_megabytes:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
