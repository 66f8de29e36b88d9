"""Training, from the loop outwards. Reading order:

config      every setting of a run                  safetensors  arrays in a file, by hand
trainer     one update of the weights               checkpoint   a folder that is there whole or not at all
loop        the one training loop                   store        which checkpoints stay, and coming back from one
next_token  the loss of language models             run          the run folder
encoder     the losses of masked tokens and next sentences
interrupt   Ctrl-C that loses nothing               progress, summary   what a person sees, and what stays
"""
from tinyllm.train.config import RunConfig, TrainConfig
from tinyllm.train.encoder import masked_metrics, mlm_loss, mlm_nsp_loss, nsp_loss
from tinyllm.train.loop import Outcome, mean_loss, train
from tinyllm.train.next_token import next_token_loss
from tinyllm.train.progress import Progress, loss_curve
from tinyllm.train.run import Run, new_run
from tinyllm.train.trainer import Diverged, Trainer
