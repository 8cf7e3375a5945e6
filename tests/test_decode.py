"""A decode step, prepared: packed, compiled, halved or not, it draws the same tokens."""
import shutil

import pytest
import torch
import torch.nn.functional as F

import cache
import grpo
from cache import halved, pack
from conftest import ALL, W, tiny_encoder, tiny_model, tiny_prompts
from model import Linear
from rollout import generate, sample


@pytest.mark.parametrize("kind", [None, "lora", "pte"])
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU takes a C++ compiler")
def test_compiled_decoding_draws_the_same_tokens(kind):
    """Under evictions, with rows that end and leave, prompts of mixed length, in a fixed shape of its own."""
    model = tiny_model(eos_token_id=[38, 39])
    encoder = tiny_encoder(model, kind) if kind else None
    settings = dict(prompts=tiny_prompts(3, 7), group_size=4, max_new_tokens=24, window=W)
    eager = generate(model, encoder, **settings)
    assert len({*eager.lengths.tolist()}) > 3 and eager.evictions().max() > 4
    compiled = generate(model, encoder, compile=True, **settings)
    assert torch.equal(eager.lengths, compiled.lengths) and eager.completions() == compiled.completions()
    counts = torch.arange(eager.logps.shape[1]) < eager.lengths[:, None]
    assert (eager.logps - compiled.logps).abs()[counts].max() < 1e-4
    for logps, span, rows in grpo.replay(model, encoder, compiled, ALL) if encoder else ():  # the replay fits it, too
        counts = torch.arange(span.start, span.stop) < compiled.lengths[rows, None]
        assert (logps - compiled.logps[rows, span]).abs()[counts].max() < 1e-4
    if encoder:                                                                 # an update is seen without compiling
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch.no_grad():
            for p in encoder.trainable().values():
                p.mul_(0.5)
        again = generate(model, encoder, compile=True, **settings)
        assert again.completions() == generate(model, encoder, **settings).completions() != eager.completions()
        assert graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    else:                                                                       # here the weights are compiled in
        model.blocks[0].w2.weight.neg_()
        other, settings["max_new_tokens"] = tiny_model(), W + 1                 # the same shapes again
        other.blocks[1].w2.weight.neg_()
        for changed in (model, other):
            real = generate(changed, None, **settings)
            compiled = generate(changed, None, compile=True, **settings)
            counts = torch.arange(W + 1) < real.lengths[:, None]
            assert (real.logps - compiled.logps).abs()[counts].max() < 1e-4
            assert (real.logps - eager.logps[:, :W + 1]).abs()[counts].max() > 1e-2


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 65])
def test_packed_products_are_the_plain_ones(rows, compile):
    """For as many rows as they were packed for and others, with and without a bias, for x of any shape."""
    torch.manual_seed(0)
    layer = torch.nn.ModuleList([Linear(24, 40, 8, bias=True), Linear(24, 7)])
    pack(layer, rows, compile)
    assert all((linear.few_rows is not None) == (rows <= (1 if compile else 64)) for linear in layer)
    for linear in layer:
        for shape in ((1, 1, 24), (rows, 1, 24), (rows, 24), (3, 5, 24), (100, 24)):
            x = torch.randn(shape)
            with torch.no_grad():
                torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))


def test_weights_are_packed_once_and_anew_when_they_change():
    linear = Linear(24, 40).requires_grad_(False)
    x = torch.randn(1, 24)
    for rows in (1, 4):
        pack(linear, rows)
        first = linear.few_rows
        pack(linear, rows)
        assert linear.few_rows is first
        linear.weight.mul_(2)                                                   # in place
        pack(linear, rows)
        assert linear.few_rows is not first
        with torch.no_grad():
            torch.testing.assert_close(linear(x), F.linear(x, linear.weight))


def test_a_model_that_fills_the_memory_is_not_packed():
    with torch.device("meta"):
        big = torch.nn.ModuleList([Linear(1 << 15, 1 << 14)])                   # 2 GB, without numbers
    big.append(Linear(24, 40))
    pack(big, 1)
    assert big[1].few_rows is None


