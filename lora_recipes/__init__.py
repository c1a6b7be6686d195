"""Fine-tuning recipes that prove each step: one YAML file from training to a merged model."""

__version__ = "0.1.0"
