"""From a model that continues texts to one that does a task. Reading order:

classify     texts with labels: rows, batches, the loss, which parts are learned
metrics      accuracy, F1 and the confusion matrix
instruct     conversations: rows with targets on the assistant's tokens alone, padded or packed
"""
from tinyllm.finetune.classify import LabelledBatch, LabelledBatches, classification_loss, encode_texts, learn_top, predict
from tinyllm.finetune.instruct import Example, InstructionBatches, encode_conversations
from tinyllm.finetune.metrics import accuracy, confusion_matrix, f1_scores, report
