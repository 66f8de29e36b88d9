"""Alignment's parts: readers, batches, log-probabilities, losses, rollouts. (Where they lead to: test_align_closed_form.)"""
import json

import numpy as np
import pytest
from tiny_policies import TinyWorld

import tinyllm
from tinyllm import ops
from tinyllm.align import (
    GRPO,
    PPO,
    ActorCritic,
    GRPOConfig,
    PPOConfig,
    PreferenceConfig,
    Preferences,
    RewardModel,
    RolloutConfig,
    TokenPair,
    best_of_n,
    centre,
    gae,
    group_advantages,
    grpo_loss,
    learned_reward,
    policy_metrics,
    ppo_loss,
    preference_loss,
    preference_metrics,
    read_pairs,
    reward_loss,
    reward_metrics,
    sample,
    sequence_log_probabilities,
    token_log_probabilities,
    tokenize_pairs,
)
from tinyllm.align.logprobs import padded
from tinyllm.align.reward import last_token
from tinyllm.data import IGNORE
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.tensor import Tensor, no_grad
from tinyllm.train import TrainConfig, Trainer, train

END = 1
PAIRS = [TokenPair([2, 3], [4, END], [5, 6, END]), TokenPair([7], [4, 4, END], [6, END]), TokenPair([2, 2, 3], [5, END], [7, 7, 7, END])]


def new_model(seed=0, **changes):
    settings = dict(vocab_size=8, layers=1, heads=2, width=16, context=12) | changes
    return Transformer(TransformerConfig(**settings), np.random.default_rng(seed))


def settings(steps, **changes):
    return TrainConfig(**(dict(lr=1e-2, weight_decay=0.0) | changes)).planned(steps)


@pytest.fixture
def one_thread():
    before = tinyllm.threads()
    tinyllm.threads(1)
    yield
    tinyllm.threads(before)


# ---- pairs ----


def test_reads_pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    record = dict(prompt="Wie geht's? 🙂", chosen="Gut.\n", rejected="Nö", more=1)
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(record).encode() + b"\n\n" + json.dumps(record, ensure_ascii=False).encode())
    pairs = list(read_pairs(file))
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [([{"role": "user", "content": "Wie geht's? 🙂"}], "Gut.\n", "Nö")] * 2
    assert [p.source for p in pairs] == [f"{file}:1", f"{file}:3"]
    assert list(read_pairs([file, file])) == pairs * 2


GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.mark.parametrize("content, message", [
    ("", "the file holds no pairs"),
    ("\n \n", "the file holds no pairs"),
    (GOOD + "{", "line 2: not valid JSON"),
    (GOOD + "[" * 100000, "line 2: not valid JSON"),
    (GOOD + "[1]", "line 2: expected an object with a field 'prompt', found a list"),
    ('{"prompt": "p", "chosen": "a"}', "line 1: the field 'rejected' is missing; fields found: 'prompt', 'chosen'"),
    ("{}", "line 1: the field 'prompt' is missing; fields found: none"),
    ('{"prompt": " ", "chosen": "a", "rejected": "b"}', "line 1: the field 'prompt' is empty"),
    ('{"prompt": 3, "chosen": "a", "rejected": "b"}', "line 1: the field 'prompt' must be a string or a list of messages, found a number"),
    ('{"prompt": "p", "chosen": " ", "rejected": "b"}', "line 1: the field 'chosen' is empty"),
    ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "line 1: the fields 'chosen' and 'rejected' are equal"),
    ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "line 1: the field 'prompt' holds half of a surrogate pair at character 0"),
    (b"\xff\xfe{", "line 1: this is UTF-16"),
    (b"{\xe4}", "line 1: not UTF-8"),
], ids=range(14))  # fmt: skip
def test_bad_pairs_are_named(tmp_path, content, message):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        list(read_pairs(file))
    assert str(error.value).startswith(str(file)) and message in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_too_long_pairs(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(read_pairs(tmp_path / "none.jsonl"))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "ppp", "chosen": "a", "rejected": "bbbb"}')
    as_bytes = lambda text: list(text.encode())  # noqa: E731
    prompt = lambda messages: as_bytes(messages[0]["content"])  # noqa: E731
    [pair] = tokenize_pairs(read_pairs(tmp_path / "pairs.jsonl"), prompt, as_bytes, context=7)
    assert pair == TokenPair([112] * 3, [97], [98] * 4)
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: prompt and answer are 7 tokens, the model's context is 6"):
        tokenize_pairs(read_pairs(tmp_path / "pairs.jsonl"), prompt, as_bytes, context=6)


