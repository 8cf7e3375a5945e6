"""Generation under the cache: every row is what it would be alone, and every log-prob is that of what was sampled."""
import numpy as np
import pytest
import torch

from conftest import EOS, NEVER, logits_by_hand, rows_of, tiny_encoder, tiny_model, tiny_prompts
from model import UserError
from rollout import Rollout, generate, sample

LENGTHS = (3, 7, 1, 5)                                                          # of prompts: all are padded but one


def generate_tiny(model, encoder=None, prompts=tiny_prompts(*LENGTHS), T=40, W=8, **settings):
    """40 tokens under a window of 8, of which 2 leave at a time: 16 evictions."""
    return generate(model, encoder, prompts, max_new_tokens=T, window=W, **settings)


def logps_by_hand(model, encoder, r, b):
    """The log-probs (length,) of row b, alone and with a cache made of lists."""
    prompt, tokens = rows_of(r)[b]
    with torch.no_grad():
        logits = logits_by_hand(model, encoder, prompt, tokens, r.window, r.evict_size)[:, :r.n_ids]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


# ---- a row in a batch, and alone -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [None, "pte"])
def test_decoding_token_by_token_equals_one_full_forward(kind):
    """With window 0: prompt and thought go through the model at once, without any cache."""
    model = tiny_model()
    encoder = tiny_encoder(model, kind) if kind else None
    r = generate_tiny(model, encoder, W=0)
    S = encoder.read(encoder.start()) if kind else None
    for b, (prompt, tokens) in enumerate(rows_of(r)):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + tokens]), S=S)[0, len(prompt) - 1:-1].log_softmax(-1)
        torch.testing.assert_close(r.logps[b], logps[range(40), tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [None, "pte", "lora"])
@pytest.mark.parametrize("W, ratio", [(8, 0.25), (4, 1.0), (3, 1 / 3)])
def test_log_probs_in_a_batch_are_those_of_the_row_alone(kind, W, ratio, float64):
    """Sampled, mixed prompt lengths, 9 to 37 evictions: as scored one row at a time by a cache made of lists."""
    model = tiny_model()
    encoder = tiny_encoder(model, kind) if kind else None
    r = generate_tiny(model, encoder, W=W, evict_ratio=ratio, group_size=2)
    for b in range(0, 8, 2):
        torch.testing.assert_close(r.logps[b], logps_by_hand(model, encoder, r, b), atol=1e-9, rtol=0)


def test_a_row_alone_is_the_row_of_the_batch(float64):
    """Greedy, so that the draw does not depend on who else draws: the same tokens, and log-probs to 1e-9 (float64)."""
    model = tiny_model()
    encoder = tiny_encoder(model)
    batch = generate_tiny(model, encoder, temperature=0)
    for b, prompt in enumerate(tiny_prompts(*LENGTHS)):
        alone = generate_tiny(model, encoder, [prompt], temperature=0)
        assert torch.equal(alone.tokens[0], batch.tokens[b])
        torch.testing.assert_close(alone.logps[0], batch.logps[b], atol=1e-9, rtol=0)


def test_finished_rows_do_not_matter(ends_at):
    """Whether and when row 0 ends, and what it draws: the other rows stay as they are. To rounding, for finished rows
    leave the batch when they are half of it, and a product of other shape may sum in another order."""
    model = tiny_model(eos_token_id=list(EOS))
    encoder, results = tiny_encoder(model), []
    for end in (3, 9, 20, NEVER):
        ends_at([end, 30, NEVER, NEVER])
        results.append(generate_tiny(model, encoder, temperature=0))
        assert results[-1].lengths.tolist() == [min(end, 40), 30, 40, 40]
        assert results[-1].ended.tolist() == [end < 40, True, False, False]
        assert results[-1].completions()[1:] == results[0].completions()[1:]
        counts = torch.arange(40) < results[0].lengths[1:, None]
        assert ((results[-1].logps[1:] - results[0].logps[1:]).abs() * counts).max() < 1e-5
    assert not torch.equal(results[0].tokens[0], results[-1].tokens[0])


def test_the_end_token_is_the_last_that_counts_and_the_loop_stops_with_the_last_row(ends_at):
    model = tiny_model(eos_token_id=list(EOS))
    ends_at([5, 1, 12, 8])                                                      # by either of the two end tokens
    r = generate_tiny(model)
    assert r.lengths.tolist() == [5, 1, 12, 8] and r.ended.all() and r.tokens.shape == (4, 12)
    assert all(c[-1] in EOS and not set(c[:-1]) & set(EOS) for c in r.completions())
    assert len({c[-1] for c in r.completions()}) == 2


# ---- evictions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("W, E", [(8, 2), (4, 4), (5, 1), (6, 3), (1, 1)])
def test_evictions_are_counted_as_a_loop_would(W, E):
    def count(length):
        cached = evictions = 0
        for _ in range(length - 1):                                             # the last token drawn is never written
            if cached == W:
                cached, evictions = cached - E, evictions + 1
            cached += 1
        return evictions
    lengths = torch.arange(1, 50)
    r = Rollout(*[None] * 4, lengths, None, None, window=W, evict_size=E, n_ids=40)
    assert r.evictions().tolist() == [count(n) for n in lengths.tolist()]
    r.window = 0
    assert not r.evictions().any()


def test_on_token_sees_every_step_and_every_eviction():
    seen = []
    r = generate_tiny(tiny_model(), T=41, on_token=lambda ids, evicted: seen.append((ids.tolist(), evicted)))
    assert [ids for ids, _ in seen] == r.tokens.T.tolist()
    steps = [t for t, (_, evicted) in enumerate(seen) if evicted]
    assert steps == list(range(8, 40, 2))                                       # 40, the last, is never written
    assert r.evictions().tolist() == [len(steps)] * 4


def test_a_group_continues_one_prompt():
    r = generate_tiny(tiny_model(), group_size=3)
    assert r.prompt_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({tuple(c) for c in r.completions()}) == 12                       # and each in its own way


def test_what_exceeds_the_models_context_is_refused():
    generate_tiny(tiny_model(), T=256 - 7, W=0, prompts=tiny_prompts(7), temperature=0)
    with pytest.raises(UserError):
        generate_tiny(tiny_model(), T=256 - 6)


# ---- sampling --------------------------------------------------------------------------------------------------------
def draw(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    u = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(seed))
    return sample(logits, temperature, top_k, top_p, u)


P_5 = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])                                 # probabilities of five ids
SHUFFLE = torch.tensor([3, 0, 4, 1, 2])
CASES = [  # temperature, top_k, top_p, how many of P_5 stay
    (1.0, 0, 1.0, 5), (1.0, 3, 1.0, 3), (1.0, 1, 1.0, 1), (1.0, 9, 1.0, 5), (1.0, 0, 0.69, 2), (1.0, 0, 0.71, 3),
    (1.0, 0, 0.3, 1), (1.0, 0, 0.0, 1), (1.0, 2, 0.9, 2), (1.0, 4, 0.5, 2), (2.0, 0, 1.0, 5), (0.5, 3, 1.0, 3),
    (0.1, 0, 0.9, 1), (4.0, 0, 0.69, 4)]                                        # at 0.1 the first has mass 0.95


