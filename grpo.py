"""grpo.py: one step of GRPO, given rollouts and their rewards; one supervised step, given texts.

Group Relative Policy Optimisation. For the G responses to one prompt and their rewards,

    advantage = (reward - mean reward) / (std of rewards + eps)         of the group
    ratio     = pi_new(y_t | C_t, S_t) / pi_old(y_t | C_t, S_t)
    loss      = 1/n_tokens * sum over rows and tokens of
                - min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)
                + kl_coef * KL(pi_new || base model)

Both policies are those of the window and the state. n_tokens counts the whole step, so the gradient
does not depend on how the rows are split into micro-batches.

Replay (paper, section 3; the details are ours). Between two evictions the state and what is cached
stay the same, so a response is replayed in segments, each one causal forward pass:

    tokens     0 ... W-1   |   W ... W+E-1   |   W+E ... W+2E-1   |  ...
    state        S_0       |       S_1       |        S_2         |

A segment reads the keys and values that earlier segments have cached, made under their own states.
They are never made anew under a newer state: that is why the ratio is 1 before the first update
(`logp_gap` measures it). They are constants (no gradient flows through them into an earlier
segment), so each segment has its own backward pass, after which its activations are freed.

The gradient of the encoder (h_g, q_g, W_Q ...) is nevertheless exact, given these constants. S_j
enters its segment as a leaf, which collects the gradient of the loss: R x R numbers per layer and
row. At the end one backward pass through the short chain S_0 -> S_1 -> S_2 ... carries it on to the
parameters. For that only the memories and the evicted keys and values are kept.

What differs from other GRPO code:
1. The loss is DAPO's mean over the tokens of the step, not GRPO's mean over responses of means
   over tokens, and the clip is DAPO's (0.2 below, 0.28 above). loss = "dr_grpo" divides by a
   constant length instead, and its advantages have no std.
2. Rows with advantage 0 count in n_tokens, but are not replayed: their gradient is zero.
3. With one update per rollout the ratio is 1 and the clip never acts: the loss is REINFORCE with a
   group baseline. The replay's own log-probs are then the old ones, because in bfloat16 those of
   the rollout differ by rounding (logp_gap 0.01 to 0.3). With --inner-epochs 2 the clip acts, and
   in bfloat16 this rounding is in the ratio.

Left out: a value network, importance weights for a foreign sampler, asynchronous rollouts.

Try it:  python train.py --inner-epochs 2
"""
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cache import SlidingCache

# ------------------------------------------------------------------------------ advantages and loss

def group_advantages(rewards, group_size, use_std=True, eps=1e-4):
    """rewards (N * G,) -> advantages (N * G,): reward minus mean of its group, over the group's
    (population) std. Rewards that differ by no more than rounding count as equal: advantage 0.

    use_std=False is Dr. GRPO's: the std favours prompts that are nearly always or never solved."""
    groups = rewards.view(-1, group_size)                                       # (N, G)
    centred = groups - groups.mean(dim=1, keepdim=True)                         # (N, G)
    rounding = 1e-6 * groups.abs().amax(dim=1, keepdim=True)                    # (N, 1)
    centred = torch.where(centred.abs() <= rounding, 0.0, centred)
    if use_std:
        centred = centred / (groups.std(dim=1, keepdim=True, correction=0) + eps)
    return centred.flatten()                                                    # (N * G,)

def policy_loss(logps, old_logps, advantages, clip_low, clip_high):
    """-min(r A, clip(r) A) of each token, (b, t), and where the clip has removed the gradient.

    logps, old_logps (b, t), advantages (b, 1). The minimum works for both signs of A: a good
    token is not pushed above 1 + clip_high, a bad one not below 1 - clip_low."""
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return loss, clipped * advantages < ratio * advantages

def kl_to_reference(logps, reference_logps):
    """The k3 estimator of KL(policy || reference), for each token: exp(d) - d - 1 >= 0."""
    d = reference_logps - logps
    return d.exp() - d - 1

# ---------------------------------------------------------------------------------------- log-probs