def test_padded_rows_count_the_answer_alone():
    batch = padded([[2, 3, 4, END], [7, 6, END]], [2, 1])
    assert batch.ids.tolist() == [[2, 3, 4, END], [7, 6, END, 0]]
    assert batch.targets.tolist() == [[IGNORE, 4, END, IGNORE], [IGNORE, END, IGNORE, IGNORE]]
    assert last_token(batch).tolist() == [3, 2]


def test_batches_of_pairs_are_pure_and_go_through_all():
    preferences = Preferences(PAIRS, 2, seed=5)
    batches = [preferences.batch(n) for n in range(3)]
    assert np.array_equal(batches[2].ids, Preferences(PAIRS, 2, seed=5).batch(2).ids)
    firsts = [row[0].tolist()[:3] for b in batches for row in b.ids]  # two epochs: each pair twice
    assert sorted(firsts) == sorted([[2, 3, 4], [7, 4, 4], [2, 2, 3]] * 2)
    assert [len(b) for b in preferences.in_order(2)] == [2, 1] and batches[0].weight == 2
    parts = [batches[0].part(i, 2) for i in range(2)]
    assert np.array_equal(np.concatenate([p.targets for p in parts]), batches[0].targets) and parts[0].reference is None
    third = Preferences(PAIRS, 3, seed=0, mismatched=True)._batch([0, 1, 2])
    assert third.ids.shape[:2] == (3, 3) and third.ids[2, 2, :5].tolist() == [2, 2, 3, 4, END]  # the last prompt, the first pair's answer
    for pairs, batch in (([], 1), (PAIRS, 0)):
        with pytest.raises(ValueError, match="at least"):
            Preferences(pairs, batch, 0)


# ---- log-probabilities ----


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_sequence_log_probabilities_are_products_of_chances(arch):
    """Ragged rows in one batch against one token of one row at a time."""
    model = new_model(arch=arch)
    rows, counted = [[2, 3, 4, END], [7, 6, 5, 4, 3, END], [2, END]], [2, 5, 1]
    with no_grad():
        found = sequence_log_probabilities(model, padded(rows, counted)).data
        for row, count, value in zip(rows, counted, found, strict=True):
            expected = 0.0
            for t in range(len(row) - count, len(row)):
                z = model(np.array([row[:t]])).data[0, -1].astype(float)
                expected += z[row[t]] - np.log(np.exp(z).sum())
            assert value == pytest.approx(expected, abs=1e-5)


def test_token_log_probabilities_are_minus_the_losses():
    random = np.random.default_rng(0)
    x, w, targets = Tensor(random.standard_normal((3, 4, 5)), True), Tensor(random.standard_normal((7, 5)), True), random.integers(0, 7, (3, 4))
    targets[0, :2] = IGNORE
    y = ops.linear_log_probabilities(x, w, targets)
    assert (y.data[0, :2] == 0).all()
    assert -y.sum().item() / 10 == pytest.approx(ops.linear_cross_entropy(x, w, targets).item())
    nothing = ops.linear_log_probabilities(x, w, np.full((3, 4), IGNORE))
    nothing.sum().backward()
    assert not nothing.data.any() and not x.grad.any() and not w.grad.any()
    with pytest.raises(ValueError, match="id 7 is outside"):
        ops.linear_log_probabilities(x, w, np.full((3, 4), 7))


