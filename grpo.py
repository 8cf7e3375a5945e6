"""grpo.py: advantages, the clipped loss, and the replay that makes it trainable at constant memory.

Group Relative Policy Optimisation. For G completions of one prompt with rewards R_i,

    A_i  = (R_i - mean R) / (std R + eps)                      the group is its own baseline
    r    = pi_new(y_t | C_t, S_t) / pi_old(y_t | C_t, S_t)     both of the cache-constrained policy
    loss = - 1/N sum_rows sum_t  min(r A, clip(r, 1 - low, 1 + high) A)  + kl_coef * KL(pi_new || base)

with N the tokens of the whole step, so the gradient does not depend on how rows are split into micro-batches.

Replay (paper, section 3; the details ours). Between two evictions the state S_j and what may be evicted are fixed, so a
rollout is replayed as a few segments, each one causal forward over (kept cache + segment): the first covers the prompt
and W thoughts, each later one E thoughts. Keys and values are carried from the segment that made them, under the state
of that time, and never recomputed under a newer one: that is what makes r exactly 1 before the first update
(`logp_gap` shows it). They are detached, each segment's loss is backpropagated at once, and its activations are freed.

The gradient through the memory is exact all the same: S_j is rebuilt for its segment from the evicted keys and values
(constants, 2 * KV*D numbers a token, all that is kept), so backward runs through S_j -> ... -> S_0 into h_g, W_Q, W_K,
W_V. `truncate = k` rebuilds only the last k evictions; then memory does not depend on the length of the thought at all.

With one update per rollout r is 1, the clip never acts and this is plain policy gradient: `--inner-epochs 2` shows the
clip at work. `train_step`, at the end, puts it all together, on one GPU or several, and tells when a run is not well.
Left out: a value network, importance weights for a foreign sampler, asynchronous rollouts.

Try it:  python train.py --inner-epochs 2
"""
import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cache import SlidingCache, everyone, next_logits, pick_compile, ranks, say
from evaluate import grade
from model import UserError
from rollout import ask, generate


def group_advantages(rewards, group_size, use_std=True, eps=1e-4):
    """rewards (N * G,) -> advantages (N * G,): reward minus the mean of its group, over its (population) std.

    use_std=False is Dr. GRPO's: dividing by the std favours questions that are nearly always or never solved."""
    groups = rewards.view(-1, group_size)                                       # (N, G)
    spread = (groups != groups[:, :1]).any(dim=1, keepdim=True)                 # else a rest of rounding would count
    centred = (groups - groups.mean(dim=1, keepdim=True)) * spread
    if use_std:
        centred = centred / (groups.std(dim=1, keepdim=True, correction=0) + eps)
    return centred.flatten()                                                    # (N * G,)


def overlong_penalty(lengths, max_length, buffer):
    """DAPO's soft punishment: 0 up to max_length - buffer tokens, then down to -1 at max_length. lengths (B,)."""
    return ((max_length - buffer - lengths) / max(buffer, 1)).clamp(-1, 0)


def clipped_loss(logps, old_logps, advantages, clip_low=0.2, clip_high=0.28):
    """-min(r A, clip(r) A) for tokens (b, t) and advantages (b, 1). Returns it and where the clip took the gradient.

    The minimum holds for both signs: a good token is not pushed above 1 + high, a bad one not below 1 - low."""
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages), clipped * advantages < ratio * advantages


