"""What scorers and mixers share: models, tasks, batches, per-example quantities, training."""
