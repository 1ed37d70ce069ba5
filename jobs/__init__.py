"""One file per stage: which partitions are due, where they run, what is recorded."""
