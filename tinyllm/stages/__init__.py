"""The stages of a model's life, each a run folder that needs nothing outside of it. In the order in which a model meets them:

stage        what a stage is; start, resume, and getting a model back from a folder
pretrain     text in, model out                encoder      the same for a model that fills gaps
base         what all later stages have in common: a run to begin from, examples
classify     labels of texts                 instruct     answers in conversations
preference   pairs of answers: a reward model, DPO and its relatives
rollout      the model's own answers: GRPO with a verifier, PPO with a reward model
"""
from tinyllm.stages.classify import Classify
from tinyllm.stages.encoder import PretrainEncoder
from tinyllm.stages.instruct import Instruct
from tinyllm.stages.preference import DPO, Reward
from tinyllm.stages.pretrain import DataConfig, Pretrain, PretrainConfig
from tinyllm.stages.rollout import Grpo, Ppo
from tinyllm.stages.stage import STAGES, Stage, Validation, Work, load_module, load_run, resume, stage_config, start

STAGES.update((stage.name, stage) for stage in (Pretrain(), PretrainEncoder(), Classify(), Instruct(), Reward(), DPO(), Ppo(), Grpo()))
