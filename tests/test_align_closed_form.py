"""PPO, DPO and GRPO reach the policy that is best, π* = ρ·e^(r/β)/Z, in worlds so small that it can be written down."""
import numpy as np
import pytest
from tiny_policies import TinyWorld, total_variation

import tinyllm
from tinyllm import ops
from tinyllm.align import GRPO, PPO, GRPOConfig, PPOConfig, PreferenceConfig, best_of_n, best_of_n_kl, grpo_loss
from tinyllm.ops.policy import kl_estimate
from tinyllm.tensor import Tensor

BANDIT = dict(V=5, T=1, beta=0.5)
CHAIN = dict(V=3, T=3, beta=1.0)
ROLLOUT = dict(prompts=1, max_tokens=1, answers=128)


@pytest.fixture(autouse=True)
def one_thread():
    before = tinyllm.threads()
    tinyllm.threads(1)
    yield
    tinyllm.threads(before)


def grpo(world, **changes):
    options = ROLLOUT | dict(max_tokens=world.T, kl=world.beta, advantage="centred", average="token") | changes
    return GRPOConfig(**options)


@pytest.mark.parametrize("method, config, steps, allowed", [
    ("preferences", lambda w: PreferenceConfig(beta=w.beta), 80, 0.002),
    (PPO, lambda w: PPOConfig(**ROLLOUT, kl=w.beta), 150, 0.02),
    (GRPO, lambda w: grpo(w, kl_estimator="k2"), 120, 0.02),
    (GRPO, lambda w: grpo(w, kl_place="reward"), 120, 0.02),
    (GRPO, lambda w: grpo(w, kl_place="reward", advantage="rloo"), 120, 0.02),
], ids=["DPO", "PPO", "GRPO, k2 in the loss", "GRPO, k1 in the reward", "RLOO"])  # fmt: skip
def test_bandit(method, config, steps, allowed):
    world = TinyWorld(**BANDIT)
    assert total_variation(world.rho, world.best) > 0.3
    found = world.train(method, config(world), steps, lr=2e-2)
    assert total_variation(found, world.best) < allowed
    assert abs(total_variation(found, world.rho) - total_variation(world.best, world.rho)) < allowed  # it moved as far


@pytest.mark.slow
def test_bandit_with_the_published_estimator_goes_elsewhere():
    """k3's gradient, on the policy's samples, is that of KL(ρ ‖ π): the best policy for that is β·ρ/(λ - r), λ so that it sums to 1."""
    world = TinyWorld(**BANDIT)
    low, high = world.rewards.max() + 1e-9, world.rewards.max() + 10
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (world.beta * world.rho / (middle - world.rewards)).sum() > 1 else (low, middle)
    expected = world.beta * world.rho / (low - world.rewards)
    found = world.train(GRPO, grpo(world, answers=256, kl_estimator="k3"), 200, lr=2e-2)
    assert total_variation(found, expected) < 0.02 < 0.05 < total_variation(found, world.best)


@pytest.mark.slow
@pytest.mark.parametrize("method, config, steps, allowed", [
    ("preferences", lambda w: PreferenceConfig(beta=w.beta), 250, 0.001),
    (PPO, lambda w: PPOConfig(prompts=1, answers=128, max_tokens=w.T, kl=w.beta), 400, 0.02),
    (GRPO, lambda w: grpo(w, kl_place="reward", advantage="rloo"), 300, 0.01),
], ids=["DPO", "PPO", "RLOO"])  # fmt: skip
def test_chain(method, config, steps, allowed):
    world = TinyWorld(**CHAIN)
    assert total_variation(world.rho, world.best) > 0.5
    assert total_variation(world.train(method, config(world), steps), world.best) < allowed


@pytest.mark.slow
def test_chain_with_a_penalty_per_token_goes_elsewhere():
    """In the loss, the KL of a token knows nothing of where the token leads: over several tokens only a KL in the reward is the whole answer's."""
    world = TinyWorld(**CHAIN)
    assert total_variation(world.train(GRPO, grpo(world, kl_estimator="k2"), 300), world.best) > 0.1


