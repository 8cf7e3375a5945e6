"""cache.py: the sliding KV cache: what is kept, and what leaves when it is full.

Every token is drawn from pi(y_t | C_t, S_t): C_t is what this file keeps, S_t what encoder.py made
of the tokens that have left (paper, section 3). Per layer one buffer for keys and one for values:

    slot     0 ... P-1                P ... P+W-1
            [ prompt, never evicted ][ at most W response tokens ]

When all W response slots are taken and one more token is to be written, the oldest E leave: `evict`
hands out their keys and values, and the next E tokens take their slots. So the W slots are a ring:
the n-th response token (from 0) lies in slot P + (n mod W). `window = 0` is the full cache: its
ring never fills.

Three facts keep this simple:
- Attention does not care in which slot a key lies: its position is in the key itself (RoPE).
  A key keeps the position that it was written with.
- Evictions depend on the number of response tokens only. All rows of a batch evict at the same
  step, however long their prompts are, and an eviction changes no shape.
- One small table, `token_at`, says which token lies in which slot. Slots and mask follow from it.

Left out: eviction by attention scores (H2O, PyramidKV, HeadKV), StreamingLLM's positions within
the cache, paging, quantised keys.

Try it:  python rollout.py --model DIR --prompt "Tell me a story." --window 64 --show-evictions
"""
import torch

from model import UserError

def eviction_size(window, evict_ratio):
    """E, the number of tokens that leave at once: window * evict_ratio. 0 for the full cache.

    Raises UserError unless E is a whole number that divides the window: then all segments between
    two evictions have the same length."""
    if window == 0:
        return 0
    exact = window * evict_ratio
    E = round(exact) if 0 < evict_ratio <= 1 else 0
    divides = E >= 1 and window % E == 0
    if not divides or abs(E - exact) > 1e-6:
        raise UserError(
            f"--window {window} --evict-ratio {evict_ratio:g}: {exact:g} tokens would leave at "
            "once, which must be a whole number that divides the window; try --window 16 "
            "--evict-ratio 0.25")
    return E