# ---- losses of pairs ----


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_every_loss_learns_what_is_preferred(loss, one_thread):
    model, config = new_model(), PreferenceConfig(loss=loss, beta=1.0 if loss != "ipo" else 0.2)
    preferences = Preferences(PAIRS, 3, 0, mismatched=loss == "kto").with_reference(model)
    before = preference_metrics(model, preferences.in_order(2), config)
    assert before["margins"] == pytest.approx(0, abs=1e-6)
    train(model, lambda n: [preferences.batch(n)], preference_loss(config), settings(25))
    after = preference_metrics(model, preferences.in_order(2), config)
    assert after["accuracy"] == after["reward_accuracy"] == 1
    assert after["margins"] > 0.5 if loss != "ipo" else after["margins"] == pytest.approx(0.5, abs=0.01)  # β/2β: IPO's target
    assert after["margins"] == pytest.approx(after["rewards_chosen"] - after["rewards_rejected"])
    assert after["logps_chosen"] > before["logps_chosen"] or loss == "dpo"


def test_dpo_begins_at_ln_2_and_ipo_has_a_target(one_thread):
    model = new_model()
    batch = Preferences(PAIRS, 3, 0).with_reference(model).batch(0)
    assert preference_loss(PreferenceConfig())(model, batch, None).item() == pytest.approx(np.log(2), abs=1e-6)
    assert preference_loss(PreferenceConfig(loss="ipo", beta=0.25))(model, batch, None).item() == pytest.approx(4, abs=1e-4)


def test_a_batch_in_parts_is_the_batch():
    """Means over parts, by their weights, are the mean of all: for pairs of unlike weight as for answers of unlike length."""
    model = new_model()
    preferences = Preferences(PAIRS, 3, 0, weights=np.array([0.5, 2.0, 1.0])).with_reference(new_model(1))
    cases = [(preference_loss(PreferenceConfig(beta=1.0)), preferences.batch(0))]
    for average in ("answer", "token"):
        config = GRPOConfig(prompts=2, answers=3, max_tokens=5, average=average, entropy=0.1)
        cases.append((grpo_loss(config), GRPO(model, new_model(1), [[2], [3, 4]], length_reward, config, end=END, seed=0).batches(0)[0]))
    for loss, batch in cases:
        parts = [batch.part(i, 2) for i in range(2)]
        shared = sum(loss(model, part, None).item() * part.weight for part in parts) / batch.weight
        assert shared == pytest.approx(loss(model, batch, None).item(), abs=1e-6)
        assert sum(map(len, parts)) == len(batch)


def test_losses_say_what_they_lack():
    batch = Preferences(PAIRS, 2, 0).batch(0)
    with pytest.raises(ValueError, match="call with_reference"):
        preference_loss(PreferenceConfig())(new_model(), batch, None)
    with pytest.raises(ValueError, match="mismatched=True"):
        preference_loss(PreferenceConfig(loss="kto"))(new_model(), Preferences(PAIRS, 2, 0).with_reference(new_model()).batch(0), None)
    with pytest.raises(ValueError, match="--loss is 'dpoo': .*did you mean dpo"):
        PreferenceConfig(loss="dpoo")
    with pytest.raises(ValueError, match="estimator 'k4' is unknown"):
        ops.kl_estimate(np.zeros(2), np.zeros(2), estimator="k4")


# ---- reward model ----


def test_reward_model_learns_and_sees_the_answer_s_end(one_thread):
    model = RewardModel(new_model(), np.random.default_rng(0))
    preferences = Preferences(PAIRS, 3, 0)
    batch = preferences.batch(0).answers
    padded_more = padded([row[row != 0].tolist() for row in batch.ids], [1] * 6, width=12)
    with no_grad():
        np.testing.assert_allclose(model(padded_more).data, model(batch).data, atol=1e-6)  # padding changes nothing
    train(model, lambda n: [preferences.batch(n)], reward_loss, settings(30))
    found = reward_metrics(model, preferences.in_order(2))
    assert found["accuracy"] == 1 and found["margins"] > 1
    centre(model, preferences.in_order(2))
    found = reward_metrics(model, preferences.in_order(2))
    assert found["rewards_chosen"] + found["rewards_rejected"] == pytest.approx(0, abs=1e-5)
    samples = sample(new_model(), [[2, 3]], [0, 0], 4, end=END, seed=0)
    assert learned_reward(model)(samples).shape == (2,)


