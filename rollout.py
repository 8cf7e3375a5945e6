"""rollout.py: sampling from the cache-constrained policy, many rows at a time; as a script, a chat.

    y_t ~ pi(. | C_t, S_t)         C_t: the sliding KV cache (cache.py), S_t: the state (encoder.py)

Each prompt passes through the model once and is shared by its group of G responses. Then all rows
go on together, one token per step. When the cache is full, the oldest tokens leave it and are
encoded into the memory. A row ends with the first end token that it draws, which counts as one of
its tokens. The log-probs of all tokens are stored: they are GRPO's old log-probs.

The rows of a prompt draw from random numbers of their own, made from the prompt's seed. So up to
rounding a response does not depend on which other prompts are in the batch.

Left out: top-k and top-p sampling, speculative decoding, paged caches, serving.

Try it:  python rollout.py --model DIR --prompt "What is the capital of France?" --temperature 0
"""
import codecs
import sys
import time
import warnings
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cache import SlidingCache, eviction_size
from encoder import load_run
from model import ArgumentParser, UserError, load_model, run_script, set_chat_format

@dataclass
class Rollout:
    """N prompts and their B = N * G responses. Row b continues prompt prompt_of[b] = b // G."""
    prompt_ids: torch.Tensor        # (N, P) padded at the end
    prompt_lengths: torch.Tensor    # (N,)
    prompt_of: torch.Tensor         # (B,)
    tokens: torch.Tensor            # (B, T) sampled ids; without meaning beyond a row's length
    lengths: torch.Tensor           # (B,) response tokens, the end token included
    logps: torch.Tensor             # (B, T) log pi(y_t | C_t, S_t) as sampled
    ended: torch.Tensor             # (B,) False for a response that was cut off at max_new_tokens
    window: int                     # W, 0 for the full cache
    evict_size: int                 # E
    temperature: float
    cache_mb: float                 # size of the KV cache of the rows that decoded together

    def texts(self, tokenizer):
        """The B responses as text, the end token left out."""
        n_text = (self.lengths - self.ended.long()).tolist()
        rows = self.tokens.tolist()
        return [tokenizer.decode(ids[:n]) for ids, n in zip(rows, n_text)]

    def n_evictions(self):
        """How many evictions each row has lived through, (B,)."""
        if self.window == 0:
            return torch.zeros_like(self.lengths)
        over = (self.lengths - 1 - self.window).clamp(min=0)    # the last token is never written
        return (over + self.evict_size - 1) // self.evict_size

def given_responses(prompts, responses, window, evict_ratio, device):
    """A Rollout of given responses, one to each prompt (lists of ids, their end tokens included),
    as if they had been sampled: for supervised training. Its log-probs are unknown: zeros."""
    prompt_ids, prompt_lengths = pad_right(prompts, device)                     # (B, P), (B,)
    tokens, lengths = pad_right(responses, device)                              # (B, T), (B,)
    prompt_of = torch.arange(len(prompts), device=device)                       # (B,)
    ended = torch.ones_like(lengths, dtype=torch.bool)                          # (B,)
    logps = torch.zeros_like(tokens, dtype=torch.float32)                       # (B, T)
    return Rollout(prompt_ids, prompt_lengths, prompt_of, tokens, lengths, logps, ended, window,
                   eviction_size(window, evict_ratio), temperature=1.0, cache_mb=0.0)

def sample(logits, temperature, u):
    """Draws one id per row of logits (B, vocab) / temperature, given uniform numbers u (B,) in
    [0, 1); temperature 0 takes the most likely id. Returns ids (B,) and their log-probs (B,)."""
    logps = torch.log_softmax(logits / (temperature or 1.0), dim=-1)            # (B, vocab)
    if temperature == 0:
        ids = logps.argmax(dim=-1, keepdim=True)                                # (B, 1)
    else:                               # the first id whose cumulative probability reaches 1 - u,
        # which is above 0: an id of probability 0 is never drawn
        cdf = logps.exp().cumsum(dim=-1)                                        # (B, vocab)
        target = (1 - u[:, None]).to(cdf.dtype) * cdf[:, -1:]                   # (B, 1)
        ids = torch.searchsorted(cdf, target).clamp(max=cdf.shape[1] - 1)       # (B, 1)
    return ids[:, 0], logps.gather(1, ids)[:, 0]

