"""Balancers of the selection bias: hand-worked steps, quantiles against a loop, and that they balance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import (
    BALANCERS,
    RULES,
    check_rule,
    get_balancer,
    get_rule,
    move_bias_by_sign,
    move_bias_by_sign_in_groups,
    move_bias_in_proportion,
    move_bias_to_quantile,
    route,
    select_top_k,
)
from moe_jax.routing.required_bias import count_bins, histogram_quantile, histogram_range, required_bias
from moe_jax.types import Array, RouterStats, RoutingInputs, Topology
from tests.random_routing import NUM_EXPERTS, as_arrays, choices_of, random_constraints, random_ids, random_logits

BINS = 1000
MOVING = [name for name in BALANCERS if name != "none"]
SETTINGS = {  # rates at which each settles within the test's steps, on sigmoid and on softmax scores
    "sign": {"rate": 0.005},
    "sign_in_groups": {"rate": 0.002, "group_rate": 0.001, "num_groups": 2},
    "proportional": {"rate": 0.03},
    "quantile": {},
}


def stats_of_loads(loads):
    """Statistics in which only the loads matter."""
    loads = jnp.asarray(loads, jnp.float32)
    zeros = jnp.zeros(loads.shape[:-1])
    return RouterStats(loads, loads, loads, *([zeros] * 6), loads, loads)


def sigmoid_stats(logits, **arguments):
    return route(jnp.asarray(logits, jnp.float32), RULES["sigmoid_top_k"], **({"bias_bins": BINS} | arguments)).stats


def test_steps_by_hand():
    # Loads (5, 1, 3) have mean 3. Sign: expert 0 goes down, 1 up, 2 stays. In proportion: by -2/3, 2/3 and 0.
    stats, zeros = stats_of_loads([5, 1, 3]), jnp.zeros(3)
    np.testing.assert_allclose(move_bias_by_sign(zeros, stats, rate=0.1), [-0.1, 0.1, 0.0], atol=1e-7)
    np.testing.assert_allclose(move_bias_in_proportion(zeros, stats, rate=0.3), [-0.2, 0.2, 0.0], atol=1e-7)


def test_steps_are_centred():
    # Signs of (6, 1, 1, 0), mean 2, are (-, +, +, +): their mean 1/2 is taken off, and so is what was there before.
    moved = move_bias_by_sign(jnp.full(4, 7.0), stats_of_loads([6, 1, 1, 0]), rate=0.1)
    np.testing.assert_allclose(moved, [-0.15, 0.05, 0.05, 0.05], atol=1e-6)


def test_step_in_groups_by_hand():
    # Groups (6, 2) and (1, 3) have means 4 and 2, all four experts 3: signs (-, +, +, -) within groups, (-, -, +, +)
    # between them.
    stats, zeros = stats_of_loads([6, 2, 1, 3]), jnp.zeros(4)
    step = lambda **rates: move_bias_by_sign_in_groups(zeros, stats, num_groups=2, **rates)  # noqa: E731
    np.testing.assert_allclose(step(rate=0.1, group_rate=0.0), [-0.1, 0.1, 0.1, -0.1], atol=1e-7)
    np.testing.assert_allclose(step(rate=0.0, group_rate=0.01), [-0.01, -0.01, 0.01, 0.01], atol=1e-7)
    np.testing.assert_allclose(step(rate=0.1, group_rate=0.01), [-0.11, 0.09, 0.11, -0.09], atol=1e-7)


def test_one_group_is_the_rule_without_groups():
    stats, bias = stats_of_loads(np.random.default_rng(0).poisson(9, (3, 8))), jnp.arange(24.0).reshape(3, 8)
    one = move_bias_by_sign_in_groups(bias, stats, num_groups=1, rate=0.1)
    np.testing.assert_allclose(one, move_bias_by_sign(bias, stats, rate=0.1), atol=1e-6)


def test_required_bias_by_hand():
    # K = 1 of scores (.7, .5, .1): whoever reaches .5, the second best, is chosen, so (-.2, 0, .4) is needed.
    # With a bias of (0, 0, .5) the biased scores are (.7, .5, .6), and .6 must be reached: (-.1, .1, .5).
    scores, one = jnp.array([[0.7, 0.5, 0.1]]), jnp.ones(1, jnp.int32)
    inputs = RoutingInputs(scores)
    np.testing.assert_allclose(required_bias(scores, inputs, one), [[-0.2, 0.0, 0.4]], atol=1e-6)
    inputs = RoutingInputs(scores, bias=jnp.array([0.0, 0.0, 0.5]))
    np.testing.assert_allclose(required_bias(scores, inputs, one), [[-0.1, 0.1, 0.5]], atol=1e-6)


def test_quantile_step_by_hand():
    # E = 2, K = 1: scores (.9 .8 .7 .6) against .5. Expert 0 needs (-.4 -.3 -.2 -.1), expert 1 always 0. Each should
    # get 2 of 4 tokens: the second smallest is -.3 and 0, centred (-.15, .15). Bins are 2/1000 wide.
    scores = np.array([[0.9, 0.5], [0.8, 0.5], [0.7, 0.5], [0.6, 0.5]])
    stats = sigmoid_stats(np.log(scores / (1 - scores)), num_choices=1)
    assert stats.chosen.tolist() == [4, 0]
    np.testing.assert_allclose(move_bias_to_quantile(jnp.zeros(2), stats), [-0.15, 0.15], atol=2e-3)
    half = move_bias_to_quantile(jnp.zeros(2), stats, rate=0.5)
    np.testing.assert_allclose(half, [-0.075, 0.075], atol=2e-3)


def quantile_loop(logits, bias, num_choices, is_open, limit):
    """Quantile balancing from the tokens themselves: K3's equations with loops, and no histogram."""
    num_tokens, num_experts = logits.shape
    scores, needed = 1 / (1 + np.exp(-logits)), [[] for _ in range(num_experts)]
    assigned = 0
    for t in range(num_tokens):
        experts = [e for e in range(num_experts) if is_open[t, e]]
        choices = min(limit[t], num_choices, len(experts))
        assigned += choices
        ordered = sorted((scores[t, e] + bias[e] for e in experts), reverse=True)
        for e in experts:
            needed[e].append(ordered[choices] - scores[t, e] if choices < len(experts) else -np.inf)
    low, high = bias.min() - 1, bias.max() + 1
    moved = bias.copy()
    for e in range(num_experts):
        rank = min(assigned / sum(bool(n) for n in needed), len(needed[e]))
        if needed[e]:
            moved[e] = np.clip(sorted(needed[e])[max(int(np.ceil(rank)) - 1, 0)], low, high)
    return moved - moved.mean()  # every expert is open to somebody in these tests


