"""The stages of a model's life, each a run folder that needs nothing outside of it. In the order in which a model meets them:

stage        what a stage is; start, resume, and getting a model back from a folder
pretrain     text in, model out
"""
from tinyllm.stages.pretrain import DataConfig, Pretrain, PretrainConfig
from tinyllm.stages.stage import STAGES, Stage, Validation, Work, load_module, load_run, resume, stage_config, start

STAGES.update((stage.name, stage) for stage in (Pretrain(),))
