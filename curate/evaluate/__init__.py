"""Statistics: paired tests, correction, power, verdicts, agreement; pure functions of numbers."""