def token_logps(model, hidden, tokens, temperature, chunk_bytes=1 << 28):
    """log-probs (b, t) of tokens (b, t), given the hidden states (b, t, C) that predict them.

    Logits are the largest tensors of all (150,000 ids in Qwen). So they are made for a few tokens
    at a time, and made again in the backward pass (checkpoint)."""
    def score(hidden, tokens):                                      # (n, C), (n,) -> (n,)
        logits = model.logits(hidden).div_(temperature or 1.0)      # (n, vocab)
        return -F.cross_entropy(logits, tokens, reduction="none")

    chunk = max(1, chunk_bytes // (4 * model.config.vocab_size))    # tokens whose logits fit
    hidden_chunks = hidden.flatten(0, 1).split(chunk)
    token_chunks = tokens.flatten().split(chunk)
    scores = []
    for h, y in zip(hidden_chunks, token_chunks):
        scores.append(checkpoint(score, h, y, use_reentrant=False))
    return torch.cat(scores).view(tokens.shape)

@torch.no_grad()
def reference_logps(model, rollout, rows):
    """log-probs (b, T) of the base model, without adapter and with a full cache: the KL's
    reference."""
    T = int(rollout.lengths[rows].max())
    prompt_of = rollout.prompt_of[rows]
    tokens = rollout.tokens[rows, :T]                                           # (b, T)
    steps = torch.arange(T, device=tokens.device)                               # (T,)
    positions = rollout.prompt_lengths[prompt_of][:, None] + steps              # (b, T)
    ids = F.pad(rollout.prompt_ids[prompt_of], (0, T))                          # (b, P + T)
    ids = ids.scatter(1, positions, tokens)               # the response right behind its own prompt
    hidden = model.hidden(ids)                                                  # (b, P + T, C)
    index = (positions - 1)[..., None].expand(-1, -1, hidden.shape[2])            # (b, T, C)
    return token_logps(model, hidden.gather(1, index), tokens, rollout.temperature)

# ------------------------------------------------------------------------------------------- replay

def segments(n_written, window, evict_size):
    """The spans (start, stop) of response tokens between two evictions: [0, W), [W, W+E), ..."""
    if window == 0:
        return [(0, n_written)]
    spans = [(0, min(window, n_written))]
    while spans[-1][1] < n_written:
        start = spans[-1][1]
        spans.append((start, min(start + evict_size, n_written)))
    return spans

def replay_and_backward(model, encoder, rollout, rows, token_loss, truncate_memory=False):
    """Replays rows (b,) of a rollout under the present weights, segment by segment, and adds the
    gradient of their loss to .grad.

    token_loss(logps (b, t), columns) -> scalar: the loss of the tokens in these columns (a slice).
    It is called once per segment, and its result goes backward at once.
    truncate_memory: the gradient of a segment goes through the eviction before it and no further.
    Then nothing is kept between segments: a long response needs no more memory than a short one.

    Returns sums over the evictions of all rows, a tensor: the mean |written| / |memory before|, the
    mean cosine of the memory before and after, and the number of evictions."""
    T = int(rollout.lengths[rows].max())
    tokens = rollout.tokens[rows, :T]                                           # (b, T)
    prompts, prompt_of = rollout.prompt_of[rows].unique(return_inverse=True)    # (n,), (b,)
    prompt_lengths = rollout.prompt_lengths[prompts]                            # (n,)
    prompt_ids = rollout.prompt_ids[prompts, :int(prompt_lengths.max())]        # (n, P)
    cache = SlidingCache(model.config.n_layers, prompt_lengths, prompt_ids.shape[1],
                         rollout.window, rollout.evict_size, rollout.tokens.shape[1])
    memory = encoder.initial_memory()                                           # (L, 1, R, R)
    changes = torch.zeros(3, device=rows.device)
    states = []
    leaves = []
    # The last token is predicted but never written, so T - 1 tokens go through the model.
    for start, stop in segments(T - 1, rollout.window, rollout.evict_size):
        if start > 0:
            cache.detach()
            if truncate_memory:
                memory = memory.detach()
            before = memory
            memory, write = encoder.update(before, *cache.evict())              # (L, b, R, R)
            is_running = rollout.lengths[rows] - 1 > start                      # (b,)
            changes += (memory_change(before, write, memory) * is_running[:, None]).sum(dim=0)
        S = encoder.state(memory)
        leaf = S.detach().requires_grad_(S.requires_grad)       # this segment's graph ends here
        columns = slice(start + 1, stop + 1)                    # token n predicts token n + 1
        parts = []
        if start == 0:                                          # and the prompt predicts token 0
            columns = slice(0, stop + 1)
            hidden = model.hidden(prompt_ids, cache, leaf)                      # (n, P, C)
            last = hidden[torch.arange(len(prompts), device=rows.device), prompt_lengths - 1]
            parts.append(last[prompt_of][:, None])                              # (b, 1, C)
            cache.expand_prompts(prompt_of)
        if stop > start:
            parts.append(model.hidden(tokens[:, start:stop], cache, leaf))
        hidden = torch.cat(parts, dim=1)                                        # (b, t, C)
        logps = token_logps(model, hidden, tokens[:, columns], rollout.temperature)     # (b, t)
        token_loss(logps, columns).backward()
        if S.requires_grad and truncate_memory:
            S.backward(leaf.grad)
        elif S.requires_grad:
            states.append(S)
            leaves.append(leaf)
    if states:
        torch.autograd.backward(states, [leaf.grad for leaf in leaves])
    return changes

@torch.no_grad()
def memory_change(before, write, after):
    """What an eviction did to each row's memory, (b, 3): |written| / |memory before| and the cosine
    of the memory before and after, means over layers and rows of the memory; and 1, to count."""
    size = before.norm(dim=-1)                                                  # (L, b or 1, R)
    ratio = torch.where(size > 0, write.norm(dim=-1) / size, 0)                 # (L, b, R)
    cosine = F.cosine_similarity(before, after, dim=-1)                         # (L, b, R)
    return torch.stack([ratio.mean(dim=(0, 2)), cosine.mean(dim=(0, 2)),
                        torch.ones_like(ratio[0, :, 0])], dim=1)                # (b, 3)

def micro_batches(rollout, advantages, max_tokens, all_rows=False):
    """Splits the rows whose advantage is not zero into micro-batches (lists of row numbers), the
    longest first, so that a segment of each has at most max_tokens response tokens (or one row).

    all_rows: rows of advantage zero too (a KL term has a gradient for them). There is always at
    least one row, so that logp_gap is measured in every step."""
    order = rollout.lengths.argsort(descending=True, stable=True)               # (B,)
    rows = order if all_rows else order[advantages[order] != 0]
    if len(rows) == 0:
        rows = order[:1]
    batches = []
    while len(rows) > 0:
        longest = int(rollout.lengths[rows[0]])
        segment = min(longest, rollout.window) if rollout.window else longest
        n_rows = max(1, max_tokens // segment)
        batches.append(rows[:n_rows])
        rows = rows[n_rows:]
    return batches

# --------------------------------------------------------------------------------- one step of GRPO

def backward(model, encoder, rollout, advantages, rows, n_tokens, config):
    """Adds the gradient of these rows' part of the loss to .grad. n_tokens: as in the loss above.

    Returns a tensor with the sums of loss, KL, clipped tokens and tokens, then those of
    `replay_and_backward`; and the largest |log-prob of the replay - log-prob of the rollout|."""
    device = rollout.tokens.device
    sums = torch.zeros(4, device=device)
    gaps = []
    reference = reference_logps(model, rollout, rows) if config.kl_coef else None       # (b, T)

    def token_loss(logps, columns):
        old_logps = rollout.logps[rows, columns]                                # (b, t)
        mask = response_mask(rollout, rows, columns)                            # (b, t)
        logps = torch.where(mask, logps, old_logps)      # after the end: ratio 1, whatever is there
        gaps.append((logps - old_logps).abs().max().detach())
        if config.inner_epochs == 1:                            # nothing has changed since the
            old_logps = logps.detach()                          # rollout: the ratio is exactly 1
        loss, clipped = policy_loss(logps, old_logps, advantages[rows, None],
                                    config.clip_low, config.clip_high)
        kl = torch.zeros_like(loss)
        if reference is not None:
            kl = kl_to_reference(logps, reference[:, columns])
            loss = loss + config.kl_coef * kl
        loss = (loss * mask).sum() / n_tokens
        parts = [loss, (kl * mask).sum(), (clipped & mask).sum(), mask.sum()]
        sums.add_(torch.stack(parts).detach())
        return loss

    changes = replay_and_backward(model, encoder, rollout, rows, token_loss,
                                  bool(config.truncate_memory))
    return torch.cat([sums, changes]), torch.stack(gaps).max()

def response_mask(rollout, rows, columns):
    """(b, t) True for the tokens of rows (b,) up to the end token, included. columns: a slice."""
    numbers = torch.arange(columns.start, columns.stop, device=rows.device)     # (t,)
    return numbers < rollout.lengths[rows, None]                                # (b, t)

def update_weights(encoder, optimizer, loss, config, all_reduce):
    """Adds up the gradients of all processes and takes a step, unless loss or gradient are not
    finite. Returns the norms of the gradient before clipping, and whether it was skipped."""
    for parameter in encoder.trainable_parameters():
        all_reduce(parameter.grad)
    norms = []
    for parameters in (encoder.parameters(recurse=False), encoder.linears.parameters()):
        grads = [p.grad for p in parameters if p.grad is not None]      # the frozen base has none
        norms.append(torch.stack([grad.norm() for grad in grads]).norm() if grads else 0.0)
    norms.append(torch.nn.utils.clip_grad_norm_(encoder.trainable_parameters(),
                                                config.max_grad_norm))
    of_encoder, of_linears, of_all = [float(norm) for norm in norms]
    finite = math.isfinite(of_all) and math.isfinite(loss)
    if finite:
        optimizer.step()
    return {"grad_norm": of_all, "grad_norm_encoder": of_encoder, "grad_norm_linears": of_linears,
            "skipped": not finite}

def zero_gradients(encoder):
    for parameter in encoder.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)

def memory_metrics(changes):
    """The sums that `replay_and_backward` returns, a list -> metrics."""
    write, cosine, n_evictions = changes
    return {"memory_write": write / max(n_evictions, 1),
            "memory_cosine": cosine / max(n_evictions, 1)}

def grpo_step(model, encoder, optimizer, rollout, rewards, config, all_reduce=lambda tensor: None):
    """Updates the adapter from a rollout and its rewards (B,). Returns metrics, a dict of numbers.

    config: any object with the attributes used here (train.Config). all_reduce(tensor) adds up a
    tensor over all processes, in place. An update whose gradient is not finite is skipped.
    kl and ratio_clipped are means over replayed tokens; logp_gap is of this process."""
    advantages = group_advantages(rewards, config.group_size, use_std=config.loss == "grpo")
    if config.loss == "dr_grpo":
        n_tokens = torch.tensor(float(len(rewards) * config.max_new_tokens), device=rewards.device)
    else:
        n_tokens = rollout.lengths.sum().float()
    all_reduce(n_tokens)
    batches = micro_batches(rollout, advantages, config.micro_batch, all_rows=config.kl_coef > 0)
    metrics = {"spread": (advantages != 0).float().mean().item()}   # rows that teach
    for epoch in range(config.inner_epochs):
        zero_gradients(encoder)
        sums = torch.zeros(7, device=rewards.device)
        gaps = []
        for rows in batches:
            part, gap = backward(model, encoder, rollout, advantages, rows, n_tokens, config)
            sums += part
            gaps.append(gap)
        all_reduce(sums)
        loss, kl, clipped, n_replayed, *changes = sums.tolist()
        if epoch == 0:                                     # later the weights are not the rollout's
            metrics["logp_gap"] = torch.stack(gaps).max().item()
        metrics |= {"loss": loss, "kl": kl / n_replayed, "ratio_clipped": clipped / n_replayed}
        metrics |= memory_metrics(changes)
        metrics |= update_weights(encoder, optimizer, loss, config, all_reduce)
    return metrics

# ------------------------------------------------------------------------------ one supervised step

def sft_step(model, encoder, optimizer, rollout, config, all_reduce=lambda tensor: None):
    """Updates the adapter so that given responses become more likely: cross-entropy, under the same
    window and through the same segments. rollout: as `given_responses` makes it from texts.
    Returns metrics."""
    n_tokens = rollout.lengths.sum().float()
    all_reduce(n_tokens)
    zero_gradients(encoder)
    sums = torch.zeros(4, device=n_tokens.device)
    for rows in micro_batches(rollout, None, config.micro_batch, all_rows=True):
        def token_loss(logps, columns):
            mask = response_mask(rollout, rows, columns)                        # (b, t)
            loss = -(logps * mask).sum() / n_tokens
            sums[0] += loss.detach()
            return loss

        sums[1:] += replay_and_backward(model, encoder, rollout, rows, token_loss,
                                        bool(config.truncate_memory))
    all_reduce(sums)
    loss, *changes = sums.tolist()
    metrics = {"loss": loss} | memory_metrics(changes)
    return metrics | update_weights(encoder, optimizer, loss, config, all_reduce)