@pytest.mark.parametrize("constrained", [False, True])
def test_quantile_step_equals_the_loop_within_a_bin(constrained):
    num_tokens = 240
    logits, constraints = random_logits(2, num_tokens), {"bias": jnp.linspace(-0.2, 0.3, NUM_EXPERTS)}
    is_open, limit = np.ones((num_tokens, NUM_EXPERTS), bool), np.full(num_tokens, 3)
    if constrained:
        constraints = random_constraints(3, num_tokens)
        arrays = as_arrays(constraints)
        is_open, limit = arrays["is_open"] & arrays["token_mask"][:, None], arrays["limit"]
    bias = np.asarray(constraints["bias"], np.float64)
    stats = sigmoid_stats(logits, num_choices=3, **constraints)
    width = (np.ptp(bias) + 2) / BINS
    expected = quantile_loop(logits.astype(np.float64), bias, 3, is_open, limit)
    np.testing.assert_allclose(move_bias_to_quantile(constraints["bias"], stats), expected, atol=2 * width)


def test_histogram_quantile_by_hand():
    # Bins [0, 1), [1, 2), [2, 3), [3, 4] with counts (0, 2, 0, 4). Rank 1 is half way through the second bin, rank 2
    # its end, rank 3 a quarter into the last, and there is no seventh value: the end of the range.
    histogram, low, high = jnp.array([[0.0, 2, 0, 4]]), jnp.float32(0), jnp.float32(4)
    values = [float(histogram_quantile(histogram, jnp.float32(r), low, high)[0]) for r in (1, 2, 3, 7)]
    np.testing.assert_allclose(values, [1.5, 2.0, 3.25, 4.0], rtol=1e-6)


