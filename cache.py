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

The same class serves decoding (no gradient: thoughts are written in place) and training (the buffers are replaced by
ones with a graph, until `detach` cuts it between two segments).

Left out: eviction by attention scores (H2O, PyramidKV, HeadKV), paging, quantised keys.

Try it:  python rollout.py --model DIR --prompt "Tell me a story." --window 64 --show-evictions
"""
import torch

from model import UserError


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


class SlidingCache:
    """Keys and values of B rows: `keys[layer]`, `values[layer]`, each (B, KV, P + W, D).

    Life of a cache: the prompts go through the model once (`Transformer.hidden(prompt_ids, cache)`), `spread` gives
    each rollout its row and its ring, then thoughts go through, one or several at a time, with
    `if cache.full: cache.evict()` before each. n counts the thoughts written, `oldest` is the first one still kept.
    """

    def __init__(self, n_layers, prompt_lengths, window, evict, max_thoughts):
        """prompt_lengths: (B,) true lengths of the right-padded prompts. window: W, 0 for max_thoughts of them."""
        self.prompt_lengths = prompt_lengths
        self.window, self.evict_size = window or max_thoughts, evict or max_thoughts
        assert self.window % self.evict_size == 0
        self.P, self.n, self.oldest = None, 0, 0
        self.keys, self.values = [None] * n_layers, [None] * n_layers

    def spread(self, rows):
        """Gives every rollout its own row: rows (B,) names, for each, the prompt it continues. Adds the empty ring."""
        self.prompt_lengths = self.prompt_lengths[rows]
        for buffers in (self.keys, self.values):
            for layer, x in enumerate(buffers):
                ring = x.new_zeros(len(rows), x.shape[1], self.window, x.shape[3])
                buffers[layer] = torch.cat([x[rows], ring], dim=2)              # (B, KV, P + W, D)

    def keep(self, rows):
        """Only these rows (b,) of the B go on, the others have ended: buffers (B, KV, P + W, D) -> (b, KV, P + W, D)"""
        self.prompt_lengths = self.prompt_lengths[rows]
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
        self.slot = self.P + self.n % self.window                               # where these T go: a run of slots
        assert self.slot + T <= self.P + self.window, "a segment must not wrap around the ring"
        first, self.n = self.n, self.n + T
        self.used = self.P + min(self.n, self.window)
        # The thought that a ring slot s holds is the latest one written there, n-1 - (n-1 - s) mod W; a query sees it
        # if it has not been evicted and is not in the query's future.
        slots = torch.arange(self.used - self.P, device=device)
        holds = self.n - 1 - (self.n - 1 - slots) % self.window                 # (slots,)
        queries = torch.arange(first, self.n, device=device)
        thoughts = (holds >= self.oldest) & (holds <= queries[:, None])         # (T, slots)
        prompt = torch.arange(self.P, device=device) < self.prompt_lengths[:, None]  # (B, P)
        B = len(self.prompt_lengths)
        mask = torch.cat([prompt[:, None].expand(B, T, -1), thoughts.expand(B, -1, -1)], dim=2)
        return self.prompt_lengths[:, None] + queries, mask[:, None]            # (B, T), (B, 1, T, P + slots)

    def write(self, layer, k, v):
        """Writes what `begin` made room for, k and v (B, KV, T, D); returns all slots in use, (B, KV, slots, D)."""
        if self.keys[layer] is None:                                            # the prompt
            self.keys[layer], self.values[layer] = k, v
            return k, v
        a, b = self.slot, self.slot + k.shape[2]
        for buffers, new in ((self.keys, k), (self.values, v)):
            if torch.is_grad_enabled():                                         # a graph needs the old buffer unchanged
                old = buffers[layer]
                buffers[layer] = torch.cat([old[:, :, :a], new, old[:, :, b:]], dim=2)
            else:
                buffers[layer][:, :, a:b] = new
        return self.keys[layer][:, :, :self.used], self.values[layer][:, :, :self.used]

    def evict(self):
        """The oldest E thoughts leave. Returns their keys and values, each (L, B, E, KV*D), detached: constants.

        The keys come as they lie here, turned by their position: so the encoder can tell when a thought was thought
        (README, "where the paper is silent")."""
        assert self.full
        a = self.P + self.oldest % self.window
        b = a + self.evict_size
        self.oldest += self.evict_size
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