class SlidingCache:
    """Keys and values of B rows: keys[layer] and values[layer], each (B, KV, P + W, D).

    The N prompts pass through the model once; `expand_prompts` gives every rollout its own row;
    then response tokens pass through, one or several at a time, with `evict` whenever `is_full`.
    In each pass the model calls `reserve`, `positions`, `mask`, then `write` in every layer.

    Tokens have numbers: 0 ... P-1 in the prompt, padded at its end to P, then P, P+1, ..."""

    def __init__(self, n_layers, prompt_lengths, P, window, evict_size, max_new_tokens):
        """prompt_lengths (N,), or (B,) after `expand_prompts`: without pads. P: the width of the
        padded prompts."""
        if window == 0 or window >= max_new_tokens:
            window = max_new_tokens
            evict_size = max_new_tokens
        self.prompt_lengths = prompt_lengths
        self.P = P
        self.W = window
        self.E = evict_size
        self.token_at = torch.full((P + window,), -1)      # slot -> token; -1 is empty. On the CPU
        self.n_tokens = 0                                   # tokens that have had a slot so far
        self.reserved = None                              # (T,) numbers of the tokens to be written
        self.slots = None                                   # (T,) and their slots
        self.keys = [None] * n_layers
        self.values = [None] * n_layers
        self.read_all_slots = False                       # True: read empty slots as well, masked

    # ---- for the model: reserve, positions, mask, write

    def reserve(self, T):
        """Claims slots for the next T tokens. The only method that changes n_tokens."""
        empty = (self.token_at < 0).nonzero()[:, 0]
        assert T <= len(empty), "evict first: too few slots are empty"
        slots = empty[:T]
        tokens = torch.arange(self.n_tokens, self.n_tokens + T)
        self.token_at[slots] = tokens
        self.n_tokens += T
        self.slots = slots.to(self.prompt_lengths.device)
        self.reserved = tokens.to(self.prompt_lengths.device)

    def positions(self):
        """Positions (B, T) of the reserved tokens."""
        return self.positions_of(self.reserved)

    def positions_of(self, tokens):
        """Positions (B, T) of tokens (T,). A response goes on where its own prompt ends."""
        n_pads = self.P - self.prompt_lengths[:, None]                              # (B, 1)
        return tokens - n_pads * (tokens >= self.P)                                 # (B, T)

    def mask(self):
        """(B, 1, T, slots), True where a reserved token may look: at all tokens in the cache up to
        itself, pads left out."""
        token_at = self.token_at[:self.n_slots].to(self.prompt_lengths.device)      # (slots,)
        visible = (token_at >= 0) & (token_at <= self.reserved[:, None])            # (T, slots)
        is_pad = (token_at >= self.prompt_lengths[:, None]) & (token_at < self.P)   # (B, slots)
        return visible & ~is_pad[:, None, None]                                   # (B, 1, T, slots)

    def write(self, layer, k, v):
        """Writes k and v (B, KV, T, D) to the reserved slots; returns all that attention reads,
        (B, KV, slots, D) each."""
        if self.keys[layer] is None:                      # the prompt; expand_prompts adds the ring
            self.keys[layer] = k
            self.values[layer] = v
        else:
            self.keys[layer].index_copy_(2, self.slots, k)
            self.values[layer].index_copy_(2, self.slots, v)
        return self.keys[layer][:, :, :self.n_slots], self.values[layer][:, :, :self.n_slots]

    @property
    def n_slots(self):
        """How many slots attention reads: until the ring is full for the first time, only those on
        the left that have been written."""
        return len(self.token_at) if self.read_all_slots else min(self.n_tokens, len(self.token_at))

    # ---- for rollout and replay: rows, evictions, detach

    def expand_prompts(self, rows):
        """rows (B,): which prompt each rollout continues. (N, KV, P, D) -> (B, KV, P + W, D)"""
        self.prompt_lengths = self.prompt_lengths[rows]
        for buffers in (self.keys, self.values):            # one layer's old buffer at a time
            for layer, prompt in enumerate(buffers):
                ring = prompt.new_zeros(len(rows), prompt.shape[1], self.W, prompt.shape[3])
                buffers[layer] = torch.cat([prompt[rows], ring], dim=2)

    def select_rows(self, rows):
        """Only these rows (b,) go on: (B, KV, P + W, D) -> (b, KV, P + W, D)"""
        self.prompt_lengths = self.prompt_lengths[rows]
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = buffer[rows]

    @property
    def is_full(self):
        """True when E tokens must leave before the next one can be written."""
        return bool((self.token_at >= 0).all())

    def slots_to_evict(self):
        """The eviction rule: the slots (E,) of the oldest E response tokens.

        Another rule goes here. It must return E slots. The replay evicts through this method too,
        so it follows the rule if that depends on nothing but the number of response tokens,
        n_tokens - P. (Random eviction: take that number as the seed.)"""
        oldest_first = self.token_at[self.P:].argsort()
        return self.P + oldest_first[:self.E]

    def evict(self):
        """Frees E slots; returns their keys and values, (L, B, E, KV*D) each, detached, and their
        positions (B, E). The keys are still rotated by these positions."""
        assert self.is_full
        device = self.prompt_lengths.device
        slots = self.slots_to_evict()
        positions = self.positions_of(self.token_at[slots].to(device))            # (B, E)
        self.token_at[slots] = -1
        slots = slots.to(device)
        evicted = []
        for buffers in (self.keys, self.values):
            leaving = torch.stack([x.detach()[:, :, slots] for x in buffers])     # (L, B, KV, E, D)
            evicted.append(leaving.transpose(2, 3).flatten(3))                     # (L, B, E, KV*D)
        return *evicted, positions

    def detach(self):
        """Makes all that is cached a constant: no gradient flows back into earlier segments."""
        self.keys = [x.detach() for x in self.keys]
        self.values = [x.detach() for x in self.values]

    @property
    def megabytes(self):
        """Size of all buffers in MB (10^6 bytes)."""
        return sum(x.nbytes for x in self.keys + self.values) / 1e6