def test_bins_keep_what_is_outside_and_skip_what_is_closed():
    bins = jnp.array([[0, 3], [0, 2], [3, 1]], jnp.int32)  # N = 3: bin 3 is the sentinel
    assert count_bins(bins, 3).tolist() == [[2, 0, 0], [0, 1, 1]]


def test_histograms_of_parts_add_up_and_masked_tokens_are_inert():
    logits, constraints = random_logits(4, 24), random_constraints(5, 24)
    whole = sigmoid_stats(logits, num_choices=2, **constraints)
    mask = np.asarray(constraints["token_mask"])
    garbage = sigmoid_stats(np.where(mask[:, None], logits, 99.0), num_choices=2, **constraints)
    np.testing.assert_array_equal(whole.bias_histogram, garbage.bias_histogram)
    grouped = sigmoid_stats(logits, num_choices=2, stats_groups=4, **constraints).bias_histogram
    assert grouped.shape == (4, NUM_EXPERTS, BINS)
    np.testing.assert_array_equal(grouped.sum(0), whole.bias_histogram)
    is_open = as_arrays(constraints)["is_open"] & mask[:, None]
    np.testing.assert_array_equal(whole.bias_histogram.sum(1), is_open.sum(0))


@pytest.mark.parametrize("rule", RULES)
def test_reported_scores_plus_bias_are_what_a_rule_selects_by(rule):
    logits, bias = jnp.asarray(random_logits(6)), jnp.linspace(-0.3, 0.3, NUM_EXPERTS)
    controller = RULES[rule].controller
    level = None if controller is None else jnp.float32(controller.start)
    inputs = RoutingInputs(logits, bias=bias, level=level, token_ids=random_ids(0))
    choice = RULES[rule].choose(inputs, choices_of(rule))
    if choice.scores is None:
        with pytest.raises(ValueError, match="bias_bins=10 needs a rule that"):
            check_rule(RULES[rule], choices_of(rule), NUM_EXPERTS, rule, bias_bins=10)
        return
    expected = select_top_k(choice.scores + bias[None, :], choices_of(rule), None, None)
    np.testing.assert_array_equal(choice.expert_ids, expected)


@pytest.mark.parametrize("rule", ["sigmoid_top_k", "softmax_top_k"])
@pytest.mark.parametrize("balancer", MOVING)
def test_a_skewed_router_gets_balanced(balancer, rule):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(512, NUM_EXPERTS)) + np.linspace(0, 2, NUM_EXPERTS), jnp.float32)
    move = get_balancer(balancer, **SETTINGS[balancer])

    def step(bias, _) -> tuple[Array, Array]:
        stats = route(logits, RULES[rule], num_choices=2, bias=bias, bias_bins=BINS).stats
        return move(bias, stats), stats.chosen.max() / stats.chosen.mean()

    bias, busiest = jax.jit(lambda b: jax.lax.scan(step, b, length=250))(jnp.zeros(NUM_EXPERTS))
    assert busiest[0] > 1.8 and busiest[-1] < 1.1
    np.testing.assert_allclose(bias.mean(), 0, atol=1e-6)


@pytest.mark.parametrize("balancer", BALANCERS)
def test_nothing_moves_without_tokens(balancer):
    bias = jnp.array([0.3, -0.1, -0.2, 0.0, 0.4, -0.4])
    stats = sigmoid_stats(random_logits(7), num_choices=2, bias=bias, token_mask=jnp.zeros(18, bool))
    np.testing.assert_allclose(get_balancer(balancer)(bias, stats), bias, atol=1e-7)