def pad_right(prompts, device):
    """N lists of ids -> ids (N, P), padded at their ends, and lengths (N,)."""
    P = max(len(prompt) for prompt in prompts)
    padded = [prompt + [0] * (P - len(prompt)) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    return torch.tensor(padded, device=device), torch.tensor(lengths, device=device)

def uniform_numbers(seeds, group_size, max_new_tokens):
    """(B, T) numbers in [0, 1), one for each token to be drawn. The rows of prompt i depend on
    seeds[i] alone. Made on the CPU: the same on every device."""
    groups = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed % 2**63)
        groups.append(torch.rand(max_new_tokens, group_size, generator=generator).T)    # (G, T)
    return torch.cat(groups)                                                            # (B, T)

def check_prompts(model, prompts, max_new_tokens, names=None):
    """Raises UserError if one of the prompts (lists of ids) is empty or too long for the model.
    names: what the error calls them."""
    limit = model.config.max_positions
    for i, prompt in enumerate(prompts):
        name = names[i] if names else "the prompt"
        if len(prompt) == 0:
            raise UserError(f"{name} is empty, or the tokenizer knows nothing in it; write another")
        if len(prompt) + max_new_tokens > limit:
            raise UserError(f"{name}: a prompt of {len(prompt)} tokens and --max-new-tokens "
                            f"{max_new_tokens} exceed the model's context of {limit}; lower the "
                            "latter or take the prompt out")

class RecordedStep:
    """`model.hidden` for one token per row, recorded as a CUDA graph: launching the hundreds of
    short kernels of a decode step takes longer than running them. The graph reads fixed tensors,
    into which each call copies what is new. Recorded anew when the number of rows changes."""

    def __init__(self, model):
        self.model = model
        self.fixed = None

    def __call__(self, ids, cache, S):
        cache.read_all_slots = True                         # no shape may grow with the cache
        cache.reserve(1)
        inputs = [ids, cache.positions(), cache.mask(), S, cache.slots]
        if self.fixed is None or len(self.fixed[0]) != len(ids):
            self.record(inputs, cache)
        if self.graph is None:                              # recording has failed
            return self.model.layers(*inputs[:3], cache, S)
        for fixed, new in zip(self.fixed, inputs):
            if new is not None:
                fixed.copy_(new)
        self.graph.replay()
        return self.hidden

    def record(self, inputs, cache):
        self.fixed = [None if x is None else x.clone() for x in inputs]
        ids, positions, mask, S, cache.slots = self.fixed  # so that the graph writes to fixed slots
        try:
            self.model.layers(ids, positions, mask, cache, S)       # loads the kernels
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):              # runs nothing, notes down all kernels
                self.hidden = self.model.layers(ids, positions, mask, cache, S)
        except RuntimeError as error:
            warnings.warn(f"decoding goes on without a CUDA graph, more slowly: {error}")
            self.graph = None

