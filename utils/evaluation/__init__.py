"""From weights to numbers: test sets, checkpoints of any origin, frozen features, linear probes."""