@pytest.mark.parametrize("balancer", BALANCERS)
def test_layers_and_experts_are_treated_alike(balancer):
    """A leading axis of layers is a loop over them; renaming experts (whole groups of them) renames the biases."""
    move = get_balancer(balancer, **SETTINGS.get(balancer, {}))
    biases = 0.1 * jnp.asarray(np.random.default_rng(8).normal(size=(2, NUM_EXPERTS)), jnp.float32)
    biases -= biases.mean(1, keepdims=True)
    logits, order = random_logits(9), np.array([4, 5, 3, 1, 2, 0])  # swaps the groups of three, and within them
    of = lambda bias, x: sigmoid_stats(x, num_choices=2, bias=bias)  # noqa: E731
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(of(bias, logits) for bias in biases))
    moved = jax.jit(move)(biases, both)
    for bias, expected in zip(biases, moved, strict=True):
        np.testing.assert_allclose(move(bias, of(bias, logits)), expected, atol=1e-6)
        renamed = move(bias[order], of(bias[order], logits[:, order]))
        np.testing.assert_allclose(renamed, expected[order], atol=1e-6)


def test_quantile_keeps_its_head_where_there_is_no_choice():
    """As many choices as experts, an expert that is closed to all, and one that few tokens may use."""
    logits = random_logits(10)
    everything = sigmoid_stats(logits, num_choices=NUM_EXPERTS)
    np.testing.assert_allclose(move_bias_to_quantile(jnp.zeros(NUM_EXPERTS), everything), 0, atol=1e-6)
    logits, keep = random_logits(10, 600), np.ones((2, NUM_EXPERTS), bool)
    keep[:, 0], keep[0, 1] = False, False
    groups = jnp.asarray(np.arange(600) < 9, jnp.int32)  # expert 1 is open to nine tokens
    topology = Topology(jnp.asarray(keep), jnp.array([2, 2], jnp.int32))
    bias = jnp.zeros(NUM_EXPERTS)
    for _ in range(10):
        stats = sigmoid_stats(logits, num_choices=2, topology=topology, token_groups=groups, bias=bias)
        bias = move_bias_to_quantile(bias, stats)
    assert bias[0] == 0 and np.abs(bias).max() < 1
    assert stats.chosen[0] == 0 and stats.chosen[1] == 9
    np.testing.assert_allclose(stats.chosen[2:], (2 * 600 - 9) / 4, rtol=0.05)


def test_borders_say_what_is_wrong():
    with pytest.raises(ValueError, match="unknown balancer 'signs'; known: none, sign, sign_in_groups, proportional"):
        get_balancer("signs")
    with pytest.raises(ValueError, match="balancer 'sign' has no setting 'rates'; it has: rate"):
        get_balancer("sign", rates=0.1)
    with pytest.raises(ValueError, match="num_groups=4 does not divide the 6 experts into equal groups"):
        get_balancer("sign_in_groups", num_groups=4)(jnp.zeros(6), stats_of_loads(np.ones(6)))
    with pytest.raises(ValueError, match="build the model with bias_bins=1000"):
        get_balancer("quantile")(jnp.zeros(6), stats_of_loads(np.ones(6)))
    with pytest.raises(ValueError, match="bias_bins must not be negative, got -1"):
        sigmoid_stats(random_logits(0), num_choices=2, bias_bins=-1)
    with pytest.raises(ValueError, match="has no setting 'rate'"):
        get_rule("sigmoid_top_k", rate=0.1)  # rates are the balancer's


def test_range_of_the_histogram_holds_every_score_between_0_and_1():
    low, high = histogram_range(jnp.array([[0.5, -0.2], [0.0, 0.0]]))
    assert np.allclose(low, [-1.2, -1.0]) and np.allclose(high, [1.5, 1.0])
