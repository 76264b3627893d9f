"""How a run is run: its settings, the trainer, checkpoints, recovery fine-tuning."""