# ---- rollouts ----


def length_reward(samples):
    return np.array([-abs(len(answer) - 3.0) for answer in samples.answers])


def test_samples_are_the_policy_s_own():
    model = new_model()
    samples = sample(model, [[2, 3, 4], [5]], [1, 0, 1, 1], 6, end=END, seed=3, first_row=8)
    assert samples.prompts == [[5], [2, 3, 4], [5], [5]] and samples.numbers.tolist() == [1, 0, 1, 1]
    rows = [p + a for p, a in zip(samples.prompts, samples.answers, strict=True)]
    batch = padded(rows, list(map(len, samples.answers)))
    with no_grad():
        np.testing.assert_allclose(np.concatenate(samples.log_probabilities), token_log_probabilities(model, batch).data[batch.targets != IGNORE], atol=1e-5)
    for answer, ended in zip(samples.answers, samples.ended, strict=True):
        assert (answer[-1] == END) == ended and END not in answer[:-1] and (ended or len(answer) == 6)
    alone = sample(model, [[5]], [0], 6, end=END, seed=3, first_row=10)
    assert alone.answers == samples.answers[2:3]  # row 8 + 2, in whatever company
    with pytest.raises(ValueError, match="prompt of 3 tokens and an answer of up to 10 do not fit the model's context of 12"):
        sample(model, [[2, 3, 4]], [0], 10, end=END, seed=0)


def grpo_run(steps, stop_at=None, state=None, config=None, records=None):
    """Train by GRPO with several updates a rollout; from stop_at on with another GRPO object, which got the state of the first."""
    model, reference = new_model(), new_model()
    config = config or GRPOConfig(prompts=2, answers=4, max_tokens=5, epochs=2, minibatches=2, advantage="centred")

    def rollouts():
        return GRPO(model, reference, [[2], [3, 4], [5]], length_reward, config, end=END, seed=7, observe=(records or []).append)

    made, trainer = rollouts(), Trainer(model, grpo_loss(config), settings(steps))
    for n in range(steps):
        if n == stop_at:
            state = made.state()
            made = rollouts()
            made.restore(state)
            made.batches(0)  # as a loop does that counts who can share
        trainer.update(made.batches(n))
    return model.state_dict()


@pytest.mark.parametrize("stop_at", [0, 3, 4, 6])
def test_a_resumed_rollout_goes_on_bitwise(stop_at):
    expected = grpo_run(9)
    found = grpo_run(9, stop_at)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_rollouts_go_through_all_prompts_and_all_answers():
    config, records = GRPOConfig(prompts=2, answers=4, max_tokens=5, epochs=2, minibatches=3), []
    rollouts = GRPO(new_model(), new_model(), [[2], [3, 4], [5]], length_reward, config, end=END, seed=7, observe=records.append)
    numbers = np.concatenate([rollouts.numbers(i)[::4] for i in range(3)])
    assert sorted(numbers[:3]) == sorted(numbers[3:]) == [0, 1, 2]
    batches = [rollouts.batches(n)[0] for n in range(6)]
    assert [len(b) for b in batches] == [3, 3, 2] * 2 and len(records) == 1
    whole = sorted(map(tuple, rollouts.made.ids.tolist()))
    assert sorted(tuple(row) for b in batches[:3] for row in b.ids.tolist()) == whole == sorted(tuple(row) for b in batches[3:] for row in b.ids.tolist())
    rollouts.batches(6)
    assert [r["iteration"] for r in records] == [0, 1]
    assert records[0]["kl_k1"] == pytest.approx(0, abs=1e-5) and records[0]["kl_k3"] == pytest.approx(0, abs=1e-5)  # the reference itself, still
    assert {"reward", "reward_std", "length", "ended", "entropy", "kl_k2"} <= records[0].keys()


