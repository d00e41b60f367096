import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from moe_jax.data import DataConfig, Document, load_documents, ngram, pack, split_documents

BOUNDARY = 256


def train_and_test():
    splits = split_documents(load_documents(DataConfig(domains=("speeches", "mathematics"))), DataConfig())
    return splits["train"], splits["test"]


class SlowKneserNey:
    """The formulas of Chen & Goodman 1998 with dictionaries, one byte at a time."""

    def __init__(self, texts, order):
        self.order = order
        self.counts = [Counter() for _ in range(order + 1)]
        for text in texts:
            symbols = (BOUNDARY,) * (order - 1) + tuple(text)
            self.counts[order].update(symbols[i : i + order] for i in range(len(text)))
        for length in range(order - 1, 0, -1):
            self.counts[length].update(gram[1:] for gram in self.counts[length + 1])
        self.discounts = [None] + [self.discount(Counter(counts.values())) for counts in self.counts[1:]]
        self.followers = [defaultdict(list) for _ in range(order + 1)]
        for length in range(1, order + 1):
            for gram, count in self.counts[length].items():
                self.followers[length][gram[:-1]].append(count)

    def discount(self, n):
        if not all(n[times] for times in (1, 2, 3, 4)):
            return {1: 0.5, 2: 1.0, 3: 1.5}
        y = n[1] / (n[1] + 2 * n[2])
        values = {times: times - (times + 1) * y * n[times + 1] / n[times] for times in (1, 2, 3)}
        inside = all(0 < value < times for times, value in values.items())
        return values if inside else {1: 0.5, 2: 1.0, 3: 1.5}

    def probability(self, context, byte):
        length = len(context) + 1
        lower = self.probability(context[1:], byte) if context else 1 / 256
        followers = self.followers[length][context]
        if not followers:
            return lower
        count, total, discounts = self.counts[length][(*context, byte)], sum(followers), self.discounts[length]
        own = (count - discounts[min(count, 3)]) / total if count else 0.0
        return own + sum(discounts[min(other, 3)] for other in followers) / total * lower


def test_a_bigram_model_by_hand():
    # "aab", with # the boundary. Bigrams #a, aa, ab once each: no counts of 2, so the discount of 1 is 0.5.
    # Unigrams count their different left neighbours: a has # and a, 2; b has a, 1; in all 3.
    #   p(a) = (2 - 1.0) / 3 + (1.0 + 0.5) / 3 / 256      p(b) = (1 - 0.5) / 3 + 0.5 / 256      p(x) = 0.5 / 256
    #   p(a|a) = (1 - 0.5) / 2 + (0.5 + 0.5) / 2 p(a)     p(b|a) likewise with p(b)
    model = ngram.fit([Document(b"aab", "d", "0")], order=2)
    p_a, p_b = 1 / 3 + 0.5 / 256, 0.5 / 3 + 0.5 / 256
    scores = ngram.log2_probabilities(model, b"aabx")
    # x follows b, a context never seen: its unigram probability.
    expected = [0.25 + 0.5 * p_a, 0.25 + 0.5 * p_b, 0.5 / 256]
    np.testing.assert_allclose(2**scores, expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7])
def test_agrees_with_a_dictionary_of_counts(order):
    train, test = train_and_test()
    train, text = train[:4] + train[-4:], test[0].text[:150] + test[-1].text[:150] + b"\x00\xff\xc3"
    slow = SlowKneserNey([document.text for document in train], order)
    symbols = (BOUNDARY,) * (order - 1) + tuple(text)
    expected = [slow.probability(symbols[i : i + order - 1], symbols[i + order - 1]) for i in range(1, len(text))]
    np.testing.assert_allclose(2 ** ngram.log2_probabilities(ngram.fit(train, order), text), expected, rtol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_of_all_bytes_sum_to_one_after_any_context(order):
    train, test = train_and_test()
    model = ngram.fit(train, order)
    random = np.random.default_rng(0)
    seen = np.frombuffer(test[0].text[: order - 1 + 20], np.uint8).astype(np.uint64)
    contexts = [seen[i : i + order - 1] for i in range(20)]
    contexts += list(random.integers(0, 256, (20, order - 1), dtype=np.uint64))
    contexts += [np.full(order - 1, BOUNDARY, np.uint64)]
    keys = np.array(
        [sum(int(s) << 9 * (i + 1) for i, s in enumerate(reversed(context))) for context in contexts], np.uint64
    )
    p = ngram.probabilities(model, keys[:, None] | np.arange(256, dtype=np.uint64)[None, :])
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-12)


def test_longer_contexts_predict_better_and_all_beat_the_uniform_distribution():
    train, test = train_and_test()
    uniform, three, five = 8.0, *(ngram.bits_per_byte(ngram.fit(train, order), test) for order in (3, 5))
    for domain in ("all", "speeches", "mathematics"):
        assert five[domain] < three[domain] - 0.3 < uniform - 3


def test_scores_the_bytes_that_packed_sequences_predict():
    train, test = train_and_test()
    model, packed = ngram.fit(train), pack(test, 128)
    scores = [ngram.log2_probabilities(model, document.text) for document in test]
    assert sum(map(len, scores)) == packed.mask[:, 1:].sum()
    result = ngram.bits_per_byte(model, test)
    assert set(result) == {"all", "speeches", "mathematics"}
    assert result["all"] == pytest.approx(-math.fsum(np.concatenate(scores)) / packed.mask[:, 1:].sum(), rel=1e-12)
    lengths = np.bincount(packed.domain, packed.mask[:, 1:].sum(axis=1))
    weighted = sum(result[name] * length for name, length in zip(packed.domain_names, lengths, strict=True))
    assert result["all"] == pytest.approx(weighted / lengths.sum(), rel=1e-12)


def test_its_context_crosses_the_windows_but_not_the_documents():
    train, _ = train_and_test()
    model = ngram.fit(train)
    text = b"My fellow Americans, the state of our Union"
    scores = ngram.log2_probabilities(model, text)
    np.testing.assert_array_equal(scores[:10], ngram.log2_probabilities(model, text[:11]))
    # Four bytes of context decide: the same tail after another beginning scores the same.
    np.testing.assert_array_equal(scores[-8:], ngram.log2_probabilities(model, b"xy" + text[-12:])[-8:])


@pytest.mark.parametrize("order", [0, 8])
def test_an_order_that_does_not_fit_is_refused(order):
    with pytest.raises(ValueError, match=f"order is {order}, expected 1 to 7"):
        ngram.fit([Document(b"ab", "d", "0")], order)
