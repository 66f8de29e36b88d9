"""Alignment: a model learns which answers are wanted. Every method is a loss and a batch builder for the one training loop. Reading order:

logprobs      how likely a model takes an answer to be         rollouts   answers drawn by the policy, and their rewards
prompts       what is to be answered, from .jsonl
preferences   pairs, from .jsonl to batches                    grpo       compared with the other answers to the prompt: GRPO, RLOO
dpo           learning from pairs directly: DPO and relatives  ppo        compared with what a critic expected: RLHF
reward        learning a reward from pairs                     best_of_n  no training at all          metrics    what an update did

All of them aim at the policy that is best for E[r] - β·KL(π ‖ ρ), ρ being the model that it began as. It has a closed form,

    π*(y | x) = ρ(y | x)·e^(r(x, y)/β) / Z(x),

because E_π[r] - β·KL(π ‖ ρ) = β·ln Z - β·KL(π ‖ π*), which is largest where the last KL is 0. The tests hold PPO, DPO and GRPO to it.
"""
from tinyllm.align.best_of_n import best_of_n, best_of_n_kl
from tinyllm.align.dpo import PreferenceConfig, preference_loss, preference_metrics
from tinyllm.align.grpo import GRPO, GRPOConfig, group_advantages, grpo_loss
from tinyllm.align.logprobs import sequence_log_probabilities, token_log_probabilities
from tinyllm.align.metrics import policy_metrics
from tinyllm.align.ppo import PPO, ActorCritic, PPOConfig, gae, ppo_loss
from tinyllm.align.preferences import Pair, PreferenceBatch, Preferences, TokenPair, read_pairs, tokenize_pairs
from tinyllm.align.prompts import Prompt, read_prompts
from tinyllm.align.reward import RewardModel, centre, learned_reward, reward_loss, reward_metrics
from tinyllm.align.rollouts import Experience, RolloutConfig, Rollouts, Samples, rollout_metrics, sample
