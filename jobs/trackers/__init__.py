"""Trackers that a run can feed besides its own metrics.jsonl; each needs a package of its own."""