@pytest.mark.parametrize("average", ["answer", "token"])
def test_grpo_prints_0_and_learns(average):
    """At ratio 1 the loss is minus the mean advantage, which is 0 in each group. Its gradient is that of REINFORCE, which is not."""
    world, records = TinyWorld(**CHAIN), []
    config = grpo(world, kl=0.0, advantage="grpo", average=average, prompts=2, answers=16)
    rollouts = GRPO(world.policy, world.reference, [[0], [0]], world.reward, config, end=None, seed=0, observe=records.append)
    [experience] = rollouts.batches(0)
    loss = grpo_loss(config)(world.policy, experience, None)
    loss.backward()
    gradient = {name: p.grad.copy() for name, p in world.policy.named_parameters()}
    for _, p in world.policy.named_parameters():
        p.grad = None
    log_p = ops.linear_log_probabilities(world.policy.hidden(experience.ids), world.policy.output_weight, experience.targets)
    reinforce = ops.policy_gradient(log_p, experience.advantages, experience.weights)
    reinforce.backward()
    assert abs(loss.item()) < 1e-6
    assert max(np.abs(g).max() for g in gradient.values()) > 1e-2
    for name, p in world.policy.named_parameters():
        np.testing.assert_allclose(gradient[name], p.grad, atol=1e-5)
    assert records[0]["reward_std"] > 0.5


@pytest.mark.parametrize("estimator, expected", [("k1", "nothing"), ("k2", "KL(π ‖ ρ)"), ("k3", "KL(ρ ‖ π)")])
def test_gradients_of_the_kl_estimators_are_what_their_table_says(estimator, expected):
    """Over all tokens, each weighted by its chance under π: the exact mean of the estimator's gradient on π's samples."""
    random = np.random.default_rng(0)
    z, log_rho = Tensor(random.standard_normal(6), True), ops.log_softmax(Tensor(random.standard_normal(6))).data

    def gradient_of(make):
        z.grad = None
        (y := make(ops.log_softmax(z))).backward()
        return y.item(), z.grad

    value, found = gradient_of(lambda log_p: ops.kl_estimate(log_p, log_rho, np.exp(log_p.data), estimator=estimator))
    kl, wanted = {
        "nothing": (None, np.zeros(6)),
        "KL(π ‖ ρ)": gradient_of(lambda log_p: ops.kl_divergence(log_p, log_rho)),
        "KL(ρ ‖ π)": gradient_of(lambda log_p: ops.kl_divergence(Tensor(log_rho), log_p)),
    }[expected]
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    exact = gradient_of(lambda log_p: ops.kl_divergence(log_p, log_rho))[0]
    assert (abs(value - exact) < 1e-12) == (estimator != "k2")


def test_variance_of_the_kl_estimators():
    random = np.random.default_rng(1)
    d = random.normal(0.005, 0.1, (1000, 20))  # ln π - ln ρ where both are normal, 0.1 apart: the KL is 0.005
    spread = {e: np.std([kl_estimate.array(row, 0 * row, estimator=e)[0] for row in d]) for e in ("k1", "k2", "k3")}
    assert spread["k3"] < spread["k1"] / 5 and spread["k2"] < spread["k1"] / 5


@pytest.mark.parametrize("n", [1, 2, 5])
def test_best_of_n(n):
    """The distribution of the best of n: (F + p)ⁿ - Fⁿ, F the chance of something worse. Its KL stays below the bound."""
    world = TinyWorld(5, 1)
    order = world.rewards.argsort()
    upto = np.cumsum(world.rho[order])
    expected = np.empty(5)
    expected[order] = np.diff(upto**n, prepend=0)
    found = best_of_n(world.policy, [[0]] * 3000, n, world.reward, 1, end=None)
    shares = np.bincount([best.answer[0] for best in found], minlength=5) / 3000
    assert total_variation(shares, expected) < 0.04
    assert (expected * np.log(expected / world.rho)).sum() <= best_of_n_kl(n) + 1e-12
    assert all(best.reward == max(best.rewards) == world.rewards[best.answer[0]] and len(best.rewards) == n for best in found)