@torch.inference_mode()
def generate(model, encoder, prompts, group_size=1, *, max_new_tokens, window=0, evict_ratio=0.25,
             temperature=1.0, seeds=None, progress="", on_token=None):
    """Samples group_size responses to each of N prompts (lists of ids). Returns a Rollout.

    encoder: a ThoughtEncoder attached to the model, or None for the model as it is. seeds: N
    integers, 0 ... N-1 if None. progress: title of a tqdm bar. on_token(ids (b,), evicting): called
    in every step. Raises UserError for prompts that are empty or too long for the model."""
    check_prompts(model, prompts, max_new_tokens)
    if max_new_tokens < 1 or not (temperature == 0 or 0.01 <= temperature <= 100):
        raise UserError("--max-new-tokens must be 1 or more, --temperature 0 or from 0.01 to 100")
    device = model.embedding.weight.device
    prompt_ids, prompt_lengths = pad_right(prompts, device)                     # (N, P), (N,)
    N, P = prompt_ids.shape
    B = N * group_size
    E = eviction_size(window, evict_ratio)
    prompt_of = torch.arange(N, device=device).repeat_interleave(group_size)    # (B,)
    uniform = uniform_numbers(seeds or range(N), group_size, max_new_tokens).to(device)
    end_ids = torch.tensor(model.config.eos_ids, dtype=torch.long, device=device)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(B, max_new_tokens, device=device)
    rows = torch.arange(B, device=device)               # (b,) those that are still in the batch
    # To see which rows have ended, the host must wait for the GPU: so it looks every 16 tokens.
    check_every = 1 if on_token or device.type == "cpu" else 16

    cache = SlidingCache(model.config.n_layers, prompt_lengths, P, window, E, max_new_tokens)
    memory = encoder.initial_memory() if encoder else None                      # (L, 1, R, R)
    S = encoder.state(memory) if encoder else None
    hidden = model.hidden(prompt_ids, cache, S)                                 # (N, P, C)
    hidden = hidden[torch.arange(N, device=device), prompt_lengths - 1]         # (N, C)
    cache.expand_prompts(prompt_of)
    cache_mb = cache.megabytes
    hidden = hidden[prompt_of]                                                  # (B, C)
    memory = memory.expand(-1, B, -1, -1) if encoder else None                  # (L, B, R, R)
    next_hidden = RecordedStep(model) if hidden.is_cuda else model.hidden

    for t in tqdm(range(max_new_tokens), desc=progress, disable=not progress, leave=False):
        drawn, logp = sample(model.logits(hidden), temperature, uniform[rows, t])       # (b,)
        tokens[rows, t] = drawn
        logps[rows, t] = logp
        n_left = len(rows)
        if (t + 1) % check_every == 0:
            new = tokens[rows, t + 1 - check_every:t + 1]                   # (b, check_every)
            ended = torch.isin(new, end_ids).any(dim=1)                     # (b,)
            left = (~ended).nonzero()[:, 0]                                 # (n_left,)
            n_left = len(left)
        is_last = n_left == 0 or t + 1 == max_new_tokens
        evicting = cache.is_full and not is_last
        if on_token:
            on_token(drawn, evicting)
        if is_last:
            break
        if n_left < len(rows):                              # finished rows leave the batch
            rows = rows[left]                                               # (b,), now n_left
            drawn = drawn[left]                                             # (b,)
            cache.select_rows(left)
            memory = memory[:, left] if encoder else None                   # (L, b, R, R)
        if evicting:
            K_e, V_e, positions = cache.evict()
            if encoder:
                memory, _ = encoder.update(memory, K_e, V_e, positions)         # (L, b, R, R)
        S = encoder.state(memory) if encoder else None
        hidden = next_hidden(drawn[:, None], cache, S)[:, 0]                            # (b, C)

    tokens = tokens[:, :t + 1]
    is_end = torch.isin(tokens, end_ids)                                            # (B, T)
    ended = is_end.any(dim=1)                                                       # (B,)
    first_end = is_end.int().argmax(dim=1)                                          # (B,)
    lengths = torch.where(ended, first_end + 1, t + 1)                              # (B,)
    result = prompt_ids, prompt_lengths, prompt_of, tokens, lengths, logps[:, :t + 1], ended
    with torch.inference_mode(False):                       # copies that autograd accepts
        return Rollout(*[x.clone() for x in result], window, E, temperature, cache_mb)

