"""From images to weights: crops, one optimizer step, checkpoints, and several processes as one."""
