"""What a training script needs around its loop: processes, metrics, schedule, checkpoints, logs."""
