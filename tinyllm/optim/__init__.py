"""From gradients to better weights: reads p.grad, writes p.data, knows no module. Reading order:

sgd        the plain rule, with momentum          adamw      the one that trains language models, derived
flat       all parameters as one array            optimizer  what both share: the walk over it, their saved state
schedule   the learning rate of each step         clip       the norm of all gradients, and its limit
scaler     loss scaling for half precision        outliers   which updates are better left out
control    all of these, from gradient to update
"""
from tinyllm.optim.adamw import AdamW, adamw
from tinyllm.optim.clip import clip_factor, global_norm, sum_of_squares
from tinyllm.optim.control import Control, Verdict
from tinyllm.optim.flat import FlatParameters
from tinyllm.optim.optimizer import Optimizer
from tinyllm.optim.outliers import OutlierDetector
from tinyllm.optim.scaler import LossScaler
from tinyllm.optim.schedule import SCHEDULES, learning_rate
from tinyllm.optim.sgd import SGD, sgd