def token_logps(model, hidden, tokens, n_ids, chunk=0):
    """log-probs (b, t) of tokens (b, t) given hidden states (b, t, C). Logits are the largest tensor of all (150k ids
    in Qwen): they exist for one chunk of tokens at a time (0: of 256 MB), and again when the backward pass comes."""
    chunk = chunk or max(1, (1 << 26) // n_ids)

    def score(h, y):
        return -F.cross_entropy(next_logits(model, h, n_ids), y, reduction="none")
    parts = zip(hidden.flatten(0, 1).split(chunk), tokens.flatten().split(chunk))
    return torch.cat([checkpoint(score, h, y, use_reentrant=False) for h, y in parts]).view(tokens.shape)


def replay(model, encoder, rollout, rows, truncate=0):
    """Replays rows (b,) of a rollout under the current weights, segment by segment.

    A generator of (logps (b, t), slice of the tokens they belong to, the rows (b,) that they belong to: those with
    tokens there). Backpropagate each before asking for the next: then the graph of one segment exists at a time.
    truncate: evictions the gradient reaches back, 0 for all of them."""
    W, E = rollout.window, rollout.evict_size
    T = int(rollout.lengths[rows].max())
    tokens = rollout.tokens[rows, :T]                                           # (b, T)
    prompts, prompt_of = rollout.prompt_of[rows].unique(return_inverse=True)    # each prompt once
    lengths = rollout.prompt_lengths[prompts]
    cache = SlidingCache(model.config.n_layers, lengths, W, E, rollout.tokens.shape[1])
    U_0 = None                                                                  # memory before `recent`; None: start
    recent = deque()                                                            # evicted (K_e, V_e), oldest first
    done = 0                                                                    # thoughts written so far
    while True:
        # The chain, as the rollout built it: from U_0 by every eviction the gradient may reach.
        U = S = None
        if encoder:
            U = encoder.start() if U_0 is None else U_0
            for leaving in recent:
                U = encoder.write(U, *leaving)
            S = encoder.read(U)
        if done == 0:                                                           # the prompt predicts the first token
            hidden = model.hidden(rollout.prompt_ids[prompts, :lengths.max()], cache, S)  # (N, P, C)
            last = hidden[torch.arange(len(prompts), device=hidden.device), lengths - 1]  # (N, C)
            hidden = last[prompt_of][:, None]                                   # (N, C) -> (b, 1, C)
            cache.spread(prompt_of)
        first, stop = done, min(T - 1, done + (E if done else cache.window))
        if stop > first:                                                        # thought n predicts token n + 1
            fed = model.hidden(tokens[:, first:stop], cache, S)                 # (b, stop - first, C)
            hidden = fed if first else torch.cat([hidden, fed], dim=1)          # (b, tokens of the span, C)
        span = slice(first + 1 if first else 0, stop + 1)
        yield token_logps(model, hidden, tokens[:, span], rollout.n_ids), span, rows
        if stop == T - 1:
            return
        done = stop
        cache.detach()
        on = (rollout.lengths[rows] > done + 1).nonzero()[:, 0]                 # (b,) the others have ended
        if len(on) < len(rows):
            rows, tokens, recent = rows[on], tokens[on], deque((K[:, on], V[:, on]) for K, V in recent)
            U_0 = U_0 if U_0 is None or U_0.shape[1] == 1 else U_0[:, on]       # (L, b, M, R)
            cache.keep(on)
        leaving = cache.evict()
        if encoder:
            recent.append(leaving)
            if truncate and len(recent) > truncate:
                with torch.no_grad():
                    U_0 = encoder.write(encoder.start() if U_0 is None else U_0, *recent.popleft())


@torch.no_grad()
def reference_logps(model, rollout, rows):
    """log-probs (b, T) of the base model, adapter off and full cache: the reference of the KL term."""
    T = int(rollout.lengths[rows].max())
    prompts, lengths = rollout.prompt_ids[rollout.prompt_of[rows]], rollout.prompt_lengths[rollout.prompt_of[rows]]
    ids = F.pad(prompts, (0, T))                                                # (b, P + T)
    columns = lengths[:, None] + torch.arange(T, device=ids.device)             # (b, T): where the thoughts stand
    ids.scatter_(1, columns, rollout.tokens[rows, :T])
    hidden = model.hidden(ids).gather(1, (columns - 1)[..., None].expand(-1, -1, model.config.dim))  # (b, T, C)
    return token_logps(model, hidden, rollout.tokens[rows, :T], rollout.n_ids)


def backward(model, encoder, rollout, advantages, rows, *, total, clip_low=0.2, clip_high=0.28, kl_coef=0.0,
             truncate=0):
    """Adds to .grad the gradient of the loss of these rows; total is the N above, of the whole step.

    advantages (B,) of all rows. Returns sums over the rows' tokens: {"loss", "clipped", "kl", "tokens"}, and "gap", the
    largest |log-prob of the replay - log-prob of the rollout|."""
    device = rollout.tokens.device
    sums = {name: torch.zeros((), device=device) for name in ("loss", "clipped", "kl", "tokens", "gap")}
    reference = reference_logps(model, rollout, rows) if kl_coef else None
    everything = rows
    for logps, span, rows in replay(model, encoder, rollout, everything, truncate):
        columns = torch.arange(span.start, span.stop, device=device)
        mask = columns < rollout.lengths[rows, None]                            # (b, t): the end token counts, no more
        old = rollout.logps[rows, span]
        loss, clipped = clipped_loss(logps, old, advantages[rows, None], clip_low, clip_high)
        if kl_coef:
            d = reference[torch.isin(everything, rows)][:, span] - logps        # k3: exp(d) - d - 1 >= 0
            kl = d.exp() - d - 1
            loss = loss + kl_coef * kl
            sums["kl"] += (kl * mask).sum().detach()
        loss = (loss * mask).sum() / total
        loss.backward()
        sums["loss"] += loss.detach()
        sums["clipped"] += (clipped & mask).sum()
        sums["tokens"] += mask.sum()
        sums["gap"] = torch.maximum(sums["gap"], ((logps - old).abs() * mask).max().detach())
    return {name: value.item() for name, value in sums.items()}


def segment_thoughts(rollout, length):
    """How many thoughts of a row of that length its first segment holds, the longest of all."""
    return min(int(length), rollout.window or rollout.tokens.shape[1])


def micro_batches(rollout, advantages, most, everything=False):
    """Splits the rows that have something to say into lists of rows of like length, the longest first, so that one
    segment of a replay holds at most `most` thoughts (but at least one row).

    A row of advantage 0 (its group has no spread) adds nothing to the gradient and is left out, unless `everything`
    (a KL term speaks for every row); if no row is left the longest is kept, so that logp_gap is always measured."""
    order = rollout.lengths.argsort(descending=True, stable=True)
    rows = order if everything else order[advantages[order] != 0]
    rows, batches = rows if len(rows) else order[:1], []
    while len(rows):
        batches.append(rows[:max(1, most // segment_thoughts(rollout, rollout.lengths[rows[0]]))])
        rows = rows[len(batches[-1]):]
    return batches


def largest_micro_batch(model, encoder, rollout, truncate=0):
    """The most thoughts that one segment may hold, so that what autograd keeps for it fills half of the memory that is
    free on a GPU, or that a computer has. Measured: the longest row is replayed, and what it keeps is counted."""
    weights, kept, most = {p.data_ptr() for p in model.parameters()}, {}, 0

    def count(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() * (x.data_ptr() not in weights)
        return x
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        for _ in replay(model, encoder, rollout, rollout.lengths.argmax()[None], truncate):
            most = max(most, sum(kept.values()))                                # bytes, of the dearest segment
            kept.clear()
    if rollout.tokens.is_cuda:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, int(free / 2 / most * segment_thoughts(rollout, rollout.lengths.max())))


# ------------------------------------------------------------------------------------ one step of training

@dataclass
class Health:
    """What a run remembers of the steps behind it, to say when something is wrong; saved with every checkpoint."""
    micro_batch: int              # thoughts that are replayed at once, 0: not measured yet
    skipped: int = 0              # updates in a row whose gradient was not finite
    alike: int = 0                # steps in a row in which no group had two different rewards
    warned: bool = False          # of a logp_gap that rounding does not explain

    def look(self, step, gap, spread, finite, limit):
        """Takes note of a step, and says on stderr what a person should know. Raises UserError if it is over."""
        self.alike, self.skipped = 0 if spread else self.alike + 1, 0 if finite else self.skipped + 1
        if not finite:
            say(f"step {step}: the loss or its gradient is not finite; this update is skipped")
        if self.skipped == 3:
            raise UserError(f"three updates in a row had no finite gradient, step {step} the last: start anew with a "
                            "lower --lr or --max-grad-norm, or --dtype float32")
        if not gap <= limit and not self.warned:                                # not: nan is above everything
            self.warned = True
            say(f"step {step}: logp_gap {gap:.2g} is above {limit}, more than rounding: the replay does not see what "
                "the rollout saw, nothing that is learnt can be trusted; try --compile off, --dtype float32")
        if self.alike == 10:
            say(f"step {step}: for 10 steps all rewards of every group were equal, so nothing is learnt; try easier "
                "problems, a longer --max-new-tokens, a larger --group-size")


def learning_rate(step, c):
    """Rises for `warmup` steps, then falls along a line to 10 % of the peak."""
    return c.lr * min((step + 1) / max(c.warmup, 1), 1 - 0.9 * step / c.steps)


def peak_memory_mb(device):
    """The most memory that was in use, in MB (10^6 bytes): of the GPU in this step; on a CPU, of this process so far
    (None on Windows, which does not tell)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def accumulate(c, model, encoder, optimizer, rollout, advantages, total, health):
    """Makes .grad the gradient of all rows, of all processes; returns what `backward` does, for each micro-batch of
    all. Where a GPU's memory does not suffice, micro-batches are halved. Raises UserError if that does not help."""
    parts = None
    while parts is None:
        optimizer.zero_grad()
        batches = micro_batches(rollout, advantages, health.micro_batch, everything=c.kl_coef > 0)
        try:
            parts = [backward(model, encoder, rollout, advantages, rows, total=total, clip_low=c.clip_low,
                              clip_high=c.clip_high, kl_coef=c.kl_coef, truncate=c.truncate_memory) for rows in batches]
        except torch.OutOfMemoryError:
            largest = max(batches, key=len)
            health.micro_batch = len(largest) * segment_thoughts(rollout, rollout.lengths[largest[0]]) // 2
            if len(largest) == 1:
                raise UserError("out of memory with a single row: lower --window or --max-new-tokens, or give "
                                "--truncate-memory 1") from None
            say(f"out of memory: --micro-batch {health.micro_batch} from here on")
        if parts is None:                                                       # no longer held by the exception
            torch.cuda.empty_cache()
    if ranks()[1] > 1:
        for p in encoder.trainable().values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)                                # a sum: all divide by the same total
    return sum(everyone(parts), [])


def train_step(c, step, model, encoder, tokenizer, optimizer, problems, health):
    """One step of GRPO: roll out, reward, replay, update; each process takes its share of the problems. c: settings,
    see train.Config. Returns the line for metrics.jsonl, and sample records. Raises UserError."""
    start, device, (rank, n) = time.time(), model.embedding.weight.device, ranks()
    share = len(problems) // n
    problems = problems[rank * share:][:share]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prompts = [ask(tokenizer, p["problem"]) for p in problems]
    try:
        rollout = generate(model, encoder, prompts, c.group_size, max_new_tokens=c.max_new_tokens, window=c.window,
                           evict_ratio=c.evict_ratio, n_ids=tokenizer.n_ids, seed=c.seed * 1_000_003 + step,
                           share=(rank, n), compile=pick_compile(c.compile, c.device),
                           progress="" if c.model == "tiny" or rank else f"step {step + 1}: rollout")
    except torch.OutOfMemoryError:
        raise UserError("out of memory in a rollout: lower --prompts, --group-size, --window or --max-new-tokens"
                        ) from None
    texts = [tokenizer.decode([i for i in ids if i not in model.config.eos_ids]) for ids in rollout.completions()]
    correct = torch.tensor([float(grade(problems[b // c.group_size], text)[1]) for b, text in enumerate(texts)],
                           device=device)
    rewards = correct * rollout.ended if c.data == "tally" else correct
    if c.loss == "dapo":
        rewards = rewards + overlong_penalty(rollout.lengths, c.max_new_tokens, c.overlong_buffer)
    advantages = group_advantages(rewards, c.group_size, use_std=c.loss != "dr_grpo")
    counted = rollout.lengths[advantages != 0] if c.loss == "dapo" else rollout.lengths
    total = sum(everyone(len(texts) * c.max_new_tokens if c.loss == "dr_grpo" else int(counted.sum())))

    if not health.micro_batch:
        health.micro_batch = largest_micro_batch(model, encoder, rollout, c.truncate_memory)
        say(f"--micro-batch {health.micro_batch} is the largest that fits")
    gap = None
    for epoch in range(c.inner_epochs):
        parts = accumulate(c, model, encoder, optimizer, rollout, advantages, max(total, 1), health)
        loss, clipped, kl, tokens = (sum(part[name] for part in parts) for name in ("loss", "clipped", "kl", "tokens"))
        gap = np.max([part["gap"] for part in parts]).item() if epoch == 0 else gap     # before the first update
        grad_norm = torch.nn.utils.clip_grad_norm_(encoder.trainable().values(), c.max_grad_norm).item()
        finite = math.isfinite(grad_norm) and math.isfinite(loss)
        if not finite:
            break
        optimizer.param_groups[0]["lr"] = learning_rate(step, c)
        optimizer.step()
    samples = [{"step": step + 1, "prompt": problems[b // c.group_size]["problem"], "response": texts[b],
                "answer": problems[b // c.group_size]["answer"], "reward": rewards[b].item()}
               for b in range(0, min(len(texts), 4 * c.group_size), c.group_size)]
    rows = {"reward": rewards, "accuracy": correct, "response_tokens": rollout.lengths, "truncated": ~rollout.ended,
            "evictions": rollout.evictions(), "spread": advantages != 0}
    shares = everyone(({name: x.tolist() for name, x in rows.items()}, samples, peak_memory_mb(device.type)))
    rows = {name: sum((share[0][name] for share in shares), []) for name in rows}       # of all processes
    limit = 1e-3 if model.norm.weight.dtype == torch.float32 else 0.5           # of rounding, far from it
    health.look(step + 1, gap, any(rows.pop("spread")), finite, limit)
    seconds = time.time() - start
    return {"step": step + 1} | {name: sum(x) / len(x) for name, x in rows.items()} | {
        "loss": loss, "grad_norm": grad_norm, "logp_gap": gap, "ratio_clipped": clipped / tokens, "kl": kl / tokens,
        "skipped": not finite, "tokens_per_second": sum(rows["response_tokens"]) / seconds,
        "peak_memory_mb": max((share[2] or 0) for share in shares) or None, "seconds": seconds
    }, sum((share[1] for share in shares), [])[:4]
