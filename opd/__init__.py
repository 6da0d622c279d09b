"""On-policy distillation of language models. Read step.py, then loss.py, then hooks.py."""