def generate_in_parts(model, encoder, prompts, group_size, *, rollout_batch, seeds, **settings):
    """`generate` for so many prompts at a time that at most rollout_batch rows (or one group) are
    decoded together. Up to rounding the Rollout does not depend on rollout_batch."""
    n = max(1, rollout_batch // group_size)
    parts = []
    for i in range(0, len(prompts), n):
        parts.append(generate(model, encoder, prompts[i:i + n], group_size, seeds=seeds[i:i + n],
                              **settings))
    joined = {}
    for f in fields(Rollout):
        values = [getattr(part, f.name) for part in parts]
        joined[f.name] = max(values) if f.type is not torch.Tensor else join(values)
    prompt_of = torch.arange(len(joined["lengths"]), device=joined["lengths"].device) // group_size
    return Rollout(**{**joined, "prompt_of": prompt_of})

def join(tensors):
    """Puts tensors (b_i, ...) below each other. Those of two dimensions are padded at the end."""
    if tensors[0].dim() == 2:
        width = max(x.shape[1] for x in tensors)
        tensors = [F.pad(x, (0, width - x.shape[1])) for x in tensors]
    return torch.cat(tensors)                                           # (sum of b_i, ...)

# ----------------------------------------------------------- a look inside the memory of a response

@torch.inference_mode()
def inspect_memory(model, encoder, rollout):
    """Goes through a response again, in n + 1 rows that differ in their memory: row 0 as it was
    sampled, row j without its j-th eviction.

    Returns logps (n + 1, T) of the response's tokens, and for each eviction a dict: "tokens", what
    left (ids); "cosine" of S before and after, and "size", |written| / |memory before|, one for
    each layer; "taken" (E,), the share of the queries whose answer is largest for each of these
    tokens, times its gate."""
    assert len(rollout.lengths) == 1
    ids = rollout.tokens[0, :rollout.lengths[0]]                                    # (T,)
    n = rollout.n_evictions()[0].item()
    rows = torch.arange(n + 1, device=ids.device)
    cache = SlidingCache(model.config.n_layers, rollout.prompt_lengths, rollout.prompt_ids.shape[1],
                         rollout.window, rollout.evict_size, len(ids))
    memory = encoder.initial_memory()                                               # (L, 1, R, R)
    hidden = model.hidden(rollout.prompt_ids, cache, encoder.state(memory))[:, -1]  # (1, C)
    cache.expand_prompts(rows * 0)
    memory = memory.expand(-1, n + 1, -1, -1)                                   # (L, n + 1, R, R)
    hidden = hidden.expand(n + 1, -1)                                           # (n + 1, C)
    logps = []
    evictions = []
    for token in ids:
        logps.append(torch.log_softmax(model.logits(hidden), dim=-1)[:, token])     # (n + 1,)
        if len(logps) == len(ids):
            break
        if cache.is_full:
            leaving = cache.token_at[cache.slots_to_evict()] - cache.P              # (E,)
            K_e, V_e, positions = cache.evict()
            updated, write = encoder.update(memory, K_e, V_e, positions)
            q, _, answer, gate = encoder.project(K_e[:, :1], V_e[:, :1], positions[:1])
            taken = (answer @ q.mT).abs() * (1 if gate is None else gate)           # (L, 1, E, R)
            most = taken.argmax(dim=2).flatten().bincount(minlength=len(leaving))   # (E,)
            before = encoder.state(memory)[:, 0]                                    # (L, R, R)
            after = encoder.state(updated)[:, 0]                                    # (L, R, R)
            size = memory[:, 0].norm(dim=(1, 2)).clamp(min=1e-9)                    # (L,)
            evictions.append({
                "tokens": ids[leaving.to(ids.device)].tolist(),
                "cosine": F.cosine_similarity(before, after, dim=-1).mean(dim=-1).tolist(),
                "size": (write[:, 0].norm(dim=(1, 2)) / size).tolist(),
                "taken": (most / most.sum()).tolist()})
            skips = (rows == len(evictions))[:, None, None]             # row j skips eviction j
            memory = torch.where(skips, memory, updated)                        # (L, n + 1, R, R)
        hidden = model.hidden(token.expand(n + 1, 1), cache, encoder.state(memory))[:, 0]
    return torch.stack(logps, dim=1), evictions

def show_memory(model, encoder, tokenizer, rollout, plot=""):
    """Prints what each eviction did to the memory, and what the response loses without it."""
    if encoder is None or encoder.adapter != "pte" or rollout.n_evictions()[0] == 0:
        raise UserError("--show-memory needs a --run with a memory (--adapter pte) and a response "
                        "longer than its --window")
    logps, evictions = inspect_memory(model, encoder, rollout)
    probabilities = logps.exp().cpu()                                               # (n + 1, T)
    texts = [tokenizer.decode([i]) for i in rollout.tokens[0].tolist()]
    for j, eviction in enumerate(evictions, start=1):
        left = [f"{tokenizer.decode([i])!r} {share:.0%}"
                for i, share in zip(eviction["tokens"], eviction["taken"])]
        print(f"eviction {j}: {tokenizer.decode(eviction['tokens'])!r} left. Share of queries that "
              f"took most from each token: {', '.join(left)}")
        for name in ("size", "cosine"):
            print(f"    {name} by layer: {' '.join(f'{x:.2f}' for x in eviction[name])}")
        drop = probabilities[0] - probabilities[j]                                  # (T,)
        worst = [f"{texts[t]!r} (token {t}) {probabilities[0, t]:.0%} -> {probabilities[j, t]:.0%}"
                 for t in drop.argsort(descending=True)[:3].tolist() if drop[t] > 0.01]
        print(f"    without it: {', '.join(worst) or 'no token loses more than 1 point'}")
    if plot:
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(figsize=(0.3 * len(texts) + 2, 0.3 * len(evictions) + 2))
        image = axes.imshow(probabilities[1:] - probabilities[0], vmin=-1, vmax=1, cmap="RdBu")
        axes.set_xticks(range(len(texts)), texts)
        labels = [tokenizer.decode(eviction["tokens"]) for eviction in evictions]
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel="token of the response", ylabel="eviction left out of the memory")
        figure.colorbar(image, label="change of the token's probability")
        figure.savefig(plot, bbox_inches="tight")

