"""The owners' own defaults of keys that a recipe may leave out and that we count with."""

DEVICE_BATCH = 8  # transformers.TrainingArguments: rows of a micro-batch, for training and evaluation
MAX_LENGTH = 1024  # trl.SFTConfig: tokens of a row
RANK, ALPHA = 8, 8  # peft.LoraConfig