@pytest.mark.parametrize("temperature, top_k, top_p, stay", CASES)
def test_draws_follow_the_truncated_distribution_and_so_do_their_log_probs(temperature, top_k, top_p, stay):
    p = (P_5 ** (1 / temperature)).numpy().astype(float)
    p[stay:] = 0
    p = (p / p.sum())[SHUFFLE]                                                  # the ids are not in order of their p
    n = 20000
    ids, logps = draw(P_5.log()[SHUFFLE].expand(n, 5), temperature, top_k, top_p)
    counts = np.bincount(ids, minlength=5)
    assert not counts[p == 0].any()
    chi2 = sum((counts - n * p)[p > 0] ** 2 / (n * p[p > 0]))
    assert chi2 < 20                                                            # 4 degrees of freedom: p = 0.0005
    np.testing.assert_allclose(logps, np.log(p[ids]), atol=1e-5)


def test_temperature_0_takes_the_likeliest():
    torch.manual_seed(0)
    logits = torch.randn(50, 40)
    for seed in range(3):
        ids, logps = draw(logits, temperature=0, seed=seed)
        assert torch.equal(ids, logits.argmax(dim=1))
        torch.testing.assert_close(logps, logits.log_softmax(1).max(dim=1).values)  # in the model's own distribution
    assert torch.equal(draw(logits, top_k=1)[0], ids)


def test_the_seed_repeats_the_draw_and_rows_draw_independently():
    model = tiny_model()
    one = generate_tiny(model, seed=1)
    torch.manual_seed(123)                                                      # the global generator is not touched
    before = torch.get_rng_state()
    again, other = generate_tiny(model, seed=1), generate_tiny(model, seed=2)
    assert torch.equal(one.tokens, again.tokens) and torch.equal(one.logps, again.logps)
    assert not torch.equal(one.tokens, other.tokens) and torch.equal(before, torch.get_rng_state())
    ids, _ = draw(torch.zeros(2000, 40))
    assert ids.unique().numel() == 40


def test_ids_beyond_the_tokenizers_are_never_drawn(float64):
    """n_ids = 25 of 40: the rest has probability 0, in the draw and in the log-probs."""
    model = tiny_model()
    r = generate_tiny(model, n_ids=25, group_size=4)
    assert r.n_ids == 25 and r.tokens.max() < 25
    torch.testing.assert_close(r.logps[4], logps_by_hand(model, None, r, 4), atol=1e-9, rtol=0)
    assert generate_tiny(model, group_size=4).tokens.max() >= 25
