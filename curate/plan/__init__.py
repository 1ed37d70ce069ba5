"""From scores and mixtures to a plan: keep, weight, copies and the reason, for every example."""
