"""Components of the training script: processes, metrics, schedule, checkpoints, logs."""
