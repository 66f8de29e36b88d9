"""Training, from the loop outwards. Reading order:

config      every setting of a run                  safetensors  arrays in a file, by hand
trainer     one update of the weights               checkpoint   a folder that is there whole or not at all
loop        the one training loop                   store        which checkpoints stay, and coming back from one
pretrain    the main job: text in, model out        run          the run folder; getting a model back from it
interrupt   Ctrl-C that loses nothing               progress, summary   what a person sees, and what stays
"""
from tinyllm.train.config import DataConfig, RunConfig, TrainConfig
from tinyllm.train.loop import Outcome, mean_loss, train
from tinyllm.train.pretrain import next_token_loss, resume, start
from tinyllm.train.progress import Progress, loss_curve
from tinyllm.train.run import Run, load_run, new_run
from tinyllm.train.trainer import Diverged, Trainer