def test_bad_rewards_and_settings_are_named():
    options = dict(end=END, seed=0)
    for reward in (lambda s: np.zeros(3), lambda s: np.full(len(s.answers), np.nan)):
        with pytest.raises(ValueError, match="one finite number for each of 8 answers"):
            GRPO(new_model(), new_model(), [[2]], reward, GRPOConfig(prompts=1, max_tokens=3), **options).batches(0)
    with pytest.raises(ValueError, match="at least one prompt"):
        GRPO(new_model(), new_model(), [], length_reward, GRPOConfig(), **options)
    with pytest.raises(ValueError, match="--answers 1: "):
        GRPOConfig(answers=1)
    with pytest.raises(ValueError, match="--minibatches 65 is more than the 64"):
        RolloutConfig(minibatches=65)
    with pytest.raises(ValueError, match="--kl-target adapts --kl"):
        PPOConfig(kl=0.0, kl_target=1.0)
    with pytest.raises(ValueError, match="n ≥ 1"):
        best_of_n(new_model(), [[2]], 0, length_reward, 3, end=END)


def test_every_rollout_draws_anew():
    rollouts = GRPO(new_model(), new_model(), [[2]], length_reward, GRPOConfig(prompts=1, answers=8, max_tokens=6), end=END, seed=0)
    first, second = rollouts.batches(0)[0], rollouts.batches(1)[0]  # by the same weights
    assert sorted(map(tuple, first.ids.tolist())) != sorted(map(tuple, second.ids.tolist()))


def test_simpo_and_orpo_take_means_per_token():
    model = new_model()
    batch = Preferences(PAIRS, 3, 0).batch(0)
    p = sequence_log_probabilities(model, batch.answers).data.reshape(3, 2) / (batch.targets != IGNORE).sum(-1)
    for loss, expected in (("simpo", ops.simpo(p[:, 0], p[:, 1], beta=2.0)), ("orpo", ops.orpo(p[:, 0], p[:, 1]))):
        assert preference_loss(PreferenceConfig(loss=loss, beta=2.0))(model, batch, None).item() == pytest.approx(expected.item(), abs=1e-5)


def test_processes_share_a_rollout(tmp_path):
    """Workers draw the same answers, each learns from its rows; the weights end where one process brings them."""
    config, ends = GRPOConfig(prompts=2, answers=4, max_tokens=5, advantage="centred"), []
    for count in (1, 2):
        before = tinyllm.threads()
        tinyllm.threads(count)
        try:
            model, log = new_model(), open(tmp_path / str(count), "a+", buffering=1)  # a file: workers could write into it
            observe = lambda record, log=log: print(record["iteration"], file=log)  # noqa: E731
            rollouts = GRPO(model, new_model(), [[2], [3, 4], [5]], length_reward, config, end=END, seed=7, observe=observe)
            train(model, rollouts.batches, grpo_loss(config), settings(4))
        finally:
            tinyllm.threads(before)
        ends.append(model.state_dict())
        log.close()
        assert (tmp_path / str(count)).read_text().split() == ["0", "1", "2", "3"]
    for name in ends[0]:
        np.testing.assert_allclose(ends[0][name], ends[1][name], atol=2e-4)


# ---- advantages ----


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0)])
def test_gae_by_its_definition(gamma, lam):
    random = np.random.default_rng(0)
    rewards, values = random.standard_normal((2, 3, 6))
    found = gae(rewards, values, gamma, lam)
    following = np.append(values[:, 1:], np.zeros((3, 1)), axis=1)
    delta = rewards + gamma * following - values
    for b, t in np.ndindex(3, 6):
        assert found[b, t] == pytest.approx(sum((gamma * lam) ** k * delta[b, t + k] for k in range(6 - t)))
    if gamma == lam == 1:
        np.testing.assert_allclose(found, rewards[:, ::-1].cumsum(1)[:, ::-1] - values)


def test_group_advantages():
    rewards = np.array([[1.0, 0, 0, 1], [2, 2, 2, 2]])
    assert group_advantages(rewards, "centred").tolist() == [[0.5, -0.5, -0.5, 0.5], [0] * 4]
    np.testing.assert_allclose(group_advantages(rewards, "grpo"), [[1, -1, -1, 1], [0] * 4], rtol=1e-3)
    for i in range(4):
        others = np.delete(rewards[0], i).mean()
        assert group_advantages(rewards, "rloo")[0, i] == pytest.approx(rewards[0, i] - others)