# ------------------------------------------------------------------- the command line: a chat

def parse_args():
    parser = ArgumentParser(description="Chat with a model under a bounded KV cache. The response "
                                        "goes to stdout, everything else to stderr.")
    add = parser.add_argument
    add("--model", default="", help="model folder, or an id on the Hugging Face hub")
    add("--run", default="", help="run folder of train.py: its model, adapter and window")
    add("--prompt", required=True, help="what to say to the model")
    add("--raw", action="store_true", help="take the prompt as it is, without the chat format")
    add("--system", help="system message of the chat format; default: the run's")
    add("--template-args", help="JSON for the chat template; default: the run's")
    add("--window", type=int, help="W, response tokens kept, 0: all; default: the run's, else 0")
    add("--evict-ratio", type=float, help="share of W that leaves at once; default: 0.25")
    add("--max-new-tokens", type=int, help="longest response; default: the run's, else 256")
    add("--temperature", type=float, default=0.7, help="of sampling; 0: the most likely token")
    add("--seed", type=int, default=0, help="makes a response repeatable")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--show-evictions", action="store_true", help="mark on stderr where tokens leave")
    add("--show-memory", action="store_true", help="what each eviction did to the memory")
    add("--plot", default="", help="FILE.png: the same as a picture (pip install matplotlib)")
    return parser.parse_args()

def main():
    args = parse_args()
    if args.run:
        model, encoder, tokenizer, config = load_run(args.run, args.model, args.device, args.dtype)
    elif args.model:
        model, tokenizer = load_model(args.model, args.device, args.dtype)
        encoder = None
        config = {"window": 0, "evict_ratio": 0.25, "max_new_tokens": 256}
    else:
        raise UserError("give --model DIR (a model folder) or --run RUN (a run of train.py)")
    config |= {name: value for name, value in vars(args).items() if value is not None}
    set_chat_format(tokenizer, config)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens

    def show(ids, evicting):
        if ids[0].item() not in model.config.eos_ids:
            print(decoder.decode(tokenizer.decode_bytes(ids.tolist())), end="", flush=True)
        if evicting and args.show_evictions:
            E = eviction_size(config["window"], config["evict_ratio"])
            print(f"[-{E}]", end="", file=sys.stderr, flush=True)

    start = time.time()
    rollout = generate(
        model, encoder, [tokenizer.prompt(args.prompt, args.raw)], window=config["window"],
        evict_ratio=config["evict_ratio"], max_new_tokens=config["max_new_tokens"],
        temperature=args.temperature, seeds=[args.seed], on_token=show)
    print(decoder.decode(b"", final=True), flush=True)
    n_tokens = rollout.lengths[0].item()
    print(f"{n_tokens} tokens, {n_tokens / (time.time() - start):.1f} tokens/s, "
          f"{rollout.n_evictions()[0].item()} evictions, cache {rollout.cache_mb:.3f} MB",
          file=sys.stderr)
    if args.show_memory or args.plot:
        show_memory(model, encoder, tokenizer, rollout, args.plot)

if __name__ == "__main__":
    run_script(main)