def test_training_never_reads_the_packed_copy():
    linear = Linear(24, 40).requires_grad_(False)
    pack(linear, 1)
    linear.few_rows = lambda x: pytest.fail("packed")
    x = torch.randn(1, 24, requires_grad=True)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight))
    big = torch.randn(65, 24)
    with torch.no_grad():
        torch.testing.assert_close(linear(big), F.linear(big, linear.weight))   # nor do products with many rows


def test_what_is_prepared_for_a_rollout_is_forgotten_after_it():
    model, prompts = tiny_model(), tiny_prompts(3, 7)
    encoder = tiny_encoder(model)
    linear, S = encoder.linears["1_wqkv"], torch.randn(1, 6, 4)
    first = generate(model, encoder, prompts, max_new_tokens=20, window=W)
    assert all(linear.ready is None for linear in encoder.linears.values())
    with torch.no_grad():
        linear.A.mul_(2)
    assert not torch.equal(first.logps, generate(model, encoder, prompts, max_new_tokens=20, window=W).logps)
    encoder.prepare(torch.float32)
    linear(torch.randn(2, 1, 32), S).sum().backward()
    assert linear.A.grad.abs().max() > 0 and linear.B.grad.abs().max() > 0      # training never uses it


@pytest.mark.parametrize("size, least, wanted", [(16, 16, 16), (16, 9, 16), (16, 8, 8), (16, 5, 8), (16, 4, 4),
                                                 (16, 1, 1), (7, 3, 4), (7, 1, 1), (3, 1, 1), (1, 1, 1), (256, 3, 4)])
def test_a_batch_is_halved_while_the_living_fit(size, least, wanted):
    assert halved(size, least) == wanted


def test_the_batch_shrinks_to_few_sizes(monkeypatch, ends_at):
    model, sizes = tiny_model(eos_token_id=[38, 39]), []
    real = cache.Decoder.__call__

    def spy(self, tokens, S):
        sizes.append(len(tokens))
        return real(self, tokens, S)
    monkeypatch.setattr(cache.Decoder, "__call__", spy)
    ends_at([2, 3, 4, 5, 6, 7, 8, 30])
    r = generate(model, None, tiny_prompts(3, 7), 4, max_new_tokens=40, window=W)
    assert r.lengths.tolist() == [2, 3, 4, 5, 6, 7, 8, 30]
    assert sizes == [8] * 4 + [4] * 2 + [2] + [1] * 22


def test_one_draw_a_row_takes_no_id_without_mass():
    """The first, the last and ids between that have no probability: never drawn, not even at the ends of (0, mass]."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(20_000, 5)
    ids, logps = sample(logits, 1.0, 0, 1.0, torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)))
    assert set(ids.tolist()) == {1, 3} and 9_700 < (ids == 1).sum() < 10_300
    torch.testing.assert_close(logps, torch.full((20_000,), 0.5).log())
    for u in (0.0, 1 - 2 ** -24):                                               # the extremes of torch.rand
        assert sample(logits[:1], 1.0, 0, 1.0, torch.tensor([[u]]))[0].item() == (3 if u == 0 else 1)


def test_logits_that_are_no_numbers_draw_an_id_that_exists():
    """A model that has diverged is seen by its log-probs, not by an index out of range (on a GPU: the end of all)."""
    ids, logps = sample(torch.full((3, 5), float("nan")), 1.0, 0, 1.0, torch.rand(3, 1))
    assert (ids < 5).all() and logps.isnan().all()


# ---- the size of a micro-batch ---------------------------------------------------------------------------------------
def test_the_largest_micro_batch_is_measured(roll, monkeypatch):
    """Half of the memory, over the bytes that a thought of the first segment keeps: fewer where a thought is dearer."""
    model, encoder, r = roll()
    memory = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(grpo.os, "sysconf", memory.get)
    most = grpo.largest_micro_batch(model, encoder, r)
    memory["SC_PHYS_PAGES"] = 2000
    assert abs(grpo.largest_micro_batch(model, encoder, r) - 2 * most) <= 1
    held = {}

    def count(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    weights = {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        logps, span, _ = next(grpo.replay(model, encoder, r, r.lengths.argmax()[None]))
    kept = sum(size for pointer, size in held.items() if pointer not in weights)
    assert most <= 1000 * 4096 / 2 / kept * W < 2 * most                        # a later one may keep more
    assert not any(p.grad is not None for p in encoder.parameters())