# ---- PPO ----


def test_ppo_experience_by_hand():
    """Returns are the answer's reward minus what was paid for leaving the reference; λ = 1, and a critic that says 0."""
    actor = ActorCritic(new_model(1), np.random.default_rng(0))
    config = PPOConfig(prompts=2, answers=3, max_tokens=5, kl=0.3, lam=1.0, epochs=1, minibatches=1)
    rollouts = PPO(actor, new_model(0), [[2], [3, 4]], lambda s: np.arange(6.0), config, end=END, seed=0)
    [e] = rollouts.batches(0)
    assert not e.old_values.any()
    paid = 0.3 * (e.old_log_p - e.reference_log_p)
    for b in range(6):
        places = np.flatnonzero(e.answered[b])
        np.testing.assert_allclose(e.returns[b, places], b - paid[b, places][::-1].cumsum()[::-1])
        assert not e.returns[b, ~e.answered[b]].any() and not e.advantages[b, ~e.answered[b]].any()
    assert e.advantages[e.answered].mean() == pytest.approx(0, abs=1e-9) and e.advantages[e.answered].std() == pytest.approx(1)


def test_ppo_raises_the_reward_and_keeps_the_kl_near_its_target(one_thread):
    actor, records = ActorCritic(new_model(), np.random.default_rng(0)), []
    config = PPOConfig(prompts=3, answers=16, max_tokens=6, kl=0.2, kl_target=0.5)
    rollouts = PPO(actor, new_model(), [[2], [3, 4], [5]], length_reward, config, end=END, seed=0, observe=records.append)
    train(actor, rollouts.batches, ppo_loss(config), settings(100, lr=5e-3))
    assert records[-1]["reward"] > records[0]["reward"] + 0.5 and rollouts.kl != 0.2
    found = policy_metrics(actor.policy, rollouts.batches(99)[0], config)
    assert 0 <= found["clip_fraction"] < 0.5 and 0 <= found["approx_kl"] < 0.2 and found["ratio"] == pytest.approx(1, abs=0.1)
    again = PPO(actor, new_model(), [[2]], length_reward, config, end=END, seed=0)
    again.restore(rollouts.state())
    assert again.kl == rollouts.kl and np.array_equal(again.batches(99)[0].ids, rollouts.batches(99)[0].ids)
    again.restore({})


def test_policy_metrics_of_an_unchanged_policy():
    world = TinyWorld(3, 2)
    config = GRPOConfig(prompts=1, answers=8, max_tokens=2)
    rollouts = GRPO(world.policy, world.reference, [[0]], world.reward, config, end=None, seed=0)
    found = policy_metrics(world.policy, rollouts.batches(0)[0], config)
    assert found["clip_fraction"] == 0 and found["ratio"] == pytest.approx(1, abs=1e-5)
    assert found["kl_k1"] == pytest.approx(0, abs=1e-5) and 0 < found["entropy"] <= np.log(3)
    world.policy.head.weight.data *= 3
    found = policy_metrics(world.policy, rollouts.batches(0)[0], config)
    assert found["clip_fraction"] > 0.2 and found["kl_k3"] > 0 and found["approx_kl"] > 0


def test_entropy_and_clipping_at_their_edges():
    assert ops.entropy(np.zeros((2, 8))).data == pytest.approx(np.log([8, 8]))
    assert ops.entropy(np.array([[0.0, -np.inf], [1000.0, -1000.0]])).data.tolist() == [0, 0]
    old, up, down = np.zeros(4), np.log(1.5), np.log(0.5)
    log_p = Tensor(np.array([up, up, down, down]), True)
    ops.clipped_policy_loss(log_p, old, np.array([1.0, -1, 1, -1])).backward()
    np.testing.assert_allclose(log_p.grad, [0, 1.5 / 4, -0.5 / 4, 0])  # what went too far the right way rests
    nothing = ops.policy_gradient(Tensor(np.ones(2), True), np.ones(2), np.zeros(2))
    assert nothing.item() == 0
